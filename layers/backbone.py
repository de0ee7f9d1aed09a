"""The frozen language model: its folder found and checked, loaded, and run over prompts and patches (Time-LLM, section 3.1).

What differs between the language models stands in `FAMILIES`; one builder serves all through transformers' Auto classes.
Shapes: M sequences, L patches, n tokens, D the language model's width, V its vocabulary.
"""

import copy
import hashlib
import importlib.util
import inspect
import json
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from layers.errors import InputError, input_error
from layers.fp16 import make_safe

ROOT = Path(__file__).resolve().parents[1]


# What one `--llm_model` name stands for: how the model types of its configurations begin; what is fetched where no folder
# is given or found.
Family = namedtuple("Family", "model_type hub_id")
FAMILIES = {
    "QWEN": Family("qwen", "Qwen/Qwen2.5-3B"),
    "LLAMA": Family("llama", "huggyllama/llama-7b"),
    "GPT2": Family("gpt2", "openai-community/gpt2"),
    "BERT": Family("bert", "google-bert/bert-base-uncased"),
    "AUTO": Family("", ""),
}


@dataclass(frozen=True)
class BackboneInfo:
    """What a model folder says of itself, read without its weights."""

    folder: Path
    hidden_size: int  # of its token embeddings; ALBERT's layers, among others, are wider
    vocab_size: int
    layers: int
    heads: int
    max_positions: int
    window: int  # of sliding or chunked attention: how many tokens back one sees
    dequantised: bool  # whether the files' weights are quantised, and become whole ones
    tokenizer: transformers.PreTrainedTokenizerBase
    identity: dict  # name, shape and fingerprint of the files, the same wherever the folder lies
    note: str = ""  # where the weights come from, where the folder says so


