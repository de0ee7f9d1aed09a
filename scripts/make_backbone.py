"""Language models with random weights, written in the on-disk format of the Hugging Face hub.

    python scripts/make_backbone.py --preset tiny --out base_models/tiny

What loads a downloaded model loads it: for tests, and for speed and memory at a model's true shape.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PretrainedConfig as Config

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from layers.errors import InputError, input_error  # noqa: E402
from layers.prompt import PromptTemplate  # noqa: E402

PROMPT_BANK = REPO / "dataset" / "prompt_bank"
MAX_SHARD_BYTES = 10**9
INIT_STD = 0.02
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Preset:
    """A model's shape; `vocab` is its fixed number of embedding rows (0: one per tokenizer id)."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    dtype: torch.dtype = torch.float32
    vocab: int = 0
    families: tuple[str, ...] = ("qwen2", "llama", "gpt2", "bert")


GROUPED = ("qwen2", "llama")  # families whose key-value heads may be fewer than their heads
PRESETS = {
    "tiny": Preset(hidden=128, intermediate=512, heads=4, kv_heads=2, layers=2),
    "small": Preset(hidden=512, intermediate=2048, heads=8, kv_heads=4, layers=6),
    "qwen2.5-3b": Preset(2048, 11008, 16, 2, layers=36, dtype=torch.bfloat16, vocab=151936, families=GROUPED),
}


@dataclass(frozen=True)
class Family:
    """Where one model family differs from the others.

    `special` are the tokenizer's special tokens by role, `template` is what it adds around a text `$A`,
    `inner` is the config's name of the feed-forward width, `rotary` decoders have grouped-query attention,
    and `strip` is the module prefix that the family's files on the hub leave out of the tensor names.
    """

    config: Callable[..., Config]
    model: type[transformers.PreTrainedModel]
    positions: int
    special: dict[str, str]
    template: str = "$A"
    inner: str = "intermediate_size"
    rotary: bool = False
    strip: str = ""


