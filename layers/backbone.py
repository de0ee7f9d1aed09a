"""The frozen language model: loaded, and run over prompts and patches.

One builder serves every language model through transformers' Auto classes.
Source: Time-LLM, section 3.1 ("frozen backbone").
"""

import contextlib
import importlib.util
import sys
from functools import partial

import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layers.backbone_files import BackboneInfo
from layers.errors import InputError
from layers.frozen_linear import give_matrices
from layers.lean import make_lean
from layers.prefix_attention import ATTENTION, additive_mask, prefix_attention
from layers.prefix_cache import PrefixCache, PrefixStored

ALL_ATTENTION_FUNCTIONS.register(ATTENTION, prefix_attention)


def require_bitsandbytes(flag: str) -> None:
    """Raises InputError where `flag` needs bitsandbytes and it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--{flag}: found no bitsandbytes; install it with: pip install bitsandbytes")


class Backbone:
    """A frozen language model of `layers` layers. Not an nn.Module: it is neither trained nor saved.

    Attributes:
        embeddings: `[V, D]` input embeddings, never quantised.
        causal: whether a token sees those before it alone, which the fast path needs.
        window: how far back it sees; None: to the start. The fast path knows no window.
        plain_attention: which of transformers' attention functions the plain path uses.
    """

    plain_attention = "sdpa"

    def __init__(
        self,
        info: BackboneInfo,
        layers: int,
        device: torch.device | str = "cpu",
        four_bit: bool = False,
        recompute: bool = False,
    ):
        """Read the first `layers` layers. float32 on the CPU, bfloat16 on CUDA and with `four_bit`.

        Args:
            recompute: keep only each layer's input for the backward pass, and run the layer again there.

        Raises:
            InputError: more layers than there are, or weights that the folder lacks.
        """
        self.info = info
        self.hidden_size, self.vocab_size = info.hidden_size, info.vocab_size
        self.max_positions, self.causal, self.tokenizer = info.max_positions, info.causal, info.tokenizer
        self.window = info.window
        self.model = _load(info, layers, torch.device(device), four_bit)
        self.model.requires_grad_(False).eval()
        self.embeddings = self.model.get_input_embeddings().weight  # (V, D)
        config = self.model.config
        self._recompute = recompute
        if recompute:
            _recompute_layers(self.model)
        else:  # who recomputes is short of memory
            give_matrices(self.model)
        make_lean(self.model, lambda: config._attn_implementation == ATTENTION)
        self.groups = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        self._cache = PrefixCache(layers)
        self._opening: list[int] | None = []  # whose keys and values the cache holds

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward block."""
        return getattr(self.model.config, "intermediate_size", None) or 4 * self.hidden_size

    def plain(
        self, opening: list[int], ids: torch.Tensor, length: torch.Tensor, patches: torch.Tensor
    ) -> torch.Tensor:
        """The whole sequence with gradients, through transformers' own masks and attention.

        Args:
            opening: token ids that every sequence starts with.
            ids: `[M, n]` right-padded ids that follow, of which the first `length[m]` count.
            patches: `[M, L, D]`.

        Returns:
            `[M, L, D]` last hidden states at the patches, in the patches' type.
        """
        M, L, _ = patches.shape
        first = torch.tensor(opening, dtype=torch.long, device=ids.device).expand(M, -1)
        words = self.model.get_input_embeddings()(torch.cat([first, ids], dim=1))  # (M, P0 + n, D)
        inputs = torch.cat([words, patches.to(self.dtype)], dim=1)
        slot = torch.arange(inputs.shape[1], device=ids.device)[None]
        start, stop = len(opening), len(opening) + ids.shape[1]
        real = (slot < start + length[:, None]) | (slot >= stop)  # (M, P0 + n + L), no padding
        hidden = self._forward(self.plain_attention, inputs, real.long(), (real.cumsum(1) - 1).clamp(min=0))
        return hidden[:, -L:].to(patches.dtype)

    def fast(
        self, opening: list[int], ids: torch.Tensor, length: torch.Tensor, patches: torch.Tensor
    ) -> torch.Tensor:
        """As `plain`, but only the patches run with gradients, on top of the prompt's keys and values."""
        (_, L, _), n, P0 = patches.shape, ids.shape[1], len(opening)
        slots = P0 + n + L
        with torch.no_grad():
            self._hold_opening(opening)
            row = torch.arange(n, device=ids.device)
            # Padding comes last, so causality alone hides it from the real tokens.
            visible = torch.arange(P0 + n, device=ids.device)[None, None] <= P0 + row[None, :, None]
            self._cache.place(P0, slots)
            self._store(ids, additive_mask(visible, self.groups, self.dtype), (P0 + row)[None])
            slot = torch.arange(slots, device=ids.device)[None, None]
            step = torch.arange(L, device=ids.device)[None, :, None]
            prompt = slot < P0 + length[:, None, None]
            earlier = (slot >= P0 + n) & (slot <= P0 + n + step)
            mask = additive_mask(prompt | earlier, self.groups, self.dtype)  # (M, 1, g*L, slots)
        self._cache.place(P0 + n, slots)
        positions = P0 + length[:, None] + torch.arange(L, device=ids.device)  # (M, L)
        return self._forward(ATTENTION, patches.to(self.dtype), mask, positions).to(patches.dtype)

    def bytes_per_sequence(self, patches: int, prompt: int, fast: bool, recompute: bool = False) -> int:
        """About what a training step holds for one sequence while it runs backward, in bytes.

        Counted are the tensors that the layers keep for their gradients: on the fast path those of the
        patches and the keys and values of all slots; on the plain path those of all tokens.
        """
        D, layers, inner = self.hidden_size, self.model.config.num_hidden_layers, self.inner_size
        slots = prompt + patches
        if fast:  # residual stream twice, queries, attention's result; gate and up; keys and values
            kept = patches * (4 * D + 2 * inner) + slots * 2 * D // self.groups
        else:  # besides, in both norms two float32 copies, the activation, expanded keys and values
            kept = slots * (14 * D + 3 * inner)
        if recompute:  # each layer's input; one layer at a time holds the rest
            once_more, kept = kept, (patches if fast else slots) * D + fast * slots * 2 * D // self.groups
        else:
            once_more = 0
        once = once_more + slots * 4 * D + patches * (2 * D + 2 * inner)  # one layer at work, and the embedding
        return (kept * layers + once) * self.embeddings.element_size()

    def _hold_opening(self, opening: list[int]) -> None:
        """Compute the opening's keys and values, unless the cache holds them."""
        if opening == self._opening:
            return
        self._cache.store_opening()
        self._opening = None  # until all of it is there: the pass may run out of memory
        with torch.inference_mode(False), torch.no_grad():
            ids = torch.tensor([opening], dtype=torch.long, device=self.device)
            row = torch.arange(len(opening), device=self.device)
            mask = additive_mask(row[None, None] <= row[None, :, None], self.groups, self.dtype)
            if opening:
                self._store(ids, mask, row[None])
        self._opening = list(opening)

    def _store(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> None:
        """Run the prefix tokens `[M, n]` as far as their last keys and values, which the cache keeps."""
        with contextlib.suppress(PrefixStored):
            self._forward(ATTENTION, self.model.get_input_embeddings()(ids), mask, positions)

    def _forward(self, attention: str, inputs: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor):
        self.model.config._attn_implementation = attention
        return self.model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache if attention == ATTENTION else None,
            use_cache=False,
        ).last_hidden_state

    def to(self, device: torch.device) -> "Backbone":
        """Move to another device; what was computed on the old one is forgotten."""
        self.model.to(device)
        self.embeddings = self.model.get_input_embeddings().weight
        if not self._recompute:
            give_matrices(self.model)
        self._cache, self._opening = PrefixCache(self.model.config.num_hidden_layers), []
        return self