def find_backbone(name: str, path: str | None) -> BackboneInfo:
    """Find a language model's folder and check it; no weight is read.

    Args:
        name: a key of FAMILIES (`--llm_model`).
        path: a folder or a hub id (`--llm_model_path`); None looks in base_models/, then on the hub.

    Raises:
        InputError: folder, configuration, tokenizer or safetensors files missing or unreadable.
    """
    family = FAMILIES[name]
    folder = _find_folder(family, path)
    config = _read_config(name, family, folder)
    fingerprint = _fingerprint(folder, family)
    if not (folder / "tokenizer_config.json").is_file():
        raise unusable(folder, "no tokenizer_config.json", "a tokenizer beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # From a configuration alone transformers makes a tokenizer to which every text is empty.
        tokenizer("0 statistics", add_special_tokens=False)["input_ids"][0]
    except Exception as error:  # the Rust reader raises plain Exceptions
        raise unusable(folder, f"a tokenizer that cannot be used ({first_line(error)})", "a readable one") from error
    # Old folders of bitsandbytes do not name it.
    quantised = (getattr(config, "quantization_config", None) or {"quant_method": None}).get("quant_method", "bitsandbytes")
    if quantised == "bitsandbytes":
        require_bitsandbytes("llm_model_path")
    elif quantised not in (None, "fp8"):
        raise unusable(
            folder,
            f"weights quantised by {quantised}",
            "whole ones, or such of bitsandbytes or fp8",
            "give the model that it was made from, with --load_in_4bit if needed",
        )
    outline = _outline(folder, config)
    vocab_size, hidden_size = outline.get_input_embeddings().weight.shape
    # RoBERTa and its like count positions from the one behind the padding's.
    named = ((name, getattr(module, "padding_idx", None)) for name, module in outline.named_modules())
    skipped = max((index + 1 for name, index in named if "position" in name and index is not None), default=0)
    kinds = getattr(config, "layer_types", None)
    windows = [getattr(config, name, None) or 2**31 for name in ("sliding_window", "window_size", "attention_chunk_size")]
    # GPT2 names its positions differently; the attribute map of its config knows both names. MPT's does not.
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or -1
    about = folder / "backbone.json"  # of scripts/get_backbone.py and make_backbone.py
    return BackboneInfo(
        folder=folder,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        layers=config.num_hidden_layers,
        heads=getattr(config, "num_attention_heads", None) or 1,  # Mamba has none
        max_positions=positions - skipped if positions > 0 else 2**31,  # XLNet's -1: as many as there are
        window=min(windows) if kinds is None or any("full" not in kind for kind in kinds) else 2**31,
        dequantised=quantised == "fp8",
        tokenizer=tokenizer,
        identity={
            "llm_model": name,
            "model_type": config.model_type,
            "hidden_size": hidden_size,
            "vocab_size": vocab_size,
            "fingerprint": fingerprint,
        },
        note=json.loads(about.read_text(encoding="utf-8")).get("note", "") if about.is_file() else "",
    )


def _find_folder(family: Family, path: str | None) -> Path:
    """The folder on this disk, or that of what the hub has, fetched unless the hub's cache holds it.

    Raises:
        InputError: `path` is no folder, and names nothing on the hub either.
    """
    local = ROOT / "base_models" / family.hub_id.split("/")[-1] if path is None else Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_file() or (path and path.lower().endswith(".gguf")):
        raise input_error(
            "--llm_model_path",
            f"the file {path}",
            "a folder with safetensors weights or a hub id",
            "give the model that it was made from",
        )
    hub_id = path or family.hub_id
    first, slash, rest = hub_id.partition("/")
    # A hub id is `owner/name`, where no folder `owner` is here.
    is_file_path = "/" in rest or hub_id.startswith((".", "/", "~"))
    if is_file_path or (path and slash and (first == "base_models" or Path(first).is_dir())):
        raise input_error(
            "--llm_model_path",
            f"no weights in {path} (no such folder)",
            "a model folder or a hub id",
            _fetch(family, local),
        )
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the hub client raises dozens of types; each means: there is no such model to fetch
        place = ROOT / "base_models" / hub_id.split("/")[-1]
        raise input_error(
            "--llm_model_path",
            f"no weights in {path or place} ({first_line(error)})",
            "a model folder or a hub id",
            f"see that the name is right and the network there, or fetch it by: hf download {hub_id} --local-dir {place}",
        ) from error


# How to fill a folder: with its family's model where it has that one's name; else with what its user took it for.
def _fetch(family: Family, folder: Path) -> str:
    if folder.parent.name == "snapshots":  # the hub's own cache
        return f"fetch it again: hf download {folder.parents[1].name.removeprefix('models--').replace('--', '/')}"
    hub_id = family.hub_id if folder.name == family.hub_id.split("/")[-1] else "<hub id>"
    return f"fetch the model's files: hf download {hub_id} --local-dir {folder}"


def _read_config(name: str, family: Family, folder: Path) -> PreTrainedConfig:
    """A folder's configuration.

    Raises:
        InputError: it cannot be read, is of another family than `name`, or not that of a language model of text.
    """
    if not (folder / "config.json").is_file():
        got, hint = "no config.json", _fetch(family, folder)
        if (folder / "adapter_config.json").is_file():
            got, hint = "a LoRA adapter alone", "merge it into its model (peft's merge_and_unload) and save that"
        elif any(folder.glob("*.gguf")):
            got, hint = "GGUF files alone", "give the folder of the model that they were made from"
        raise unusable(folder, got, "a language model's configuration beside safetensors weights", hint)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StrictDataclassError) as error:
        raise unusable(folder, f"a config.json that cannot be used ({first_line(error)})", "a readable one") from error
    if not config.model_type.startswith(family.model_type):
        raise input_error(
            f"--llm_model {name}",
            f"a model of type {config.model_type} in {folder}",
            family.model_type,
            f"name its own family ({', '.join(FAMILIES)})",
        )
    sizes = [getattr(config, size, None) for size in ("hidden_size", "vocab_size", "num_hidden_layers")]
    nested = config.is_encoder_decoder or config.get_text_config() is not config
    if nested or not all(isinstance(size, int) for size in sizes):
        raise unusable(folder, f"a model of type {config.model_type}", "a text-only language model (decoder or encoder)")
    return config


def _outline(folder: Path, config: PreTrainedConfig) -> Any:
    """The architecture in one layer, without memory for its weights.

    Raises:
        InputError: transformers cannot build it, or it does not take token embeddings in the place of token ids.
    """
    expected = "a language model that runs on token embeddings and a mask"
    try:
        with torch.device("meta"):
            outline = AutoModel.from_config(_first_layers(copy.deepcopy(config), 1))
    except Exception as error:  # each architecture asks for its own packages and sizes, in its own way
        raise unusable(
            folder, f"a model of type {config.model_type} that cannot be built ({first_line(error)})", expected
        ) from error
    if not {"inputs_embeds", "attention_mask"} <= inspect.signature(outline.forward).parameters.keys():
        raise unusable(folder, f"a model of type {config.model_type}", expected)
    return outline


