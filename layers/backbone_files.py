"""The language model's folder: found, checked and read for what it says of itself, without its weights.

What differs between the language models stands in `FAMILIES`; everything else is the same for all.
Only the standard library is imported at the top, so that `check_folder` answers before transformers and torch are loaded,
which takes seconds.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layers.errors import InputError, input_error

if TYPE_CHECKING:
    import transformers

MAX_HEADER = 100_000_000  # bytes, the format's own limit
ABOUT = "backbone.json"  # what scripts/get_backbone.py says of a folder that it made
MAX_ABOUT = 65536  # bytes
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
    "BERT": Family("bert", "google-bert/bert-base-uncased", causal=False, options=(("add_pooling_layer", False),)),
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
    heads: int
    max_positions: int
    causal: bool
    window: int | None  # of sliding-window attention; None: every token sees all before it
    tokenizer: "transformers.PreTrainedTokenizerBase"
    identity: dict  # name, shape and fingerprint of the files, the same wherever the folder lies
    note: str = ""  # where the weights come from, where the folder says so


def check_folder(name: str, path: str | None) -> None:
    """Refuse a language model's folder that is not there, or lacks files; parameters as of `find_backbone`.

    What only transformers can tell is not looked at, and the hub, which may have what this disk has not, is not asked.

    Raises:
        InputError: as `find_backbone`.
    """
    family = FAMILIES[name]
    folder = _local_folder(family, path)
    if folder is not None:
        _check_config_file(name, family, folder)
        _check_files(folder, family)


def find_backbone(name: str, path: str | None) -> BackboneInfo:
    """Find a language model's folder and check it; no weight is read.

    Args:
        name: a key of FAMILIES (`--llm_model`).
        path: a folder or a hub id (`--llm_model_path`); None looks in base_models/, then on the hub.

    Raises:
        InputError: folder, configuration, tokenizer or safetensors files missing or unreadable.
    """
    family = FAMILIES[name]
    folder = _local_folder(family, path) or _fetch(family, path)
    _check_config_file(name, family, folder)
    config = _read_config(name, family, folder)
    fingerprint = _check_files(folder, family)
    # GPT2 names its positions differently; the attribute map of its config knows both names.
    positions = getattr(config, "max_position_embeddings", None) or 2**31
    return BackboneInfo(
        family=family,
        folder=folder,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        max_positions=positions,
        causal=_is_causal(config) if family.causal is None else family.causal,
        window=_window(config),
        tokenizer=_load_tokenizer(folder),
        identity={
            "llm_model": name,
            "model_type": config.model_type,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "fingerprint": fingerprint,
        },
        note=_note(folder),
    )


def _check_config_file(name: str, family: Family, folder: Path) -> None:
    """Refuse a config.json that is missing, no JSON object, or says that it is of another family than `name`."""
    file = folder / "config.json"
    if not file.is_file():
        fetch = f"hf download {family.hub_id or '<hub id>'} --local-dir {folder}"
        raise _unusable(folder, "no config.json", "a language model's configuration beside its weights", fetch)
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable_config(folder, error) from error
    if not isinstance(said, dict):
        raise _unusable_config(folder, TypeError("no JSON object"))
    if isinstance(said.get("model_type"), str):
        _check_family(name, family, said["model_type"], folder)


def _check_family(name: str, family: Family, model_type: str, folder: Path) -> None:
    if not model_type.startswith(family.model_type):
        raise input_error(
            f"--llm_model {name}",
            f"a model of type {model_type} in {folder}",
            family.model_type,
            f"name its own family ({', '.join(FAMILIES)})",
        )


def _check_files(folder: Path, family: Family) -> str:
    """The fingerprint of a folder's weights.

    Raises:
        InputError: it has none, or no tokenizer, or a file of it is cut short.
    """
    shards = _weight_files(folder, family)
    if not (folder / "tokenizer_config.json").is_file():
        raise _unusable(folder, "no tokenizer_config.json", "a tokenizer beside the weights")
    return _fingerprint(folder, shards)


def _read_config(name: str, family: Family, folder: Path) -> "transformers.PreTrainedConfig":
    """A folder's configuration.

    Raises:
        InputError: it cannot be read, is of another family than `name`, or not that of a language model of text.
    """
    from huggingface_hub.errors import StrictDataclassError  # only now: with transformers it takes a second to load
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise _unusable_config(folder, error) from error
    _check_family(name, family, config.model_type, folder)
    sizes = [getattr(config, size, None) for size in ("hidden_size", "vocab_size", "num_hidden_layers")]
    nested = config.is_encoder_decoder or config.get_text_config() is not config
    if nested or not all(isinstance(size, int) for size in sizes):
        expected = "a text-only language model (decoder or encoder)"
        raise _unusable(folder, f"a model of type {config.model_type}", expected)
    return config


def _load_tokenizer(folder: Path) -> "transformers.PreTrainedTokenizerBase":
    """A folder's tokenizer.

    Raises:
        InputError: its files are damaged, or too few (from a configuration alone transformers makes
            a tokenizer without a vocabulary, to which every text is empty).
    """
    from transformers import AutoTokenizer  # only now: transformers takes a second to load

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        usable = bool(tokenizer("0 statistics", add_special_tokens=False)["input_ids"])
    except Exception as error:  # the Rust reader raises plain Exceptions
        raise _unusable(folder, f"a tokenizer that cannot be used ({_first_line(error)})", "a readable one") from error
    if not usable:
        raise _unusable(folder, "a tokenizer without a vocabulary", "tokenizer.json")
    return tokenizer


def _is_causal(config: "transformers.PreTrainedConfig") -> bool:
    """Whether a configuration is that of a decoder, by the names of its architectures."""
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])


def _window(config: "transformers.PreTrainedConfig") -> int | None:
    """The sliding window of a configuration's attention, if any of its layers has one."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if slides else None