FAMILIES = {
    "qwen2": Family(
        transformers.Qwen2Config, transformers.Qwen2ForCausalLM, positions=32768, rotary=True,
        special={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
    "llama": Family(
        transformers.LlamaConfig, transformers.LlamaForCausalLM, positions=32768, rotary=True,
        template="<|begin_of_text|> $A",
        special={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "gpt2": Family(
        transformers.GPT2Config, transformers.GPT2LMHeadModel, positions=1024, inner="n_inner",
        strip="transformer.", special={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "bert": Family(
        transformers.BertConfig, transformers.BertModel, positions=512, template="[CLS] $A [SEP]",
        special={f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")},
    ),
}  # fmt: skip

# Qwen2.5's split: words with the space before them, single digits, runs of punctuation. So
# "Input statistics:" and " min value" never share a token.
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLIT = WORD + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Room for every word of the prompts to become one token, as nearly all are in Qwen2.5: the lengths are alike.
MAX_VOCAB = 4096


def write_json(path: Path, data: dict) -> None:
    """Write `data` as indented UTF-8 JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def training_texts() -> list[str]:
    """Prompts with ETT's description and varied numbers; the same list on every call, whatever else comes into the bank."""
    rng, texts = random.Random(0), []
    description = (PROMPT_BANK / "ETT.txt").read_text(encoding="utf-8").strip()
    for window, horizon in ((96, 96), (336, 192), (512, 720)):
        template = PromptTemplate(description, seq_len=window, pred_len=horizon)
        for sign, upward in ((-1, True), (1, False)):
            low, median, high = sorted(sign * rng.gauss(1, 1) for _ in range(3))
            tail = template.statistics(low, high, median, upward, rng.sample(range(window), 5))
            texts.append(template.prompt_prefix() + tail)
    return texts


def write_tokenizer(folder: Path, family: Family) -> None:
    """Train a byte-level BPE on `training_texts`, split as Qwen2.5 does, and write its two files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=MAX_VOCAB, initial_alphabet=byte_level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(training_texts(), trainer)
    # Added after training, so that they follow the vocabulary as in Qwen2.5, Llama 3 and GPT-2.
    tokenizer.add_special_tokens(list(dict.fromkeys(family.special.values())))
    added = [(word, tokenizer.token_to_id(word)) for word in family.template.split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=family.template, special_tokens=added)
    tokenizer.save(str(folder / "tokenizer.json"))
    # The general class: a family's own class may put its own pre-tokenisation in place of the file's.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": family.positions}
    settings |= {"clean_up_tokenization_spaces": False, **family.special}
    write_json(folder / "tokenizer_config.json", settings)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the two tokenizer files unchanged. Raises InputError where `source` lacks one."""
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            raise input_error("--tokenizer", f"no {name} in {source}", "the folder of a fast tokenizer")
        shutil.copyfile(source / name, folder / name)


def read_tokenizer(folder: Path) -> tuple[int, dict[str, int | None]]:
    """Number of token ids and the bos/eos/pad ids (None: no such token). Raises InputError."""
    try:
        data, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in TOKENIZER_FILES)
        ids = data["model"]["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
        special = {}
        for role in ("bos_token", "eos_token", "pad_token"):
            token = settings.get(role)
            special[f"{role}_id"] = ids.get(token["content"] if isinstance(token, dict) else token)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{' or '.join(TOKENIZER_FILES)} that cannot be read ({error!r})"
        raise input_error("--tokenizer", got, "the two files of a fast tokenizer") from error
    return max(ids.values()) + 1, special


def build_config(preset: str, layers: int, family: str, tokens: int, special: dict) -> Config:
    """The config of a model with `layers` layers, for a tokenizer of `tokens` ids with `special` among them.

    Raises InputError if a preset of fixed vocabulary has fewer rows than the tokenizer has ids.
    """
    shape, kind = PRESETS[preset], FAMILIES[family]
    if shape.vocab and tokens > shape.vocab:
        raise input_error("--tokenizer", f"{tokens} token ids", f"at most {shape.vocab}, which fit {preset}")
    rotary = {"num_key_value_heads": shape.kv_heads, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    return kind.config(
        architectures=[kind.model.__name__], dtype=shape.dtype,
        initializer_range=INIT_STD, tie_word_embeddings=True,
        hidden_size=shape.hidden, num_hidden_layers=layers, num_attention_heads=shape.heads,
        max_position_embeddings=kind.positions, vocab_size=shape.vocab or tokens,
        **{kind.inner: shape.intermediate}, **(rotary if kind.rotary else {}), **special,
    )  # fmt: skip


def tensor_shapes(config: Config, family: Family) -> dict[str, torch.Size]:
    """Hub name → shape in the model's order, tied tensors once; nothing is allocated."""
    with torch.device("meta"):
        model = family.model(config)
    return {name.removeprefix(family.strip): tensor.shape for name, tensor in model.named_parameters()}


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Weights that depend on seed, name and shape only: a layer is the same in a model with more layers."""
    # Trained Qwen2 models have such biases; zeros would hide one that is not loaded.
    if len(shape) > 1 or re.search(r"\.[qkv]_proj\.bias$", name):
        key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        return torch.empty(shape, dtype=dtype).normal_(0.0, INIT_STD, generator=generator)
    return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)


def plan_shards(sizes: dict[str, int]) -> list[list[str]]:
    """Split tensors (name → bytes) in order into two or more shards of at most MAX_SHARD_BYTES."""
    limit = min(MAX_SHARD_BYTES, sum(sizes.values()) // 2)
    shards: list[list[str]] = []
    filled = limit + 1
    for name, size in sizes.items():
        if filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_weights(folder: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, seed: int) -> None:
    """Write the index and the shards, one in memory at a time. Raises InputError for too small a disk."""
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if total > free:
        raise input_error("--out", f"{free:,} free bytes in {folder.parent}", f"{total:,} for the weights")
    shards, weight_map = plan_shards(sizes), dict[str, str]()
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_tensor(name, shapes[name], dtype, seed) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        del tensors  # before the next shard is made
    metadata = {"total_parameters": total // dtype.itemsize, "total_size": total}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def check_request(out: Path, preset: str, layers: int | None, family: str) -> None:
    """Raise InputError for what cannot be built, before anything is written."""
    for flag, value, known in (("--preset", preset, PRESETS), ("--family", family, FAMILIES)):
        if value not in known:
            raise input_error(flag, repr(value), f"one of {', '.join(known)}")
    if family not in PRESETS[preset].families:
        raise input_error("--family", repr(family), f"{' or '.join(PRESETS[preset].families)} for {preset}")
    if layers is not None and layers < 1:
        raise input_error("--layers", layers, "1 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise input_error("--out", f"{out}, which holds data already", "a new or empty folder")


def make_backbone(
    out: str | Path, preset: str = "tiny", layers: int | None = None, family: str = "qwen2",
    tokenizer: str | Path | None = None, seed: int = 0,
) -> Path:  # fmt: skip
    """Write a random language model into the new or empty folder `out` and return its absolute path.

    `layers` defaults to the preset's; `tokenizer` is a folder whose tokenizer is copied, by default one is
    trained from the prompt texts. The folder appears whole or not at all. Raises InputError.
    """
    out = Path(out).resolve()
    check_request(out, preset, layers, family)
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        if tokenizer is None:
            write_tokenizer(partial, FAMILIES[family])
        else:
            copy_tokenizer(Path(tokenizer), partial)
        config = build_config(preset, layers or PRESETS[preset].layers, family, *read_tokenizer(partial))
        config.save_pretrained(partial)
        write_weights(partial, tensor_shapes(config, FAMILIES[family]), PRESETS[preset].dtype, seed)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="make_backbone.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--preset", required=True, choices=PRESETS)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new or empty folder")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers (default: the preset's)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="copy this folder's tokenizer")
    parser.add_argument("--family", default="qwen2", choices=FAMILIES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        folder = make_backbone(args.out, args.preset, args.layers, args.family, args.tokenizer, args.seed)
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            error = input_error("--out", f"{args.out}, where no writing is ({error})", "a folder that can be written")
        print(f"make_backbone.py: error: {error}", file=sys.stderr)
        return 2
    size = json.loads((folder / INDEX).read_text(encoding="utf-8"))["metadata"]
    print(f"{folder}: {size['total_parameters']:,} parameters, {size['total_size']:,} bytes of weights")
    print("Random weights: good for tests and for measuring speed and memory, but they know no language.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
