"""The one shape of a batch: what the loader yields, the loop splits, and every model takes.

Shapes: B windows, N forecast channels, M = B*N sequences (window by window, channel by channel), T = seq_len,
H = pred_len, F time marks, C columns of the data.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from layers.prompt import PromptEncoder, Prompts, pad_prompts

SEQUENCES = ("x", "y", "x_mask", "y_mask", "history", "channel", "notes")  # what a batch has a row a sequence of


class Windows(NamedTuple):
    """Whole windows with their calendar, for a model that reads all columns at once."""

    x: torch.Tensor  # (B, T, C) standardised
    x_mark: torch.Tensor  # (B, T, F)
    y_mark: torch.Tensor  # (B, label_len + H, F)
    channels: slice  # the N columns that are forecast


@dataclass
class Batch:
    """M sequences of one channel each: channels do not depend on each other, unless a model reads `windows`."""

    x: torch.Tensor  # (M, T) standardised
    y: torch.Tensor  # (M, H)
    prompts: Prompts | None = None  # (M, n), (M,)
    windows: Windows | None = None
    x_mask: torch.Tensor | None = None  # (M, T) 1 where x has a value, 0 where it is padded; None: no padding
    y_mask: torch.Tensor | None = None  # (M, H)
    history: torch.Tensor | None = None  # (M, h) the rows before x
    notes: torch.Tensor | None = None  # (M, k, 4) int64, see data_provider.notes; where a window has fewer, -1
    channel: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # (M,) of the N channels
    index: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # (B,) window numbers

    def __len__(self) -> int:
        return len(self.x)

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of at most `size` sequences (0: one of all); whole windows are not split."""
        if self.windows is not None or not 0 < size < len(self):
            return [self]
        return [self.mapped(operator.itemgetter(slice(start, start + size))) for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> "Batch":
        """Move what the model reads to a device; the window numbers stay."""
        moved = replace(self, prompts=None).mapped(lambda t: t.to(device, non_blocking=True))
        return replace(moved, prompts=None if self.prompts is None else self.prompts.to(device))

    def pin_memory(self) -> "Batch":
        return self.mapped(torch.Tensor.pin_memory)

    def mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """With `move` of each tensor but the window numbers."""
        w = self.windows
        moved: dict[str, Any] = {name: move(v) for name in SEQUENCES if (v := getattr(self, name)) is not None}
        moved["prompts"] = None if self.prompts is None else Prompts(*map(move, self.prompts))
        moved["windows"] = None if w is None else Windows(move(w.x), move(w.x_mark), move(w.y_mark), w.channels)
        return replace(self, **moved)


class WindowCollate:
    """Collates a `WindowDataset`'s items; with an encoder it also normalises, describes and tokenises each sequence.

    Args:
        pred_len: rows of y that are forecast, H.
        target_index: the one channel that is forecast (`--features MS`: running the others would change nothing but
            the time); None: all.
        encoder: makes the prompts here, in the loader's workers; None: the batch has none.
        whole: the model reads whole windows and their marks.
    """

    def __init__(
        self, pred_len: int, target_index: int | None = None, encoder: PromptEncoder | None = None, whole: bool = False
    ):
        self.pred_len, self.encoder, self.whole = pred_len, encoder, whole
        self.channels = slice(None) if target_index is None else slice(target_index, target_index + 1)

    def __call__(self, items: list[dict]) -> Batch:
        known = [item.pop("notes") for item in items if "notes" in item]
        held = default_collate(items)
        names = ("x", "x_mask", "y_mask", "history")
        channels = {name: held[name][..., self.channels] for name in names if name in held}
        prompts, N = None, channels["x"].shape[2]
        notes = pad_notes(known) if known else None
        if self.encoder is not None:
            described: Iterable[torch.Tensor] = channels["x"]  # (B, T, N)
            if "x_mask" in held:  # the prompt describes the values that are there, without the padding
                described = [x[mask[:, 0] > 0] for x, mask in zip(described, held["x_mask"], strict=True)]
            prompts = pad_prompts(self.encoder.for_windows(described, notes))
        return Batch(
            y=_sequences(held["y"][:, -self.pred_len :, self.channels]),
            index=held["index"],
            channel=held.get("channel", torch.arange(N).repeat(len(held["index"]))),
            notes=None if notes is None else notes.repeat_interleave(N, dim=0),
            prompts=prompts,
            windows=Windows(held["x"], held["x_mark"], held["y_mark"], self.channels) if self.whole else None,
            **{name: _sequences(values) for name, values in channels.items()},
        )


def pad_notes(notes: list[torch.Tensor]) -> torch.Tensor:
    """The notes `[k, 4]` of B windows -> `[B, most, 4]`, at least one of each window, with -1 where there is none."""
    return pad_sequence([torch.full((1, 4), -1), *notes], batch_first=True, padding_value=-1)[1:]


# `[B, rows, N]` -> `[B*N, rows]`, contiguous: the layout in memory decides the order of sums.
def _sequences(windows: torch.Tensor) -> torch.Tensor:
    return windows.transpose(1, 2).flatten(0, 1).contiguous()