def _local_folder(family: Family, path: str | None) -> Path | None:
    """The folder on this disk; None: the hub may have it.

    Raises:
        InputError: `path` is no folder, and no hub id either.
    """
    if path is not None and Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    default = _default_folder(family.hub_id)
    if path is None and default.is_dir():
        return default
    if path is None or _looks_like_hub_id(path):
        return None
    hub_id, place = (family.hub_id, str(default)) if family.hub_id else ("<hub id>", path)
    raise _no_weights(path, "no such folder", hub_id, place)


def _fetch(family: Family, path: str | None) -> Path:
    """The folder of what the hub has, fetched unless the hub's cache holds it."""
    from huggingface_hub import snapshot_download

    hub_id = path or family.hub_id
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the hub client raises dozens of types; each means: not to be had
        looked = _default_folder(hub_id) if path is None else path
        raise _no_weights(looked, _first_line(error), hub_id, str(_default_folder(hub_id))) from error


def _default_folder(hub_id: str) -> Path:
    return ROOT / "base_models" / hub_id.split("/")[-1]


def _no_weights(looked: str | Path, reason: str, hub_id: str, place: str) -> InputError:
    fetch = f"fetch them with: hf download {hub_id} --local-dir {place}"
    return input_error("--llm_model_path", f"no weights in {looked} ({reason})", "a model folder or a hub id", fetch)


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
            raise _unusable(folder, f"{index.name} that cannot be read ({error!r})", "a weight_map in it") from error
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
    if any(Path(name).name != name for name in names):
        raise _unusable(folder, f"{index.name} that names a file outside of the folder", "names of files in it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        fetch = f"hf download {family.hub_id or '<hub id>'} --local-dir {folder}"
        got = f"no {missing[0]}" if missing else "no *.safetensors file"
        raise _unusable(folder, got, "safetensors weights (others are not loaded)", fetch)
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
            raise _unusable(
                folder, f"{shard.name} cut short or damaged ({size:,} bytes)", "the whole file", "fetch it again"
            )
    return digest.hexdigest()


def _data_bytes(header: bytes) -> int:
    """Bytes of data behind a safetensors header; -1 for what is no header."""
    try:
        entries = json.loads(header)
        return max((e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return -1


def _note(folder: Path) -> str:
    """The note in a folder's backbone.json; empty where there is none.

    Raises:
        InputError: the file is none that scripts/get_backbone.py could have written.
    """
    path = folder / ABOUT
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            note = json.loads(file.read(MAX_ABOUT)).get("note", "")
        usable = isinstance(note, str) and note.isprintable() and len(note) <= 200
    except (OSError, ValueError, AttributeError, RecursionError):
        usable = False
    if not usable:
        raise _unusable(folder, f"{ABOUT} that cannot be read", 'a JSON object with one line of text as "note"')
    return note


def _unusable_config(folder: Path, error: Exception) -> InputError:
    return _unusable(folder, f"a config.json that cannot be used ({_first_line(error)})", "a readable one")


def _unusable(folder: Path, got: str, expected: str, hint: str = "") -> InputError:
    return input_error(f"--llm_model_path {folder}", got, expected, hint)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
