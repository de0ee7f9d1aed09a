"""The frozen language model: found, checked, loaded, and run over prompts and patches.

One builder serves every language model through transformers' Auto classes; what differs between
them stands in `FAMILIES`. Source: Time-LLM, section 3.1 ("frozen backbone").
"""

import contextlib
import hashlib
import importlib.util
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layers.errors import InputError
from layers.lean import make_lean
from layers.prefix_cache import ATTENTION, PrefixCache, PrefixStored, additive_mask, prefix_attention

ROOT = Path(__file__).resolve().parents[1]
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, prefix_attention)


@dataclass(frozen=True)
class Family:
    """What one `--llm_model` name stands for."""

    model_type: str  # how the model types of its configurations begin
    hub_id: str  # fetched where no folder is given or found
    causal: bool | None = True  # None: as the configuration's architecture says
    options: tuple[tuple[str, object], ...] = ()  # further arguments of from_pretrained


FAMILIES = {
    "QWEN": Family("qwen", "Qwen/Qwen2.5-3B"),
    "LLAMA": Family("llama", "huggyllama/llama-7b"),
    "GPT2": Family("gpt2", "openai-community/gpt2"),
    "BERT": Family(
        "bert", "google-bert/bert-base-uncased", causal=False, options=(("add_pooling_layer", False),)
    ),
    "AUTO": Family("", "", causal=None),
}


@dataclass(frozen=True)
class BackboneInfo:
    """What a model folder says of itself, read without its weights."""

    family: Family
    folder: Path
    hidden_size: int
    vocab_size: int
    layers: int
    max_positions: int
    causal: bool
    identity: dict  # name, shape and fingerprint of the files, the same wherever the folder lies


def find_backbone(name: str, path: str | None) -> BackboneInfo:
    """Find a language model's folder and read its shape; no weight is read.

    Args:
        name: a key of FAMILIES (`--llm_model`).
        path: a folder or a hub id (`--llm_model_path`); None looks in base_models/, then on the hub.

    Raises:
        InputError: folder, configuration, tokenizer or safetensors files missing or unreadable.
    """
    family = FAMILIES[name]
    folder = _local_folder(family, path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--llm_model_path {folder}: config.json cannot be used ({_first_line(error)})"
        ) from error
    if not config.model_type.startswith(family.model_type):
        raise InputError(
            f"--llm_model {name}: found a model of type {config.model_type} in {folder}, "
            f"need {family.model_type}; name its own family ({', '.join(FAMILIES)})"
        )
    shards = _weight_files(folder, family)
    if not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"--llm_model_path {folder}: found no tokenizer_config.json; a tokenizer is needed")
    # GPT2 names its positions differently; the attribute map of its config knows both names.
    positions = getattr(config, "max_position_embeddings", None) or 2**31
    return BackboneInfo(
        family=family,
        folder=folder,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=config.num_hidden_layers,
        max_positions=positions,
        causal=_is_causal(config) if family.causal is None else family.causal,
        identity={
            "llm_model": name,
            "model_type": config.model_type,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "fingerprint": _fingerprint(folder, shards),
        },
    )


def _is_causal(config) -> bool:
    """Whether a configuration is that of a decoder, by the names of its architectures."""
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])


def _local_folder(family: Family, path: str | None) -> Path:
    if path is not None and Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    default = ROOT / "base_models" / family.hub_id.split("/")[-1]
    if path is None and default.is_dir():
        return default
    looks_like_hub_id = path is None or (path.count("/") <= 1 and not path.startswith((".", "/", "~")))
    hub_id = path or family.hub_id
    if looks_like_hub_id:
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
            )
        except Exception as error:  # the hub client raises dozens of types; each means: not to be had
            reason = _first_line(error)
    else:
        hub_id, reason = family.hub_id, "no such folder"
    looked = default if path is None else path
    raise InputError(
        f"--llm_model_path: found no weights in {looked} ({reason}); fetch them with: "
        f"hf download {hub_id} --local-dir {default}"
    )


