"""Windows of many series of different lengths: cut at random to train on, and at their ends.

Shapes: T = seq_len, H = pred_len. A series shorter than T is padded with zeros at the left. Masks say what exists, of the
history `[T, 1]` and of what follows it `[H, 1]`: 1 where there is a value.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from data_provider.sampler import EpochBatches

CHUNK = 8192  # sequences in memory at a time
STILL = 1e-6  # of its level: a history that deviates less stands still
DRAWS = 2**31  # numbers that a random cut is drawn from


class _Windows(Dataset):
    """What the windows of many series have in common."""

    target_index = None

    def __init__(self, ids: list[str], series: list[np.ndarray], seq_len: int, label_len: int, pred_len: int):
        """Args:
        ids, series: `[S]` names, and values `[values]` in their own units.
        """
        self.ids, self.series = ids, series
        self.seq_len, self.label_len, self.pred_len = seq_len, label_len, pred_len

    def __len__(self) -> int:
        return len(self.series)

    def window_dates(self, index: int) -> tuple[str, str]:
        """In the place of dates, which such series have not: the id of window `index`, twice."""
        name = self.ids[index % len(self)]
        return name, name

    def _item(self, index: int, history: np.ndarray, future: np.ndarray) -> dict[str, torch.Tensor | int]:
        """x `[T, 1]`, y `[label_len + H, 1]`, marks without columns, index, masks x_mask `[T, 1]`, y_mask `[H, 1]`."""
        x, x_mask = _padded(history[-self.seq_len :], self.seq_len, left=True)
        y, y_mask = _padded(future[: self.pred_len], self.pred_len, left=False)
        y = torch.cat([x[self.seq_len - self.label_len :], y])
        return {
            "x": x,
            "y": y,
            "x_mark": torch.zeros(len(x), 0),
            "y_mark": torch.zeros(len(y), 0),
            "index": index,
            "x_mask": x_mask,
            "y_mask": y_mask,
        }


class Cuts(_Windows):
    """Training windows: each series once an epoch, cut where chance has it within its last `recent` values.

    The number of an item says both, the series and the cut (see `CutBatches`): the item depends on nothing else.
    """

    def __init__(self, ids: list[str], series: list[np.ndarray], seq_len: int, label_len: int, pred_len: int, recent: int):
        """Args:
        recent: values at the end of a series among which the first forecast one is drawn.
        """
        super().__init__(ids, series, seq_len, label_len, pred_len)
        self.recent = recent

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """The window of series `index % S` whose cut is chosen by `index // S`."""
        draw, number = divmod(index, len(self))
        values = self.series[number]
        first = self._first(values)
        cut = first + draw % (len(values) - first)
        return self._item(index, values[:cut], values[cut:])

    def _first(self, values: np.ndarray) -> int:
        return max(1, len(values) - self.recent)

    @property
    def sequence_count(self) -> int:
        """Cuts that are whole on both sides."""
        return sum(map(len, self._whole()))

    def sequences(self, every: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs `[m, T]` and truths `[m, H]` of every k-th cut that is whole on both sides, each in units of its history's
        deviation, so that all count alike; a history that stands still is left out."""
        yield from _in_deviations([rows for view in self._whole() for rows in view][::every], self.seq_len)

    def moving(self) -> list[int]:
        """The numbers of the series that `sequences` has something of."""
        T, found = self.seq_len, []
        for number, values in enumerate(self.series):
            if len(values) >= T + self.pred_len:
                x = self._view(values)[:, :T]
                if _moves(x.mean(axis=1), x.std(axis=1)).any():
                    found.append(number)
        return found

    def _whole(self) -> list[np.ndarray]:
        """A view `[cuts, T + H]` of each series that is long enough."""
        return [self._view(values) for values in self.series if len(values) >= self.seq_len + self.pred_len]

    def _view(self, values: np.ndarray) -> np.ndarray:
        """The cuts `[cuts, T + H]` of a series that are whole."""
        T, H = self.seq_len, self.pred_len
        return np.lib.stride_tricks.sliding_window_view(values[max(self._first(values) - T, 0) :], T + H)

    def some(self, chosen: list[int]) -> "Cuts":
        """The windows of the series with these numbers alone."""
        ids, series = [self.ids[n] for n in chosen], [self.series[n] for n in chosen]
        return Cuts(ids, series, self.seq_len, self.label_len, self.pred_len, self.recent)


class Ends(_Windows):
    """Windows at the ends of the series, with what follows each: validation and test."""

    def __init__(
        self,
        ids: list[str],
        series: list[np.ndarray],
        future: list[np.ndarray],
        seq_len: int,
        label_len: int,
        pred_len: int,
    ):
        """Args:
        future: `[S]` of `[H]`.
        """
        super().__init__(ids, series, seq_len, label_len, pred_len)
        self.future = future

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """The window of series `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"window: got {index}, expected 0 to {len(self) - 1}")
        return self._item(index, self.series[index], self.future[index])


class CutBatches(EpochBatches):
    """Batches of `Cuts`: order and cuts depend on seed and epoch alone."""

    def _order(self) -> torch.Tensor:
        """Items of the epoch, `[length]`: the series' numbers in the epoch's order, each with a drawn number in front."""
        order = super()._order()
        random = np.random.default_rng(np.random.SeedSequence([self.seed % 2**63, self.epoch, 1]))
        draws = torch.from_numpy(random.integers(DRAWS, size=self.length))
        return order + self.length * draws[order]


def _padded(values: np.ndarray, length: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`[n]` values -> `[length, 1]` float32 with zeros on one side, and the mask `[length, 1]`."""
    padded, mask = torch.zeros(length, 1), torch.zeros(length, 1)
    place = slice(length - len(values), None) if left else slice(0, len(values))
    padded[place, 0] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    mask[place] = 1
    return padded, mask


def _moves(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Which of the histories with these means and deviations `[m]` do not stand still, `[m]`."""
    return deviation > STILL * np.abs(mean)


def _in_deviations(rows: list[np.ndarray], T: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows `[T + H]` -> chunks of x `[m, T]` and y `[m, H]`, less the mean of x and in units of its deviation."""
    for start in range(0, len(rows), CHUNK):
        chunk = np.stack(rows[start : start + CHUNK]).astype(np.float64)
        x = chunk[:, :T]
        mean, deviation = x.mean(axis=1), x.std(axis=1)
        moves = _moves(mean, deviation)
        chunk = (chunk[moves] - mean[moves, None]) / deviation[moves, None]
        yield chunk[:, :T], chunk[:, T:]
