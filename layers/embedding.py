"""Steps of a multivariate series as tokens: values and calendar (Autoformer, NeurIPS 2021, from Informer, AAAI 2021)."""

import math

import torch
from torch import nn

from layers.patch import TokenEmbedding

# Entries of the tables of month, day, weekday, hour and minute, whose fields are counted from 0 or from 1.
CALENDAR = (13, 32, 7, 24, 60)


def sinusoids(rows: int, width: int) -> torch.Tensor:
    """Sines in even and cosines in odd columns, `[rows, width]` (Attention Is All You Need, section 3.5)."""
    column = torch.arange(width)  # (width)
    rate = torch.exp((column - column % 2) * (-math.log(10000.0) / width))  # (width)
    angle = torch.arange(rows)[:, None] * rate  # (rows, width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())


class CalendarEmbedding(nn.Module):
    """The sum of one table's row for each calendar field; the tables are trained, or fixed sinusoids."""

    tables: torch.Tensor  # (sum of the tables' rows, d)
    starts: torch.Tensor  # (F), where each table starts

    def __init__(self, fields: int, d_model: int, trained: bool):
        """`fields` F: how many of month, day, weekday, hour, minute the marks hold, in this order."""
        super().__init__()
        sizes = CALENDAR[:fields]
        starts = torch.tensor([sum(sizes[:field]) for field in range(fields)])
        self.register_buffer("starts", starts, persistent=False)
        if trained:
            self.tables = nn.Parameter(torch.randn(sum(sizes), d_model))
        else:
            self.register_buffer("tables", torch.cat([sinusoids(size, d_model) for size in sizes]), persistent=False)

    def forward(self, marks: torch.Tensor) -> torch.Tensor:
        """Whole numbers `[B, T, F]`, of any number type -> `[B, T, d]`."""
        return nn.functional.embedding(marks.long() + self.starts, self.tables).sum(dim=2)


class DataEmbedding(nn.Module):
    """Values by a circular convolution over 3 steps, plus what the calendar says; without positions (section 4).

    `kind` of the marks: "timeF", scaled features, mapped linearly; "learned" or "fixed", calendar fields, looked up;
    "none": no marks are read.
    """

    def __init__(self, channels: int, d_model: int, marks: int, kind: str, dropout: float):
        """`channels` N and `marks` F: columns of the values and of the time marks."""
        super().__init__()
        self.value_embedding = TokenEmbedding(channels, d_model)
        self.time_embedding: nn.Module | None = None
        if kind == "timeF":
            self.time_embedding = nn.Linear(marks, d_model, bias=False)
        elif kind != "none":
            self.time_embedding = CalendarEmbedding(marks, d_model, trained=kind == "learned")
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, marks: torch.Tensor | None) -> torch.Tensor:
        """Values `[B, T, N]` and their marks `[B, T, F]` -> tokens `[B, T, d]`.

        Raises:
            ValueError: marks are read, and there are none.
        """
        tokens = self.value_embedding(x)  # (B, T, d)
        if self.time_embedding is not None:
            if marks is None:
                raise ValueError("time marks: got None, expected a tensor [B, T, F]")
            tokens = tokens + self.time_embedding(marks)
        return self.dropout(tokens)