def _recompute_layers(model: torch.nn.Module) -> None:
    """Run every layer under activation checkpointing. (transformers' own switch asks for train mode.)"""
    layers = next(
        child
        for child in model.modules()
        if isinstance(child, torch.nn.ModuleList) and len(child) == model.config.num_hidden_layers
    )
    for layer in layers:
        # Nothing random happens in a frozen layer, so no generator's state needs to be kept.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def _load(info: BackboneInfo, layers: int, device: torch.device, four_bit: bool) -> torch.nn.Module:
    if layers > info.layers:
        raise InputError(f"--llm_layers: found {layers}, need at most {info.layers}, all that {info.folder} has")
    config = AutoConfig.from_pretrained(info.folder, trust_remote_code=False)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    dtype = torch.bfloat16 if four_bit or device.type == "cuda" else torch.float32
    options = dict(info.family.options)
    if four_bit:
        require_bitsandbytes("load_in_4bit")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    # The layers left out are reported as unexpected; that report would only alarm. What is missing
    # is checked below.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        model, found = AutoModel.from_pretrained(
            info.folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    for module in model.modules():
        # Where the processor has bf16 instructions, bitsandbytes repacks a CPU layer's weights at its
        # first pass without gradient, and from then on returns results that carry none.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if found["missing_keys"]:
        raise InputError(f"--llm_model_path {info.folder}: found no weights for {sorted(found['missing_keys'])[0]}")
    return model
