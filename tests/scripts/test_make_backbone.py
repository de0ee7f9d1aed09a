"""Backbones from scripts/make_backbone.py load, tokenise and repeat as downloaded models do."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from layers.errors import InputError
from scripts.make_backbone import FAMILIES, main, make_backbone

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
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shard = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in shard)
        tensors |= shard
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


@pytest.mark.parametrize(
    ("family", "first_layer", "tokens", "pad"),
    [  # Llama's and GPT-2's tokenizers have no padding token on the hub either
        ("qwen2", "model.layers.0.", ["a"], "<|endoftext|>"),
        ("llama", "model.layers.0.", ["<|begin_of_text|>", "a"], None),
        ("gpt2", "h.0.", ["a"], None),
        ("bert", "encoder.layer.0.", ["[CLS]", "a", "[SEP]"], "[PAD]"),
    ],
)
def test_a_family_loads_and_tokenises_as_its_own_on_the_hub(
    folders: dict[str, Path], family: str, first_layer: str, tokens: list[str], pad: str | None
) -> None:
    folder = folders[family]
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == (family, 128, 2)
    kinds = [AutoModel] if family == "bert" else [AutoModel, AutoModelForCausalLM]
    for kind in kinds:
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__ == config.architectures[0]
    if model.get_output_embeddings() is not None:
        assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert torch.isfinite(model(**tokenizer(OPENING, return_tensors="pt"))[0]).all()

    assert tokenizer.is_fast and len(tokenizer) == config.vocab_size
    assert tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids) == tokens
    assert tokenizer.pad_token == pad and config.pad_token_id == tokenizer.pad_token_id
    for text in (OPENING + STATISTICS, "naïve 预测 🙂 'll  two  spaces\n"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize("x 2016") == ["x", "Ġ", "2", "0", "1", "6"]

    tensors, shards = read_weights(folder), sorted(file.name for file in folder.glob("*.safetensors"))
    assert any(name.startswith(first_layer) for name in tensors) and len(shards) >= 2
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert all(0.015 < tensor.std() < 0.025 for tensor in tensors.values() if len(tensor.shape) > 1)


def test_prompt_is_as_long_as_with_qwens_tokenizer(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen2"])
    opening, tail = tokenizer(OPENING).input_ids, tokenizer(STATISTICS).input_ids
    assert abs(len(opening) - 150) <= 8 and abs(len(tail) - 106) <= 8  # Qwen2.5's own: 150 and 106
    assert tokenizer(OPENING + STATISTICS).input_ids == opening + tail


def test_the_seed_decides_every_byte_and_depth_adds_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    assert main(["--preset", "tiny", "--out", str(tmp_path / "again")]) == 0
    first = {path.name: path.read_bytes() for path in folders["qwen2"].iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first
    shallow, deep = read_weights(folders["qwen2"]), read_weights(make_backbone(tmp_path / "deep", layers=5))
    assert "model.layers.4.mlp.up_proj.weight" in deep and set(shallow) < set(deep)
    assert all(torch.equal(tensor, deep[name]) for name, tensor in shallow.items())
    other = read_weights(make_backbone(tmp_path / "other", seed=1))
    assert not torch.equal(other["model.embed_tokens.weight"], shallow["model.embed_tokens.weight"])


def test_qwens_own_tokenizer_is_copied_and_has_a_row_for_each_token(tmp_path: Path) -> None:
    roots = [Path(os.environ["TIMELLM_DATA"])] if "TIMELLM_DATA" in os.environ else []
    found = [root / "qwen2.5-tokenizer" for root in [*roots, REPO.parent / "shared" / "data"]]
    source = next((folder for folder in found if (folder / "tokenizer.json").is_file()), None)
    if source is None:
        pytest.skip("no qwen2.5-tokenizer folder in TIMELLM_DATA or ../shared/data")
    folder = make_backbone(tmp_path / "real", layers=1, tokenizer=source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert AutoTokenizer.from_pretrained(folder)("Hello world").input_ids == [9707, 1879]
    config = AutoConfig.from_pretrained(folder)
    assert (config.vocab_size, config.eos_token_id) == (151665, 151643)


def test_what_cannot_be_built_is_one_line_and_leaves_nothing(tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("[]", encoding="utf-8")
    (broken / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    for arguments, words in (
        ({"layers": 0}, "--layers: got 0, expected 1 or more"),
        ({"tokenizer": "nowhere"}, "--tokenizer nowhere: got .*No such file .*nowhere/tokenizer.json.*, expected"),
        (
            {"tokenizer": broken},
            "--tokenizer .*broken: got .*cannot be read.*, expected tokenizer.json and",
        ),
    ):
        with pytest.raises(InputError, match=words) as caught:
            make_backbone(tmp_path / "out", **arguments)
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == [broken]
    assert main(["--preset", "tiny", "--out", str(broken)]) == 2  # somebody's files are kept
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and f"{broken}, which holds data already" in printed.err and not printed.out
    assert len(list(broken.iterdir())) == 2
    (tmp_path / "empty").mkdir()
    assert (make_backbone(tmp_path / "empty") / "config.json").is_file()
