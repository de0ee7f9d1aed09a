"""Language models with random weights, written in the on-disk format of the Hugging Face hub.

    python scripts/make_backbone.py --preset tiny --out base_models/tiny

What loads a downloaded model loads it: for tests, and for speed and memory at a model's true shape.
"""

import hashlib
import os
import random
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import torch  # noqa: E402
import transformers  # noqa: E402
from huggingface_hub import save_torch_state_dict  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

from data_provider.description import PROMPT_BANK  # noqa: E402
from layers.errors import input_error  # noqa: E402
from layers.prompt import PromptTemplate  # noqa: E402
from utils.saving.files import write_json  # noqa: E402

MAX_SHARD_BYTES = 10**9
INIT_STD = 0.02


# A model's shape; `vocab` is how many embedding rows it has at least: one per tokenizer id there is always.
PRESETS = {
    "tiny": SimpleNamespace(hidden=128, intermediate=512, heads=4, kv_heads=2, layers=2, dtype=torch.float32, vocab=0),
    "small": SimpleNamespace(hidden=512, intermediate=2048, heads=8, kv_heads=4, layers=6, dtype=torch.float32, vocab=0),
    "qwen2.5-3b": SimpleNamespace(
        hidden=2048, intermediate=11008, heads=16, kv_heads=2, layers=36, dtype=torch.bfloat16, vocab=151936
    ),
}


# Where one model family differs from the others: `special` are the tokenizer's special tokens by role, `template` is what
# it adds around a text `$A`, `inner` is the config's name of the feed-forward width, `rotary` decoders have grouped-query
# attention, and `strip` is the module prefix that the family's files on the hub leave out of the tensor names.
Family = namedtuple(
    "Family",
    "config model positions special template inner rotary strip",
    defaults=["$A", "intermediate_size", False, ""],
)
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


def write_tokenizer(folder: Path, family: Family) -> None:
    # Train a byte-level BPE, split as Qwen2.5 does, on prompts with ETT's description and varied numbers.
    rng, texts = random.Random(0), []
    description = (PROMPT_BANK / "ETT.txt").read_text(encoding="utf-8").strip()
    for window, horizon in ((96, 96), (336, 192), (512, 720)):
        template = PromptTemplate(description, seq_len=window, pred_len=horizon)
        for sign, upward in ((-1, True), (1, False)):
            low, median, high = sorted(sign * rng.gauss(1, 1) for _ in range(3))
            tail = template.statistics(low, high, median, upward, rng.sample(range(window), 5))
            texts.append(template.prompt_prefix() + tail)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=MAX_VOCAB, initial_alphabet=byte_level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Added after training, so that they follow the vocabulary as in Qwen2.5, Llama 3 and GPT-2.
    tokenizer.add_special_tokens(list(dict.fromkeys(family.special.values())))
    added = [(word, tokenizer.token_to_id(word)) for word in family.template.split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=family.template, special_tokens=added)
    tokenizer.save(str(folder / "tokenizer.json"))
    # The general class: a family's own class may put its own pre-tokenisation in place of the file's.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": family.positions,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings | family.special)


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, seed: int) -> torch.Tensor:
    # Weights that depend on seed, name and shape only: a layer is the same in a model with more layers.
    # Trained Qwen2 models have such biases; zeros would hide one that is not loaded.
    if len(shape) > 1 or re.search(r"\.[qkv]_proj\.bias$", name):
        key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        return torch.empty(shape, dtype=dtype).normal_(0.0, INIT_STD, generator=generator)
    return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)


def make_backbone(
    out: str | Path, preset: str = "tiny", layers: int | None = None, family: str = "qwen2",
    tokenizer: str | Path | None = None, seed: int = 0,
) -> Path:  # fmt: skip
    """Write a random language model into the new or empty folder `out` and return its absolute path.

    `layers` defaults to the preset's; `tokenizer` is a folder whose tokenizer is copied, by default one is
    trained from the prompt texts. The folder appears whole or not at all. Raises InputError.
    """
    out, shape, kind = Path(out).resolve(), PRESETS[preset], FAMILIES[family]
    if layers is not None and layers < 1:
        raise input_error("--layers", layers, "1 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise input_error("--out", f"{out}, which holds data already", "a new or empty folder")
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        if tokenizer is None:
            write_tokenizer(partial, kind)
        try:
            for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
                shutil.copyfile(Path(tokenizer) / name, partial / name)
            words = transformers.AutoTokenizer.from_pretrained(partial)
        except Exception as error:  # the Rust reader raises plain Exceptions
            raise input_error(
                f"--tokenizer {tokenizer}",
                f"files that cannot be read ({error})",
                "tokenizer.json and tokenizer_config.json of a fast one",
            ) from error
        rotary = {"num_key_value_heads": shape.kv_heads, "rope_theta": 1e6, "rms_norm_eps": 1e-6} if kind.rotary else {}
        config = kind.config(
            architectures=[kind.model.__name__], dtype=shape.dtype,
            initializer_range=INIT_STD, tie_word_embeddings=True,
            hidden_size=shape.hidden, num_hidden_layers=layers or shape.layers, num_attention_heads=shape.heads,
            max_position_embeddings=kind.positions, vocab_size=max(shape.vocab, len(words)),
            **{kind.inner: shape.intermediate}, **rotary,
            **{f"{role}_token_id": getattr(words, f"{role}_token_id") for role in ("bos", "eos", "pad")},
        )  # fmt: skip
        config.save_pretrained(partial)
        with torch.device("meta"):  # for names and shapes; tied tensors come once
            outline = kind.model(config)
        named = {name.removeprefix(kind.strip): tensor.shape for name, tensor in outline.named_parameters()}
        tensors = {name: random_tensor(name, shape_, shape.dtype, seed) for name, shape_ in named.items()}
        # Two shards or more, as a large model has.
        most = min(MAX_SHARD_BYTES, sum(tensor.nbytes for tensor in tensors.values()) // 2)
        save_torch_state_dict(tensors, partial, max_shard_size=most, metadata={"format": "pt"})
        write_json(partial / "backbone.json", {"note": "random weights, which know no language"})
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


ARGUMENTS = {
    "--preset": dict(required=True, choices=PRESETS),
    "--out": dict(required=True, type=Path, metavar="DIR", help="new or empty folder"),
    "--layers": dict(type=int, metavar="N", help="decoder layers (default: the preset's)"),
    "--tokenizer": dict(type=Path, metavar="DIR", help="copy this folder's tokenizer"),
    "--family": dict(default="qwen2", choices=FAMILIES),
    "--seed": dict(type=int, default=0),
}


def main(argv: list[str] | None = None) -> int:
    args = script_parser("make_backbone.py", str(__doc__).splitlines()[0], ARGUMENTS).parse_args(argv)

    def work() -> None:
        folder = make_backbone(args.out, args.preset, args.layers, args.family, args.tokenizer, args.seed)
        print(f"{folder}: {sum(file.stat().st_size for file in folder.glob('*.safetensors')):,} bytes of weights")
        print("Random weights: good for tests and for measuring speed and memory, but they know no language.")

    return exit_code("make_backbone.py", work)


if __name__ == "__main__":
    sys.exit(main())
