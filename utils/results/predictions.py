"""File predictions.npz: every forecast of a test pass beside the truth, written as the batches come."""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from utils.saving.files import write_atomic, writing

PREDICTIONS = "predictions.npz"


class Predictions:
    """Writes each window's rows to their place in files on the disk; memory holds one batch.

    Members of the file, for W windows, H steps ahead and N channels, in the data's own units:

    - pred, true `[W, H, N]` float32
    - start `[W]` datetime64: date of the first forecast row
    - columns `[N]` names; mean, deviation `[N]`: standardised = (value - mean) / deviation

    Processes of a group on one machine write to the same files.
    """

    def __init__(self, folder: Path, windows: int, pred_len: int, columns: list[str], main: bool = True):
        """Args:
        folder: the run's folder; the parts lie in a folder in it until `close`.
        main: whether this process makes the files (the others wait before they write).
        """
        self.folder, self.columns, self.main = folder, columns, main
        self.parts = folder / ".predictions.parts"
        self.shape = (windows, pred_len, len(columns))
        if main:
            with writing(folder / PREDICTIONS):
                shutil.rmtree(self.parts, ignore_errors=True)
                self.parts.mkdir()
                for name in ("pred", "true"):
                    self._create(name)

    def _path(self, name: str) -> Path:
        return self.parts / f"{name}.npy"

    def _create(self, name: str) -> None:
        # open_memmap writes the header and sets the length; the map itself is not used.
        np.lib.format.open_memmap(self._path(name), mode="w+", dtype="<f4", shape=self.shape)

    def add(self, first: int, pred: np.ndarray, true: np.ndarray) -> None:
        """Write neighbouring windows from number `first` on, `[B, H, N]` in own units."""
        for name, rows in (("pred", pred), ("true", true)):
            rows = np.ascontiguousarray(rows, dtype="<f4")
            size = self.shape[1] * self.shape[2] * rows.itemsize  # bytes of a window
            with writing(self.folder / PREDICTIONS), self._path(name).open("r+b") as file:
                start = os.fstat(file.fileno()).st_size - self.shape[0] * size  # the header's length
                file.seek(start + first * size)
                file.write(rows.data)

    def close(self, start: pd.DatetimeIndex | np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> None:
        """Put the parts into predictions.npz; an earlier one stays until this one is whole."""
        small = {
            "start": pd.DatetimeIndex(start).tz_localize(None).to_numpy().astype("datetime64[ns]"),
            "columns": np.array(self.columns),
            "mean": mean,
            "deviation": deviation,
        }
        with writing(self.folder / PREDICTIONS):
            for name, values in small.items():
                np.save(self._path(name), values, allow_pickle=False)
        write_atomic(self.folder / PREDICTIONS, self._pack)
        shutil.rmtree(self.parts)

    def _pack(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as packed:
            for part in sorted(self.parts.glob("*.npy")):
                packed.write(part, part.name)  # copied in small pieces