def _fingerprint(folder: Path, family: Family) -> str:
    """SHA-256 over the configuration and each safetensors file's size, header and last 64 KiB: cheap, yet any
    other weights of the same shape differ in it.

    Raises:
        InputError: a file is missing, or is cut short.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise unusable(folder, f"{index.name} that cannot be read ({error!r})", "a weight_map in it") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise unusable(
            folder,
            f"no {missing[0]}" if missing else "no *.safetensors file",
            "safetensors weights (others are not loaded)",
            _fetch(family, folder),
        )
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in [folder / name for name in names]:
        size = shard.stat().st_size
        try:
            with safe_open(shard, framework="pt"):  # compares the header with the size
                pass
        except (SafetensorError, OSError) as error:
            raise unusable(
                folder, f"{shard.name} cut short or damaged ({size:,} bytes)", "the whole file", "fetch it again"
            ) from error
        with shard.open("rb") as file:
            digest.update(str(size).encode())
            digest.update(file.read(int.from_bytes(file.read(8), "little")))  # the header
            file.seek(max(0, size - 65536))
            digest.update(file.read())
    return digest.hexdigest()


def unusable(folder: Path, got: str, expected: str, hint: str = "") -> InputError:
    return input_error(f"--llm_model_path {folder}", got, expected, hint)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require_bitsandbytes(flag: str) -> None:
    """Raises InputError where `flag` (without its dashes) needs bitsandbytes and it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise input_error(f"--{flag}", "no bitsandbytes", "an installed one", "install it with: pip install bitsandbytes")


