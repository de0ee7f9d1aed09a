"""Backbones from scripts/make_backbone.py load, tokenise and repeat as downloaded models do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from layers.errors import InputError
from scripts.make_backbone import (
    FAMILIES,
    MAX_SHARD_BYTES,
    build_config,
    main,
    make_backbone,
    plan_shards,
    tensor_shapes,
)

REPO = Path(__file__).resolve().parents[2]
OPENING = (
    "<|start_prompt|>Dataset description: {}Task description: forecast the next 96 steps "
    "given the previous 512 steps information; Input statistics:"
).format((REPO / "dataset" / "prompt_bank" / "ETT.txt").read_text(encoding="utf-8").strip())
STATISTICS = (
    " min value -1.2345678806304932, max value 2.345678806304932, median value 0.12345679104328156, "
    "the trend of input is upward, top 5 lags are : [0, 1, 511, 24, 488]<|<end_prompt>|>"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny backbone of every family."""
    root = tmp_path_factory.mktemp("backbones")
    return {family: make_backbone(root / family, family=family) for family in FAMILIES}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's shards; every tensor lies in the shard that the index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        shard = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in shard)
        tensors |= shard
    assert set(tensors) == set(index["weight_map"])
    return tensors


def real_tokenizer() -> Path:
    """Qwen2.5's tokenizer beside the real data, or a skip."""
    roots = [Path(os.environ["TIMELLM_DATA"])] if "TIMELLM_DATA" in os.environ else []
    for root in [*roots, REPO.parent / "shared" / "data"]:
        if (root / "qwen2.5-tokenizer" / "tokenizer.json").is_file():
            return root / "qwen2.5-tokenizer"
    pytest.skip("no qwen2.5-tokenizer folder in TIMELLM_DATA or ../shared/data")


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_through_the_auto_classes(folders: dict[str, Path], family: str) -> None:
    config = AutoConfig.from_pretrained(folders[family])
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == (family, 128, 2)
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    assert tokenizer.is_fast and len(tokenizer) == config.vocab_size
    model, info = AutoModel.from_pretrained(folders[family], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    hidden = model(**tokenizer(OPENING, return_tensors="pt")).last_hidden_state  # (1, tokens, D)
    assert hidden.shape[2] == 128 and torch.isfinite(hidden).all()


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_the_language_model_class_ties_its_head(folders: dict[str, Path], family: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folders[family], output_loading_info=True)
    assert not info["missing_keys"]
    assert type(model).__name__ == AutoConfig.from_pretrained(folders[family]).architectures[0]
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize(
    ("family", "first_layer"),
    [
        ("qwen2", "model.layers.0."),
        ("llama", "model.layers.0."),
        ("gpt2", "h.0."),
        ("bert", "encoder.layer.0."),
    ],
)
def test_shards_and_index_are_the_hubs(folders: dict[str, Path], family: str, first_layer: str) -> None:
    tensors = read_weights(folders[family])
    assert any(name.startswith(first_layer) for name in tensors)
    shards = sorted(file.name for file in folders[family].glob("*.safetensors"))
    assert len(shards) >= 2
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((folders[family] / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_weights_are_small_noise_ones_and_zeros(folders: dict[str, Path]) -> None:
    tensors = read_weights(folders["qwen2"])
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
        else:  # query, key and value biases included
            assert 0.015 < tensor.std() < 0.025, name
    gpt2 = read_weights(folders["gpt2"])
    assert all((tensor == 0).all() for name, tensor in gpt2.items() if name.endswith(".bias"))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_survives_the_tokenizer(folders: dict[str, Path], family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    for text in (OPENING + STATISTICS, "naïve 预测 🙂 'll  two  spaces\n"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize("x 2016") == ["x", "Ġ", "2", "0", "1", "6"]


def test_prompt_is_as_long_as_with_qwens_tokenizer(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen2"])
    opening, tail = tokenizer(OPENING).input_ids, tokenizer(STATISTICS).input_ids
    assert abs(len(opening) - 150) <= 8 and abs(len(tail) - 106) <= 8  # Qwen2.5's own: 150 and 106
    assert tokenizer(OPENING + STATISTICS).input_ids == opening + tail


def test_each_family_adds_its_special_tokens(folders: dict[str, Path]) -> None:
    tokens, pads = {}, {}
    for family, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens[family] = tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids)
        pads[family] = tokenizer.pad_token
        assert AutoConfig.from_pretrained(folder).pad_token_id == tokenizer.pad_token_id
    assert tokens == {
        "qwen2": ["a"],
        "gpt2": ["a"],
        "llama": ["<|begin_of_text|>", "a"],
        "bert": ["[CLS]", "a", "[SEP]"],
    }
    # Llama's and GPT-2's tokenizers have no padding token on the hub either.
    assert pads == {"qwen2": "<|endoftext|>", "llama": None, "gpt2": None, "bert": "[PAD]"}


def test_seed_decides_every_byte(folders: dict[str, Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(REPO / "scripts" / "make_backbone.py"),
        "--preset",
        "tiny",
        "--out",
        "again",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "again") in done.stdout and "parameters" in done.stdout
    first = {path.name: path.read_bytes() for path in folders["qwen2"].iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first
    other = read_weights(make_backbone(tmp_path / "other", seed=1))
    assert not torch.equal(other["model.embed_tokens.weight"], read_weights(folders["qwen2"])["model.embed_tokens.weight"])


def test_deeper_model_begins_with_the_same_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    shallow, deep = read_weights(folders["qwen2"]), read_weights(make_backbone(tmp_path / "deep", layers=5))
    assert "model.layers.4.mlp.up_proj.weight" in deep and set(shallow) < set(deep)
    assert all(torch.equal(tensor, deep[name]) for name, tensor in shallow.items())


def test_given_tokenizer_is_copied_unchanged(tmp_path: Path) -> None:
    source = real_tokenizer()
    folder = make_backbone(tmp_path / "real", layers=1, tokenizer=source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder)("Hello world").input_ids == [9707, 1879]
    config = AutoConfig.from_pretrained(folder)
    assert (config.vocab_size, config.eos_token_id) == (151665, 151643)


def test_three_billion_preset_has_qwens_shape() -> None:
    config = build_config("qwen2.5-3b", 36, "qwen2", tokens=151665, special={"eos_token_id": 151643})
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (2048, 11008, 16)
    assert (config.num_key_value_heads, config.vocab_size, config.tie_word_embeddings) == (2, 151936, True)
    assert (config.dtype, config.rms_norm_eps, config.max_position_embeddings) == (
        torch.bfloat16,
        1e-6,
        32768,
    )
    assert config.rope_parameters["rope_theta"] == 1e6
    sizes = {name: 2 * shape.numel() for name, shape in tensor_shapes(config, FAMILIES["qwen2"]).items()}
    assert sum(sizes.values()) == 2 * 3_085_938_688  # the parameter count on Qwen2.5-3B's model page: 3.09B
    shards = plan_shards(sizes)
    assert max(sum(sizes[name] for name in shard) for shard in shards) <= MAX_SHARD_BYTES
    assert [name for shard in shards for name in shard] == list(sizes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": 0}, "--layers: got 0, expected 1 or more"),
        ({"preset": "huge"}, "--preset: got 'huge', expected one of tiny, "),
        ({"family": "t5"}, "--family: got 't5', expected one of qwen2, "),
        ({"preset": "qwen2.5-3b", "family": "bert"}, "--family: got 'bert', expected qwen2 or llama"),
        ({"tokenizer": "nowhere"}, "--tokenizer: got no tokenizer.json in nowhere, expected"),
    ],
)
def test_bad_requests_name_the_flag_and_leave_nothing(tmp_path: Path, arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        make_backbone(tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_tokenizer_too_large_or_unreadable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--tokenizer: got 151937 token ids, expected at most 151936, which fit"):
        build_config("qwen2.5-3b", 1, "qwen2", tokens=151937, special={})
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("[]", encoding="utf-8")
    (source / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="--tokenizer: got .*tokenizer.json.*, expected the two files of a fast tokenizer"):
        make_backbone(tmp_path / "out", tokenizer=source)
    assert list(tmp_path.iterdir()) == [source]


def test_folder_with_files_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    assert main(["--preset", "tiny", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and str(tmp_path) in printed.err and not printed.out
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (make_backbone(tmp_path / "empty") / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
