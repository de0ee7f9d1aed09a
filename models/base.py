"""What the loop asks of a model, whichever it is: the base class of every ``models/X.py``.

Shapes: B windows, N channels, M = B*N sequences, T = seq_len, H = pred_len.
"""

from collections.abc import Iterator

import torch
from torch import nn

from data_provider.batches import Batch, Windows
from layers.mapping import MappingLayer
from layers.norm import instance_norm
from layers.notes import NotesEffect
from layers.prompt import PromptEncoder


class ForecastModel(nn.Module):
    """A model that the loop can train, score, save and forecast with.

    Attributes:
        uses_llm: whether it is built around a language model; `Model(configs, backbone, prompts)` then, else
            `Model(configs)`.
        channel_independent: whether each channel is forecast from itself alone; else it reads the batch's `windows`.
        whole_batches: whether what it computes of a window depends on the others of its batch, in training. Its batches
            are then not cut where memory is short, those of an evaluation neither: `--eval_batch_size` bounds these.
        reads_masks: whether it can be told which values of a window exist, as series shorter than the window ask for.
        is_trained: whether gradients train it; else its linear map is all that it has.
        linear_map: a map `[T, H]` of normalised windows that ridge regression fits before the first iteration.
        head_share: `[1]`, of a model that is trained beside a linear map: outside training this part of its forecast is its
            own, and the rest is `linear_forecast`.
        history: how many rows before a window it reads, too: the batch's `history`.
        notes: what texts beside the series do to its forecast; None without.
        prompts, mapping_layer: what writes prompts, and the layer whose gradient may come in factors; None without.
    """

    uses_llm = False
    channel_independent = True
    whole_batches = False
    reads_masks = False
    is_trained = True
    history = 0
    prompts: PromptEncoder | None = None
    linear_map: torch.Tensor | None
    head_share: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        # Made here, for what the class has would hide a module or a parameter of that name.
        self.mapping_layer: MappingLayer | None = None
        self.notes: NotesEffect | None = None
        self.register_buffer("linear_map", None)
        self.register_buffer("head_share", None)

    def __call__(self, batch, *rest):
        """`forward`; or, as the Time-Series-Library calls a model, windows `[B, history + T, N]`, their marks, the decoder's
        input (not read) and its marks -> forecasts `[B, H, N]`."""
        if isinstance(batch, Batch):
            return super().__call__(batch, *rest)
        x_mark, _, y_mark = (*rest, None, None, None)[:3]
        B, _, N = batch.shape
        x, channel = batch.transpose(1, 2).flatten(0, 1), torch.arange(N, device=batch.device).repeat(B)
        windows = None if self.channel_independent else Windows(batch, x_mark, y_mark, slice(None))
        return (
            super()
            .__call__(Batch(x[:, self.history :], x[:, :0], windows=windows, history=x[:, : self.history], channel=channel))
            .view(B, N, -1)
            .transpose(1, 2)
        )

    def forward(self, batch: Batch, prototype_kv: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
        """M sequences, and what `prototype_kv` gave (None: made here) -> forecasts `[M, H]` on the series' own scale."""
        raise NotImplementedError

    def prototype_kv(self) -> tuple[torch.Tensor, ...]:
        """What all sequences share, made once a step or an evaluation; gradients come back to it once."""
        return ()

    def linear_forecast(self, batch: Batch) -> torch.Tensor:
        """Forecasts `[M, H]` of the linear map alone."""
        assert self.linear_map is not None
        z, mean, std = instance_norm(batch.x, batch.x_mask)  # (M, T), (M, 1), (M, 1)
        with torch.autocast(z.device.type, enabled=False):
            return z @ self.linear_map * std + mean

    def with_notes(self, batch: Batch, forecast: torch.Tensor) -> torch.Tensor:
        """A forecast `[M, H]`, and what the batch's notes add to it."""
        if self.notes is None or batch.notes is None:
            return forecast
        with torch.autocast(forecast.device.type, enabled=False):
            return forecast.float() + self.notes(forecast.float(), batch.x, batch.channel, batch.notes)

    def gradients(self) -> Iterator[torch.Tensor]:
        """What a backward pass has left, tensor by tensor; of the mapping layer's weight, whose gradient may be in two
        factors, the one that is not frozen."""
        yield from (parameter.grad for parameter in self.parameters() if parameter.grad is not None)
        if self.mapping_layer is not None and self.mapping_layer.gradient_factor is not None:
            yield self.mapping_layer.gradient_factor

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.mapping_layer is not None:
            self.mapping_layer.gradient_factor = None

    def path(self) -> str:
        """How it runs, for the log; empty where there is but one way."""
        return ""
