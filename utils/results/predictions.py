"""File predictions.npz: every forecast of a test pass beside the truth, written as the batches come."""

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from utils.intervals import name_of
from utils.saving.array_file import ArrayFile
from utils.saving.files import write_atomic, writing

PREDICTIONS = "predictions.npz"


class Predictions:
    """Writes each window's rows to their place in files on the disk; memory holds one batch.

    Members of the file, for W windows, H steps ahead and N channels, in the data's own units:

    - pred, true `[W, H, N]` float32; with prediction intervals also lo80, hi80 and so on, the ends of their bands
    - start `[W]` datetime64: date of the first forecast row
    - columns `[N]` names; mean, deviation `[N]`: standardised = (value - mean) / deviation

    Processes of a group write to the same files.
    """

    def __init__(
        self,
        folder: Path,
        windows: int,
        pred_len: int,
        columns: list[str],
        main: bool = True,
        levels: Sequence[float] = (),
    ):
        """Args:
        folder: the run's folder; the parts lie in a folder in it until `close`.
        main: whether this process makes the files (the others wait before they write).
        levels: of the prediction intervals, per cent.
        """
        self.folder, self.columns, self.main = folder, columns, main
        self.parts = folder / ".predictions.parts"
        names = ["pred", "true", *(side + name_of(level) for level in levels for side in ("lo", "hi"))]
        shape = (windows, pred_len, len(columns))
        self.arrays = {name: ArrayFile(self._path(name), shape, folder / PREDICTIONS) for name in names}
        if main:
            with writing(folder / PREDICTIONS):
                shutil.rmtree(self.parts, ignore_errors=True)
                self.parts.mkdir()
            for array in self.arrays.values():
                array.create()

    @staticmethod
    def room(windows: int, pred_len: int, columns: int, levels: int) -> int:
        """Bytes of the disk that it takes to write so much: all arrays, and one of them twice while they are packed."""
        return windows * pred_len * columns * 4 * (3 + 2 * levels)

    def _path(self, name: str) -> Path:
        return self.parts / f"{name}.npy"

    def add(self, first: int, pred: np.ndarray, true: np.ndarray, bands: dict[str, np.ndarray] | None = None) -> None:
        """Write neighbouring windows from number `first` on, each `[B, H, N]` in own units."""
        for name, rows in {"pred": pred, "true": true, **(bands or {})}.items():
            self.arrays[name].write(first, rows)

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
                part.unlink()  # so that the disk never holds all of it twice
