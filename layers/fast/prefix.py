"""The pass of the patches over a frozen prefix, and the cache that holds the prefix's keys and values.

The picture of the slots `[prefix | statistics | patches]` stands in `layers.fast`.
Shapes: M sequences, L patches, D the decoder's width, P0 tokens of the prompt prefix, n of the longest statistics;
kv key-value heads of width e, g query heads for each.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from layers.backbone import Backbone, first_line, unusable
from layers.fast.attention import additive_mask
from layers.fast.decoder import make_twin
from layers.fast.linear import PACKED_BYTES, FrozenLinear

BLOCK = 16  # buffers grow by whole blocks of slots, so that a slightly longer batch reuses them
EXACT, ROUNDED = 1e-4, 0.1  # how far the paths may be apart, in float32 and in half the bits; see `choose_path`

# (ids of the prompt prefix, ids [M, n], their lengths [M], patches [M, L, D]) -> last hidden states at the patches [M, L, D]
LanguageModel = Callable[[list[int], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def choose_path(
    backbone: Backbone, prompt_prefix: list[int], statistics: int, patches: int, fast: bool
) -> tuple[LanguageModel, str]:
    """The fast path, where it runs and computes what `backbone.plain` does; else that one, and why (empty: not asked for).

    Both run two samples: a short one, in which an error is larger than rounding, and one of the run's own length.

    Args:
        prompt_prefix, statistics, patches: of a run's longest prompt the ids that all share, how many tokens follow, and
            how many patches.

    Raises:
        InputError: not even `backbone.plain` runs.
    """
    path, reason = None, ""
    for start, n, L in ((prompt_prefix[:2], 2, 2), (prompt_prefix, statistics, patches)):
        ids = (torch.arange(2 * (n + L)).view(2, -1) * 101 + 7) % backbone.vocab_size
        length, expected = torch.tensor([n, n // 2], device=backbone.device), None
        sample = backbone.token_embeddings(ids[:, n:])
        try:
            with torch.autocast(backbone.device.type, torch.float16, enabled=backbone.dtype == torch.float16):
                with torch.no_grad():
                    expected = backbone.plain(start, ids[:, :n], length, sample)
                if fast and not reason:
                    short, path = path is None, path or FastPath(backbone)
                    with torch.set_grad_enabled(short):  # the long sample's graph could take more memory than a run has
                        found = path(start, ids[:, :n], length, sample.requires_grad_(short))
                    if short:
                        found.sum().backward()
                    if not (difference := ((found - expected).norm() / expected.norm()).item()) <= (
                        EXACT if backbone.dtype == torch.float32 else ROUNDED
                    ):
                        reason = f"the fast path differs by {difference:.1e}"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture raises that nobody has thought of
            reason = f"the fast path does not run: {first_line(error)}"
            if expected is None:
                raise unusable(
                    backbone.info.folder,
                    f"a model of type {backbone.model.config.model_type} that does not run ({first_line(error)})",
                    "one that runs on token embeddings",
                ) from error
    return (backbone.plain if path is None or reason else path), reason


class FastPath:
    """Runs prompts without gradient and patches with it, called as `Backbone.plain` is.

    It holds a twin of the backbone's modules around the same tensors, and the keys and values of the last
    prompt prefix. Made for the device where the backbone is: when that has moved, make another.

    Attributes:
        model: the twin.
    """

    def __init__(self, backbone: Backbone):
        self.model = make_twin(backbone.model)
        layers: list[Any] = [module for module in self.model.modules() if type(module) in (nn.Linear, FrozenLinear)]
        small = sum(layer.weight.nbytes for layer in layers) <= PACKED_BYTES
        for layer in layers:
            layer.prepacked = small and not backbone.recompute  # who recomputes is short of memory
        self._backbone = backbone
        self._cache = PrefixCache(self.model.config.num_hidden_layers)
        self._prompt_prefix: list[int] | None = []  # whose keys and values the cache holds

    def __call__(
        self, prompt_prefix: list[int], ids: torch.Tensor, length: torch.Tensor, patches: torch.Tensor
    ) -> torch.Tensor:
        """The last hidden states `[M, L, D]` at the patches, in the patches' type.

        Args:
            prompt_prefix: token ids that every sequence starts with.
            ids: `[M, n]` right-padded ids that follow, of which the first `length[m]` count; on any device.
            patches: `[M, L, D]`.
        """
        (_, L, _), n, P0 = patches.shape, ids.shape[1], len(prompt_prefix)
        slots, device = P0 + n + L, patches.device
        with torch.no_grad():
            if prompt_prefix != self._prompt_prefix:
                self._cache.place(0, 0)
                self._prompt_prefix = None  # until all of it is there: the pass may run out of memory
                if prompt_prefix:
                    with torch.inference_mode(False), torch.no_grad():
                        self._store(torch.tensor([prompt_prefix]), 0, device)
                self._prompt_prefix = list(prompt_prefix)
            if n:
                self._cache.place(P0, slots)
                self._store(ids, P0, device)
            slot = torch.arange(slots, device=device)[None, None]
            step = torch.arange(L, device=device)[None, :, None]
            prompt = slot < P0 + length[:, None, None]
            earlier = (slot >= P0 + n) & (slot <= P0 + n + step)
            mask = additive_mask(prompt | earlier, self._backbone.groups, self._backbone.dtype)  # (M, 1, g*L, slots)
        self._cache.place(P0 + n, slots)
        positions = P0 + length[:, None] + torch.arange(L, device=device)  # (M, L)
        return self._run(patches.to(self._backbone.stream_dtype), mask, positions).to(patches.dtype)

    # Run prompt tokens `[M, n]` from slot `start` on as far as their last keys and values, which the cache keeps.
    def _store(self, ids: torch.Tensor, start: int, device: torch.device) -> None:
        places = start + torch.arange(ids.shape[1], device=device)  # (n)
        # Padding comes last, so causality alone hides it from the real tokens.
        visible = torch.arange(start + ids.shape[1], device=device) <= places[:, None]  # (n, start + n)
        mask = additive_mask(visible[None], self._backbone.groups, self._backbone.dtype)
        with contextlib.suppress(PrefixStored):
            self._run(self._backbone.token_embeddings(ids), mask, places[None])

    # Inputs `[M, n, D]` -> last hidden states `[M, n, D]`; their keys and values go into the cache.
    def _run(self, inputs: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=False,
        ).last_hidden_state


class PrefixStored(Exception):
    """The last layer's keys and values of the prefix are stored; nothing after them is needed."""


