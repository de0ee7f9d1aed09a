"""An array on the disk, filled a few rows at a time, also by several processes; memory holds what is written at once."""

import os
from pathlib import Path

import numpy as np

from utils.saving.files import writing


class ArrayFile:
    """A float32 array in NumPy's .npy format, whose first axis is written in pieces.

    Plain writes: through a memory map, a full disk would end the program without a word.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], part_of: Path | None = None):
        """Args:
        part_of: the file that it becomes a part of, to be named in an error.
        """
        self.path, self.shape, self.named = path, shape, part_of or path

    def create(self) -> None:
        """Make the file, of zeros; one that is there goes.

        Raises:
            StorageError: the file system refused.
        """
        with writing(self.named):
            self.path.unlink(missing_ok=True)  # were it a link, writing would follow it
            # Writes the header and sets the length; the map itself is not used.
            np.lib.format.open_memmap(self.path, mode="w+", dtype="<f4", shape=self.shape)

    def write(self, first: int, rows: np.ndarray) -> None:
        """Put rows `[rows, ...]` in their place, from number `first` on.

        Raises:
            StorageError: the file system refused.
        """
        rows = np.ascontiguousarray(rows, dtype="<f4")
        size = int(np.prod(self.shape[1:])) * rows.itemsize  # bytes of a row
        with writing(self.named), self.path.open("r+b") as file:
            start = os.fstat(file.fileno()).st_size - self.shape[0] * size  # the header's length
            file.seek(start + first * size)
            file.write(rows.data)

    def read(self, part: slice) -> np.ndarray:
        """Part of the second axis, `[rows, part, ...]`: plain reads, so that no more than this lies in memory."""
        rows, columns, *rest = self.shape
        start, stop, _ = part.indices(columns)
        each = int(np.prod(rest)) * 4  # bytes of a row and column
        found = np.empty((rows, stop - start, *rest), dtype="<f4")
        with self.path.open("rb") as file:
            header = os.fstat(file.fileno()).st_size - rows * columns * each
            for row in range(rows):
                file.seek(header + (row * columns + start) * each)
                file.readinto(found[row].data)
        return found
