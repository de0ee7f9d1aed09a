"""Whether a folder holds a language model, whole, and whether that has read anything."""

import hashlib
import json
import math
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from layers.backbone import find_backbone
from layers.errors import input_error
from scripts.backbones.known import Model

SENTENCE = "The capital of France is Paris. The sun rises in the east and sets in the west."
# Perplexity of SENTENCE: 5 with SmolLM2-135M, 77,000 with random weights of its shape.
PRETRAINED = 100.0


def check_folder(folder: Path, model: Model, files: dict, every_byte: bool = False) -> None:
    """Check that a folder holds `model`, whole: shape, tensors, tokenizer, and `files` (name -> bytes, sha256).

    Raises:
        InputError: the first thing that is wrong, by its name.
    """
    for name, known in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != known["bytes"]:
            got = "no such file" if size is None else f"{size:,} bytes"
            raise input_error(folder / name, got, f"{known['bytes']:,} bytes")
        if every_byte and checksum(folder / name) != known["sha256"]:
            raise input_error(folder / name, f"SHA-256 {checksum(folder / name)}", known["sha256"])
    info = find_backbone("AUTO", str(folder))
    shape = (info.layers, info.hidden_size, info.vocab_size)
    if shape != model.shape:
        raise input_error(folder / "config.json", f"layers, width, vocabulary {shape}", model.shape)
    _check_tensors(folder)
    _check_tokenizer(folder, info.tokenizer, info.vocab_size)


def _check_tensors(folder: Path) -> None:
    """Check that the headers of the safetensors files hold each tensor of the configuration, in its shape."""
    index, found = folder / "model.safetensors.index.json", dict[str, object]()
    headers = {path.name: _header(path) for path in sorted(folder.glob("*.safetensors"))}
    for name, file in (read_json(index)["weight_map"] if index.is_file() else {}).items():
        if name not in headers[file]:
            raise input_error(folder / file, f"no {name}", f"it, as {index.name} says")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    prefix = f"{model.base_model_prefix}."  # some files on the hub leave it out
    for header in headers.values():
        found |= {name.removeprefix(prefix): entry.get("shape") for name, entry in header.items()}
    for name, tensor in model.named_parameters():
        if found.get(name.removeprefix(prefix)) != list(tensor.shape):
            got = f"{name} of shape {found.get(name.removeprefix(prefix))}"
            raise input_error(folder, got, f"{list(tensor.shape)}, as config.json says")


def _header(path: Path) -> dict[str, dict]:
    """A safetensors file's header; find_backbone has seen that it is one."""
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that texts and numbers come back from their tokens, and that each token has a row of the embeddings."""
    for text in (SENTENCE, "min value -1.2345678, max value 90, top 5 lags are : [0, 1, 24]\n", "naïve 预测 🙂"):
        ids = tokenizer(text).input_ids
        if tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) != text:
            raise input_error(folder / "tokenizer.json", f"another text for {text!r}", "the same back from its tokens")
        if max(ids) >= rows:
            raise input_error(folder / "tokenizer.json", f"token {max(ids)}", f"one below {rows}, the vocabulary's size")


def perplexity(folder: Path, text: str = SENTENCE) -> float:
    """A language model's perplexity of a text, each token guessed from those before it; computed in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids  # (1, tokens)
    with torch.inference_mode():
        return math.exp(min(model(ids, labels=ids).loss.item(), 700.0))


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object of a file. Raises InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise input_error(path, f"no JSON ({error})", "a JSON object") from error
    if not isinstance(value, dict):
        raise input_error(path, type(value).__name__, "a JSON object")
    return value