class PrefixCache(DynamicCache):
    """The cache that transformers' attention layers call `update` on."""

    def __init__(self, layers: int):
        super().__init__()
        self._layers = [_Layer() for _ in range(layers)]
        self._start = 0  # slot where the next tokens go
        self._slots = 0  # slots that this batch will need in all; 0: the tokens are the prompt prefix

    def place(self, start: int, slots: int) -> None:
        """The tokens of the next forward pass go to slots `start` and following, of `slots` in all; with 0 slots they are
        the prompt prefix, and what was held is dropped."""
        if not slots:
            self._layers = [_Layer() for _ in self._layers]
        self._start, self._slots = start, slots

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """New keys and values `[M, kv, n, e]` -> those of all slots up to theirs.

        Raises:
            PrefixStored: the tokens are a prefix and this is the last layer. Its attention and what
                follows would be thrown away; leaving here works for every language model alike.
        """
        layer = self._layers[layer_idx]
        if not self._slots:
            layer.prompt_prefix = keys_values = (key_states, value_states)
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


# One layer's buffers: keys and values `[M, kv, slots, e]`, and the prompt prefix's `[1, kv, P0, e]`.
@dataclass
class _Layer:
    prompt_prefix: tuple[torch.Tensor, torch.Tensor] | None = None
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def reserve(self, like: torch.Tensor, sequences: int, slots: int) -> None:
        """Make the buffers hold `sequences` x `slots`, the prompt prefix in front."""
        if self.buffers is not None:
            held = self.buffers[0]
            if held.shape[0] >= sequences and held.shape[2] >= slots and held.dtype == like.dtype:
                return
            sequences, slots = max(sequences, held.shape[0]), max(slots, held.shape[2])
            del held
            self.buffers = None  # freed before the larger ones are made
        slots = -(-slots // BLOCK) * BLOCK
        _, heads, _, width = like.shape
        # A buffer made in inference mode could not be used by a training step later.
        with torch.inference_mode(False), torch.no_grad():
            keys, values = (like.new_empty(sequences, heads, slots, width) for _ in range(2))
            self.buffers = keys, values
            if self.prompt_prefix is not None:
                for buffer, prompt_prefix in zip(self.buffers, self.prompt_prefix, strict=True):
                    buffer[:, :, : prompt_prefix.shape[2]] = prompt_prefix


# Write new keys (or values) behind the frozen ones and return all: `[M, kv, start + n, e]`.
class _Append(torch.autograd.Function):
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
