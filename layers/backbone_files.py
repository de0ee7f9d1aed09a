"""Finding a language model's folder and reading what it says of itself, without its weights.

What differs between the language models stands in `FAMILIES`; everything else is the same for all.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer

from layers.errors import InputError

MAX_HEADER = 100_000_000  # bytes, the format's own limit
ROOT = Path(__file__).resolve().parents[1]


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
    window: int | None  # of sliding-window attention; None: every token sees all before it
    tokenizer: transformers.PreTrainedTokenizerBase
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
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise InputError(
            f"--llm_model_path {folder}: config.json cannot be used ({_first_line(error)})"
        ) from error
    if not config.model_type.startswith(family.model_type):
        raise InputError(
            f"--llm_model {name}: found a model of type {config.model_type} in {folder}, "
            f"need {family.model_type}; name its own family ({', '.join(FAMILIES)})"
        )
    sizes = [getattr(config, name, None) for name in ("hidden_size", "vocab_size", "num_hidden_layers")]
    nested = config.is_encoder_decoder or config.get_text_config() is not config
    if nested or not all(isinstance(size, int) for size in sizes):
        raise InputError(
            f"--llm_model_path {folder}: found a model of type {config.model_type}, "
            "need a text-only language model (decoder or encoder)"
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
        window=_window(config),
        tokenizer=_load_tokenizer(folder),
        identity={
            "llm_model": name,
            "model_type": config.model_type,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "fingerprint": _fingerprint(folder, shards),
        },
    )


def _load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """A folder's tokenizer.

    Raises:
        InputError: its files are damaged, or too few (from a configuration alone transformers makes
            a tokenizer without a vocabulary, to which every text is empty).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        usable = bool(tokenizer("0 statistics", add_special_tokens=False)["input_ids"])
    except Exception as error:  # the Rust reader raises plain Exceptions
        raise InputError(f"--llm_model_path {folder}: the tokenizer cannot be used ({_first_line(error)})") from error
    if not usable:
        raise InputError(f"--llm_model_path {folder}: found a tokenizer without a vocabulary; need tokenizer.json")
    return tokenizer


def _is_causal(config) -> bool:
    """Whether a configuration is that of a decoder, by the names of its architectures."""
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])


def _window(config) -> int | None:
    """The sliding window of a configuration's attention, if any of its layers has one."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if slides else None


def _local_folder(family: Family, path: str | None) -> Path:
    if path is not None and Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    default = ROOT / "base_models" / family.hub_id.split("/")[-1]
    if path is None and default.is_dir():
        return default
    hub_id, place = path or family.hub_id, default
    if path is None or _looks_like_hub_id(path):
        place = ROOT / "base_models" / hub_id.split("/")[-1]
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
            )
        except Exception as error:  # the hub client raises dozens of types; each means: not to be had
            reason = _first_line(error)
    else:
        hub_id, reason = family.hub_id, "no such folder"
        if not hub_id:
            hub_id, place = "<hub id>", path
    looked = default if path is None else path
    raise InputError(
        f"--llm_model_path: found no weights in {looked} ({reason}); fetch them with: "
        f"hf download {hub_id} --local-dir {place}"
    )


def _looks_like_hub_id(path: str) -> bool:
    """Whether what is no folder names a model on the hub: `owner/name`, where no folder `owner` is here."""
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        return False
    first, slash, _ = path.partition("/")
    return not (slash and (first == "base_models" or Path(first).is_dir()))


def _weight_files(folder: Path, family: Family) -> list[Path]:
    """The safetensors files of a folder; every file that an index names must be there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--llm_model_path {folder}: {index.name} cannot be read ({error!r})") from error
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
    if any(Path(name).name != name for name in names):
        raise InputError(f"--llm_model_path {folder}: {index.name} names a file outside of the folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        found = f"no {missing[0]}" if missing else "no *.safetensors file"
        raise InputError(
            f"--llm_model_path {folder}: found {found}; safetensors weights are needed (others are not "
            f"loaded): hf download {family.hub_id or '<hub id>'} --local-dir {folder}"
        )
    return [folder / name for name in names]


def _fingerprint(folder: Path, shards: list[Path]) -> str:
    """SHA-256 over the configuration and each shard's size, header and last 64 KiB: cheap, yet any
    other weights of the same shape differ in it."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in shards:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            digest.update(str(size).encode())
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, MAX_HEADER))
            digest.update(header)
            file.seek(max(0, size - 65536))
            digest.update(file.read())
        if size != 8 + length + _data_bytes(header):
            raise InputError(
                f"--llm_model_path {folder}: {shard.name} is cut short or damaged ({size:,} bytes); fetch it again"
            )
    return digest.hexdigest()


def _data_bytes(header: bytes) -> int:
    """Bytes of data behind a safetensors header; -1 for what is no header."""
    try:
        entries = json.loads(header)
        return max((e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return -1


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
