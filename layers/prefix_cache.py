"""Keys and values of a frozen prefix, and attention over them.

A causal backbone's keys and values at the prompt's positions do not depend on what follows. So they
are computed without gradient, and only the patches run with gradients on top of them. For each layer
one buffer holds all slots of a batch, `[opening | statistics | patches]`: the opening is copied into
it when the buffer is made, the other two are written where they belong, and attention reads views.
"""

import torch
from transformers.cache_utils import DynamicCache

BLOCK = 16  # buffers grow by whole blocks of slots, so that a slightly longer batch reuses them


class _Layer:
    """One layer's buffers: keys and values `[M, kv, slots, e]`, and the opening's `[1, kv, P0, e]`."""

    def __init__(self):
        self.opening: tuple[torch.Tensor, torch.Tensor] | None = None
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def reserve(self, like: torch.Tensor, sequences: int, slots: int) -> None:
        """Make the buffers hold `sequences` x `slots`, the opening in front."""
        if self.buffers is not None:
            held = self.buffers[0]
            if held.shape[0] >= sequences and held.shape[2] >= slots and held.dtype == like.dtype:
                return
            sequences, slots = max(sequences, held.shape[0]), max(slots, held.shape[2])
            self.buffers = held = None  # freed before the larger ones are made
        slots = -(-slots // BLOCK) * BLOCK
        _, heads, _, width = like.shape
        # A buffer made in inference mode could not be used by a training step later.
        with torch.inference_mode(False), torch.no_grad():
            self.buffers = tuple(like.new_empty(sequences, heads, slots, width) for _ in range(2))
            if self.opening is not None:
                for buffer, opening in zip(self.buffers, self.opening, strict=True):
                    buffer[:, :, : opening.shape[2]] = opening


class _Append(torch.autograd.Function):
    """Write new keys (or values) behind the frozen ones and return all: `[M, kv, start + n, e]`."""

    @staticmethod
    def forward(ctx, new: torch.Tensor, buffer: list[torch.Tensor], start: int) -> torch.Tensor:
        ctx.start = start
        stop = start + new.shape[2]
        held = buffer[0][: new.shape[0], :, :stop]
        held[:, :, start:] = new
        return held.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient[:, :, ctx.start :], None, None  # nothing flows into the frozen prefix


class PrefixStored(Exception):
    """The last layer's keys and values of the prefix are stored; nothing after them is needed."""


class PrefixCache(DynamicCache):
    """The cache that transformers' attention layers call `update` on."""

    def __init__(self, layers: int):
        super().__init__()
        self._layers = [_Layer() for _ in range(layers)]
        self._start = 0  # slot where the next tokens go
        self._slots = 0  # slots that this batch will need in all; 0: the tokens are the opening

    def store_opening(self) -> None:
        """The tokens of the next forward pass are the opening; what was held is dropped."""
        self._layers = [_Layer() for _ in self._layers]
        self._start = self._slots = 0

    def place(self, start: int, slots: int) -> None:
        """The tokens of the next forward pass go to slots `start` and following, of `slots` in all."""
        self._start, self._slots = start, slots

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """New keys and values `[M, kv, n, e]` -> those of all slots up to theirs.

        Raises:
            PrefixStored: the tokens are a prefix and this is the last layer. Its attention and what
                follows would be thrown away; leaving here works for every language model alike.
        """
        layer = self._layers[layer_idx]
        if not self._slots:
            layer.opening = (key_states, value_states)
            keys_values = layer.opening
        else:
            layer.reserve(key_states, key_states.shape[0], self._slots)
            # The buffer goes in inside a list: autograd must see it as storage, not as an input.
            keys_values = tuple(
                _Append.apply(new, [buffer], self._start)
                for new, buffer in zip((key_states, value_states), layer.buffers, strict=True)
            )
        is_prefix = not self._slots or self._start + key_states.shape[2] < self._slots
        if is_prefix and layer_idx == len(self._layers) - 1:
            raise PrefixStored
        return keys_values