def _weight_files(folder: Path, family: Family) -> list[Path]:
    """The safetensors files of a folder; every file that an index names must be there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
    if any(Path(name).name != name for name in names):
        raise InputError(f"--llm_model_path {folder}: {index.name} names a file outside of the folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        found = f"no {missing[0]}" if missing else "no *.safetensors file"
        raise InputError(
            f"--llm_model_path {folder}: found {found}; safetensors weights are needed (others are not "
            f"loaded): hf download {family.hub_id} --local-dir {folder}"
        )
    return [folder / name for name in names]


def _fingerprint(folder: Path, shards: list[Path]) -> str:
    """SHA-256 over the configuration and each shard's size, header and last 64 KiB: cheap, yet any
    other weights of the same shape differ in it."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in shards:
        with shard.open("rb") as file:
            digest.update(str(shard.stat().st_size).encode())
            digest.update(file.read(int.from_bytes(file.read(8), "little")))
            file.seek(max(0, shard.stat().st_size - 65536))
            digest.update(file.read())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require_bitsandbytes() -> None:
    """Raises InputError where 4-bit weights are asked for and bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--load_in_4bit: found no bitsandbytes; install it with: pip install bitsandbytes")


class Backbone:
    """A frozen language model of `layers` layers. Not an nn.Module: it is neither trained nor saved.

    Attributes:
        embeddings: `[V, D]` input embeddings, never quantised.
        causal: whether the fast path is possible.
    """

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
        self.causal = info.causal
        self.four_bit = four_bit
        self.tokenizer = AutoTokenizer.from_pretrained(info.folder, trust_remote_code=False)
        self.model = _load(info, layers, torch.device(device), four_bit)
        self.model.requires_grad_(False).eval()
        self.embeddings = self.model.get_input_embeddings().weight  # (V, D)
        config = self.model.config
        if recompute:
            _recompute_layers(self.model)
        make_lean(self.model, lambda: config._attn_implementation == ATTENTION)
        self._groups = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        self._cache = PrefixCache(layers)
        self._opening: list[int] = []  # whose keys and values the cache holds

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

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
        hidden = self._forward("sdpa", inputs, real.long(), (real.cumsum(1) - 1).clamp(min=0))
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
            self._store(ids, additive_mask(visible, self._groups, self.dtype), (P0 + row)[None])
            slot = torch.arange(slots, device=ids.device)[None, None]
            step = torch.arange(L, device=ids.device)[None, :, None]
            prompt = slot < P0 + length[:, None, None]
            earlier = (slot >= P0 + n) & (slot <= P0 + n + step)
            mask = additive_mask(prompt | earlier, self._groups, self.dtype)  # (M, 1, g*L, slots)
        self._cache.place(P0 + n, slots)
        positions = P0 + length[:, None] + torch.arange(L, device=ids.device)  # (M, L)
        return self._forward(ATTENTION, patches.to(self.dtype), mask, positions).to(patches.dtype)

    def bytes_per_sequence(self, patches: int, prompt: int, fast: bool, recompute: bool = False) -> int:
        """About what a training step holds for one sequence while it runs backward, in bytes.

        Counted are the tensors that the layers keep for their gradients: on the fast path those of the
        patches and the keys and values of all slots; on the plain path those of all tokens.
        """
        config = self.model.config
        D, layers = self.hidden_size, config.num_hidden_layers
        inner = getattr(config, "intermediate_size", None) or 4 * D
        slots = prompt + patches
        if fast:  # residual stream twice, queries, attention's result; gate and up; keys and values
            kept = patches * (4 * D + 2 * inner) + slots * 2 * D // self._groups
        else:  # besides, in both norms two float32 copies, the activation, expanded keys and values
            kept = slots * (14 * D + 3 * inner)
        if recompute:  # each layer's input; one layer at a time holds the rest
            once_more, kept = kept, (patches if fast else slots) * D + fast * slots * 2 * D // self._groups
        else:
            once_more = 0
        once = once_more + slots * 4 * D + patches * (2 * D + 2 * inner)  # one layer at work, and the embedding
        return (kept * layers + once) * self.embeddings.element_size()

    def _hold_opening(self, opening: list[int]) -> None:
        """Compute the opening's keys and values, unless the cache holds them."""
        if opening == self._opening:
            return
        self._cache.store_opening()
        with torch.inference_mode(False), torch.no_grad():
            ids = torch.tensor([opening], device=self.device)
            row = torch.arange(len(opening), device=self.device)
            mask = additive_mask(row[None, None] <= row[None, :, None], self._groups, self.dtype)
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
        require_bitsandbytes()
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
