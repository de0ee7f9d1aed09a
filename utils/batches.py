"""Batches as the model takes them: sequences with their prompts, made in the loader's workers."""

from dataclasses import dataclass

import torch

from layers.prompt import PromptEncoder, pad_prompts
from models.TimeLLM import Prompts


@dataclass
class Batch:
    """B windows of N channels as M = B*N sequences, window by window."""

    x: torch.Tensor  # (M, T) standardised
    y: torch.Tensor  # (M, H)
    prompts: Prompts  # (M, n), (M,)
    index: torch.Tensor  # (B,) window numbers in the data set

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader, so that `to` need not wait."""
        prompts = Prompts(*(t.pin_memory() for t in self.prompts))
        return Batch(self.x.pin_memory(), self.y.pin_memory(), prompts, self.index)

    def to(self, device: torch.device) -> "Batch":
        x, y = (t.to(device, non_blocking=True) for t in (self.x, self.y))
        return Batch(x, y, self.prompts.to(device), self.index)

    def parts(self, sequences: int) -> list["Batch"]:
        """Cut into parts of at most `sequences` sequences (0: one part)."""
        M = len(self.x)
        step = sequences or M
        return [
            Batch(self.x[i : i + step], self.y[i : i + step], self.prompts.rows(i, i + step), self.index)
            for i in range(0, M, step)
        ]


class SequenceCollate:
    """Collates window items; also normalises, describes and tokenises each sequence.

    With `--features MS` only the target is forecast: channels are independent of each other, so
    running the others would change nothing but the time.
    """

    def __init__(self, encoder: PromptEncoder, pred_len: int, target_index: int | None):
        self.encoder, self.pred_len = encoder, pred_len
        self.channels = slice(None) if target_index is None else slice(target_index, target_index + 1)

    def __call__(self, items: list[dict]) -> Batch:
        x = torch.stack([item["x"][:, self.channels] for item in items])  # (B, T, N)
        y = torch.stack([item["y"][-self.pred_len :, self.channels] for item in items])  # (B, H, N)
        ids = [row for window in x for row in self.encoder.for_window(window)]
        return Batch(
            x=x.transpose(1, 2).flatten(0, 1),
            y=y.transpose(1, 2).flatten(0, 1),
            prompts=Prompts(*pad_prompts(ids)),
            index=torch.tensor([item["index"] for item in items]),
        )
