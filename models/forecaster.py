"""What the loop asks of a model, whichever it is: the base class of every ``models/X.py``.

Shapes: B windows, N channels, M = B*N sequences, T = seq_len, H = pred_len.
"""

from collections.abc import Iterator

import torch
from torch import nn

from data_provider.batches import Sequences
from layers.mapping import MappingLayer
from layers.prompt import PromptEncoder


class Forecaster(nn.Module):
    """A model that the loop can train, score, save and forecast with.

    Attributes:
        uses_llm: whether it is built around a language model; `Model(configs, backbone, prompts)` then, else
            `Model(configs)`.
        channel_independent: whether each channel is forecast from itself alone. Then `forward` is called with N = 1 and
            M sequences; else with whole windows and their time marks.
        whole_batches: whether what it computes of a window depends on the others of its batch, in training. Its batches
            are then not cut where memory is short, those of an evaluation neither: `--eval_batch_size` bounds these.
        reads_masks: whether it can be told which values of a window exist, as series shorter than the window ask for.
        is_trained: whether gradients train it; else its linear map is all that it has.
        linear_map: a map `[T, H]` of normalised windows that ridge regression fits before the first iteration.
        prompts, mapping_layer: what writes prompts, and the layer whose gradient may come in factors; None without.
    """

    uses_llm = False
    channel_independent = True
    whole_batches = False
    reads_masks = False
    is_trained = True
    prompts: PromptEncoder | None = None
    linear_map: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        # Made here, for what the class has would hide a module or a parameter of that name.
        self.mapping_layer: MappingLayer | None = None
        self.register_buffer("linear_map", None)

    def shared(self) -> tuple[torch.Tensor, ...]:
        """What all sequences share, made once a step or an evaluation; gradients come back to it once."""
        return ()

    def forecast_part(self, part: Sequences, shared: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Sequences, and what `shared` gave -> forecasts `[M, H]` on the series' own scale."""
        if self.channel_independent:
            return self(part.x[:, :, None])[..., 0]
        assert part.windows is not None, "the loader makes no windows for this model"
        x, x_mark, y_mark, channels = part.windows
        return self(x, x_mark, None, y_mark)[..., channels].transpose(1, 2).flatten(0, 1)

    def gradients(self) -> Iterator[torch.Tensor]:
        """What a backward pass has left, tensor by tensor."""
        yield from (parameter.grad for parameter in self.parameters() if parameter.grad is not None)

    def path(self) -> str:
        """How it runs, for the log; empty where there is but one way."""
        return ""