class Backbone:
    """A frozen language model of `layers` layers. Not an nn.Module: it is neither trained nor saved.

    Attributes:
        info: what its folder says of it.
        model: transformers' model, without a head.
        embeddings: `[V, D]` input embeddings, never quantised.
        window: how many tokens back one sees, in the layer that sees least.
        dtype, stream_dtype: number types of the embeddings, and of the residual stream from layer to layer.
        inner_size: width of a feed-forward block.
        groups: query heads that share a key-value head.
        recompute: whether the layers run again in the backward pass.
        embedding_scale: what the layers see of a token over its embedding; Gemma's embedding layer multiplies.
    """

    def __init__(
        self,
        info: BackboneInfo,
        layers: int,
        device: torch.device | str = "cpu",
        four_bit: bool = False,
        recompute: bool = False,
        dtype: torch.dtype | None = None,
        random_seed: int | None = None,
    ):
        """Read the first `layers` layers; with 0, the word embeddings alone.

        Args:
            dtype: number type of the weights, with `four_bit` of what is computed with them; None: float32 on the
                CPU, bfloat16 on CUDA and with `four_bit`. With float16 the layers must run under autocast to it.
            recompute: keep only each layer's input for the backward pass, and run the layer again there.
            random_seed: draw the weights, of the same architecture, instead of reading them.

        Raises:
            InputError: more layers than there are, or weights that the folder lacks.
        """
        self.info = info
        self.hidden_size, self.vocab_size = info.hidden_size, info.vocab_size
        self.max_positions, self.tokenizer = info.max_positions, info.tokenizer
        self.heads, self.window = info.heads, info.window
        device = torch.device(device)
        if dtype is None:
            dtype = torch.bfloat16 if four_bit or device.type == "cuda" else torch.float32
        if random_seed is not None:  # weights as the authors' training would have begun
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(random_seed)
                self.model = AutoModel.from_config(_config(info, layers), dtype=dtype)
            self.model.to(device)
        else:
            self.model = _load(info, layers, device, four_bit, dtype)
        if dtype == torch.float16:
            make_safe(self.model)
        self.model.pooler = None  # BERT's and others' head over the first token, which many folders lack
        self.model.requires_grad_(False).eval()
        self.recompute = recompute
        config, self.dtype = self.model.config, self.embeddings.dtype
        self.stream_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        size = getattr(config, "intermediate_size", None)
        self.inner_size = size if isinstance(size, int) else 4 * config.hidden_size  # Gemma 3n's is a list
        self.groups = self.heads // (getattr(config, "num_key_value_heads", None) or self.heads)
        self.embedding_scale = float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))
        self._embeddings_on_host = False
        if recompute:
            for layer in list(self.model.modules()):
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.__class__ = type(type(layer).__name__, (_Recomputed, type(layer)), {})

    @property
    def embeddings(self) -> torch.Tensor:
        return cast(torch.Tensor, self.model.get_input_embeddings().weight)  # (V, D)

    @property
    def device(self) -> torch.device:
        return next(p for p in self.model.parameters() if p is not self.embeddings).device

    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[M, n]`, on any device -> what the layers see of them, `[M, n, D]` on the layers' device."""
        found = self.model.get_input_embeddings()(ids.to(self.embeddings.device, non_blocking=True))
        return found.to(self.device, self.stream_dtype, non_blocking=True)

    def keep_embeddings_on_host(self) -> None:
        """Keep the embeddings in the computer's memory, whatever the device: for who only looks words up in them."""
        self._embeddings_on_host = True
        self.model.get_input_embeddings().to("cpu")  # the whole layer: Gemma's has a scale besides

    def plain(
        self, prompt_prefix: list[int], ids: torch.Tensor, length: torch.Tensor, patches: torch.Tensor
    ) -> torch.Tensor:
        """The whole sequence with gradients, through transformers' own masks and attention.

        Args:
            prompt_prefix: token ids that every sequence starts with.
            ids: `[M, n]` right-padded ids that follow, of which the first `length[m]` count; on any device.
            patches: `[M, L, D]`.

        Returns:
            `[M, L, D]` last hidden states at the patches, in the patches' type.
        """
        M, L, _ = patches.shape
        first = torch.tensor(prompt_prefix, dtype=torch.long, device=ids.device).expand(M, -1)
        prompt = self.token_embeddings(torch.cat([first, ids], dim=1))  # (M, P0 + n, D)
        slot = torch.arange(prompt.shape[1] + L, device=patches.device)
        stop = len(prompt_prefix) + length[:, None]  # (M, 1) where each prompt ends
        padding = (slot >= stop) & (slot < prompt.shape[1])  # (M, P0 + n + L)
        prompt.masked_fill_(padding[:, :-L, None], 0)  # MobileBERT's tokens look at their neighbours
        inputs = torch.cat([prompt, patches.to(self.stream_dtype)], dim=1)  # (M, P0 + n + L, D)
        # Padding goes behind the patches: then each model counts positions by itself, in its own way.
        order = padding.long().argsort(dim=1, stable=True)
        hidden = self.model(
            inputs_embeds=inputs.take_along_dim(order[..., None], 1),
            attention_mask=(slot < stop + L).long(),
            use_cache=False,
        ).last_hidden_state
        return hidden.take_along_dim((stop + slot[:L])[..., None], 1).to(patches.dtype)

    def to(self, device: torch.device) -> "Backbone":
        """Move to another device. A fast path that was made before is for the old one."""
        self.model.to(device)
        if self._embeddings_on_host:
            self.keep_embeddings_on_host()
        return self

    def bytes_per_sequence(self, patches: int, prompt: int, fast: bool, recompute: bool = False) -> int:
        """About what a training step holds for one sequence while it runs backward, in bytes.

        Counted are the tensors that the layers keep for their gradients: on the fast path those of the
        patches and the keys and values of all slots; on the plain path those of all tokens.
        """
        D, layers, inner = self.model.config.hidden_size, self.model.config.num_hidden_layers, self.inner_size
        slots = prompt + patches
        wide = self.stream_dtype.itemsize // self.dtype.itemsize  # 2 in fp16, whose residual stream is float32
        kept = (
            # residual stream twice, queries, attention's result; gate and up; keys and values
            patches * ((2 * wide + 2) * D + 2 * inner) + slots * 2 * D // self.groups
            if fast
            # besides, in both norms two float32 copies, the activation, expanded keys and values
            else slots * ((13 + wide) * D + 3 * inner)
        )
        # Recomputing, one layer at a time holds all that; the others each their input.
        inputs = (patches if fast else slots) * wide * D + fast * slots * 2 * D // self.groups
        once_more, kept = (kept, inputs) if recompute else (0, kept)
        once = (
            once_more + slots * 4 * wide * D + patches * (2 * D + 2 * wide * inner)
        )  # one layer at work, and the embedding
        return (kept * layers + once) * self.embeddings.element_size()


# A decoder layer under activation checkpointing. (transformers' own switch asks for train mode.)
class _Recomputed(nn.Module):
    def forward(self, *args, **kwargs):
        # Nothing random happens in a frozen layer, so no generator's state has to be kept.
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _config(info: BackboneInfo, layers: int) -> Any:
    config = _first_layers(AutoConfig.from_pretrained(info.folder, trust_remote_code=False), layers)
    if info.dequantised:
        config.quantization_config["dequantize"] = True  # its products have no gradient
    return config


# The configuration of the first layers; what it says layer by layer (`layer_types`, Longformer's windows) is cut to them.
def _first_layers(config: Any, layers: int) -> Any:
    for name, value in list(vars(config).items()):
        is_by_layer = isinstance(value, list) and len(value) == config.num_hidden_layers
        if is_by_layer and ("layer" in name or "window" in name):  # not `pos_att_type` or `mlp_multipliers` of a tiny model
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


def _load(info: BackboneInfo, layers: int, device: torch.device, four_bit: bool, dtype: torch.dtype) -> PreTrainedModel:
    options = {}
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    # It would report the layers left out as unexpected; what is missing is checked below.
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    model, found = AutoModel.from_pretrained(
        info.folder,
        config=_config(info, layers),
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise unusable(info.folder, f"no weights for {missing[0]}", f"those of the first {layers} layers")
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Where the processor has bf16 instructions, bitsandbytes repacks a CPU layer's weights at its first pass
            # without gradient, and from then on returns results that carry none.
            module.support_avx512bf16_for_cpu = False
            # A cycle, for which a model would stay in memory until the garbage collector comes.
            module.weight.module = None
    return model
