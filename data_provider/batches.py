"""Batches: windows with all their channels for the loop, and the sequences that the model takes them as."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils.data import default_collate

from layers.prompt import PromptEncoder, Prompts, pad_prompts


class Windows(NamedTuple):
    """Whole windows, for a model that reads all channels of one, and what the calendar says of its rows."""

    x: torch.Tensor  # (B, T, N) standardised
    x_mark: torch.Tensor  # (B, T, F)
    y_mark: torch.Tensor  # (B, label_len + H, F)
    channels: slice  # those of the N that are forecast


@dataclass
class Sequences:
    """M series of one channel each, with their prompts."""

    x: torch.Tensor  # (M, T) standardised
    y: torch.Tensor  # (M, H)
    prompts: Prompts | None = None  # (M, n), (M,)
    windows: Windows | None = None  # the B that they are channels of, where the model reads these
    x_mask: torch.Tensor | None = None  # (M, T) 1 where x has a value, 0 where it is padded; None: all exist
    y_mask: torch.Tensor | None = None  # (M, H)

    def __len__(self) -> int:
        return len(self.x)

    def micro_batches(self, size: int) -> list["Sequences"]:
        """Cut into micro-batches of at most `size` sequences (0: one of all); windows are not cut."""
        if self.windows is not None or size >= len(self):
            return [self]
        step = size or len(self)
        return [
            Sequences(
                self.x[start : start + step],
                self.y[start : start + step],
                None if self.prompts is None else self.prompts.rows(start, start + step),
                x_mask=None if self.x_mask is None else self.x_mask[start : start + step],
                y_mask=None if self.y_mask is None else self.y_mask[start : start + step],
            )
            for start in range(0, len(self), step)
        ]


@dataclass
class Batch:
    """B windows of N channels, standardised.

    It unpacks into the four tensors of the Time-Series-Library's loaders:
    ``for batch_x, batch_y, batch_x_mark, batch_y_mark in loader``. What else the model takes travels beside them.
    """

    x: torch.Tensor  # (B, T, N)
    y: torch.Tensor  # (B, label_len + H, N)
    x_mark: torch.Tensor  # (B, T, F)
    y_mark: torch.Tensor  # (B, label_len + H, F)
    index: torch.Tensor  # (B,) window numbers in the data set
    pred_len: int
    channels: slice  # those of the N that are forecast
    prompts: Prompts | None = None  # of the B*N forecast sequences, window by window
    whole: bool = False  # the model reads whole windows and their marks
    x_mask: torch.Tensor | None = None  # (B, T, N) 1 where x has a value, 0 where it is padded; None: all exist
    y_mask: torch.Tensor | None = None  # (B, H, N)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.x, self.y, self.x_mark, self.y_mark))

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader, so that `to` need not wait."""
        prompts = None if self.prompts is None else self.prompts.pin_memory()
        x_mask, y_mask = (None if mask is None else mask.pin_memory() for mask in (self.x_mask, self.y_mask))
        return replace(self, x=self.x.pin_memory(), y=self.y.pin_memory(), prompts=prompts, x_mask=x_mask, y_mask=y_mask)

    def to(self, device: torch.device) -> "Batch":
        """Move what the model reads; the window numbers stay, and marks that it does not read."""
        x, y = (t.to(device, non_blocking=True) for t in (self.x, self.y))
        moved = replace(self, x=x, y=y, prompts=None if self.prompts is None else self.prompts.to(device))
        if self.whole:
            moved.x_mark, moved.y_mark = self.x_mark.to(device), self.y_mark.to(device)
        if self.x_mask is not None and self.y_mask is not None:
            moved.x_mask, moved.y_mask = self.x_mask.to(device), self.y_mask.to(device)
        return moved

    def sequences(self) -> Sequences:
        """The forecast channels as M = B*N sequences, window by window: channels do not depend on each other.

        With `--features MS` only the target is forecast: running the other channels would change nothing
        but the time.
        """
        return Sequences(
            _flatten(self.x[..., self.channels]),
            _flatten(self.y[:, -self.pred_len :, self.channels]),
            self.prompts,
            Windows(self.x, self.x_mark, self.y_mark, self.channels) if self.whole else None,
            None if self.x_mask is None else _flatten(self.x_mask[..., self.channels]),
            None if self.y_mask is None else _flatten(self.y_mask[..., self.channels]),
        )


def _flatten(windows: torch.Tensor) -> torch.Tensor:
    """Windows `[B, rows, N]` -> sequences `[B*N, rows]`."""
    # Without what was cut off first: how the values lie in memory decides the order of their sums.
    return windows.contiguous().transpose(1, 2).flatten(0, 1)


class WindowCollate:
    """Collates a `WindowDataset`'s items; with an encoder it also normalises, describes and tokenises each sequence.

    Args:
        pred_len: rows of y that are forecast, H.
        target_index: the one channel that is forecast (`--features MS`); None: all are.
        encoder: makes the prompts here, in the loader's workers; None: the batch has none.
        whole: the model reads whole windows and their marks.
    """

    def __init__(
        self, pred_len: int, target_index: int | None = None, encoder: PromptEncoder | None = None, whole: bool = False
    ):
        self.pred_len, self.encoder, self.whole = pred_len, encoder, whole
        self.channels = slice(None) if target_index is None else slice(target_index, target_index + 1)

    def __call__(self, items: list[dict]) -> Batch:
        batch = Batch(**default_collate(items), pred_len=self.pred_len, channels=self.channels, whole=self.whole)
        if self.encoder is not None:
            windows: Iterable[torch.Tensor] = batch.x[..., self.channels]  # (B, T, N)
            if batch.x_mask is not None:  # the prompts speak of what exists
                windows = [x[mask[:, 0] > 0] for x, mask in zip(windows, batch.x_mask, strict=True)]
            batch.prompts = pad_prompts(self.encoder.for_windows(windows))
        return batch
