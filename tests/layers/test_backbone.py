"""Finding, checking and loading the frozen language model."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layers.backbone import Backbone, find_backbone
from layers.errors import InputError
from scripts.make_backbone import make_backbone
from tests.conftest import NAMES

INDEX = "model.safetensors.index.json"
FAMILIES = pytest.mark.parametrize("family", NAMES)


@pytest.fixture
def copy(backbones, tmp_path: Path) -> Path:
    """A tiny Qwen2 that a test may spoil."""
    return Path(shutil.copytree(backbones["qwen2"], tmp_path / "copy"))


def refused(folder: Path | str, name: str = "QWEN") -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(InputError) as caught:
        find_backbone(name, str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@FAMILIES
def test_the_first_layers_are_those_of_the_files_frozen_and_in_eval_mode(backbones, family: str) -> None:
    files = {name: t for shard in backbones[family].glob("*.safetensors") for name, t in load_file(shard).items()}
    info, layer = find_backbone(NAMES[family], str(backbones[family])), re.compile(r"(?:layers?|h)\.(\d)\.")
    names = []
    for count in (2, 1, 0):
        model = Backbone(info, count).model
        assert not any(module.training for module in model.modules())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, files[name if name in files else f"model.{name}"]), name
            assert parameter.dtype == torch.float32 and not parameter.requires_grad
        held = set(dict(model.named_parameters()))
        assert {int(found[1]) for name in held if (found := layer.search(name))} == set(range(count))
        names.append({name for name in held if not layer.search(name)})
    assert names[0] == names[1] and model.get_input_embeddings().weight.shape == (info.vocab_size, info.hidden_size)


def test_what_a_folder_says_of_itself(backbones) -> None:
    found = {family: find_backbone("AUTO", str(folder)) for family, folder in backbones.items()}
    assert [found[family].max_positions for family in ("qwen2", "gpt2", "bert")] == [32768, 1024, 512]
    assert (found["qwen2"].hidden_size, found["qwen2"].layers) == (128, 2)


def test_four_bit_leaves_the_embeddings_alone(backbones, load) -> None:
    plain, model = load("qwen2").model, load("qwen2", four_bit=True).model
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight.bfloat16())
    projections = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(projections) == 2 * 7  # query, key, value, output; gate, up, down
    for module in projections:
        assert module.weight.dtype == torch.uint8 and module.weight.quant_state.quant_type == "nf4"
        assert module.compute_dtype == torch.bfloat16 and not module.weight.requires_grad and not module.training


def write_config(folder: Path, **config) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def leave_only_bin(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


DOWNLOAD = "hf download <hub id> --local-dir {folder}"


def leave_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def leave_gguf(folder: Path) -> None:
    (folder / "config.json").rename(folder / "model-q4.gguf")


def quantise(method: str):
    def say(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        write_config(folder, **config, quantization_config={"quant_method": method, "bits": 4})

    return say


TEXT_ONLY = "--llm_model_path {folder}: got a model of type clip, expected a text-only language model (decoder or encoder)"


@pytest.mark.parametrize(
    ("name", "spoil", "expected"),
    [
        ("QWEN", shutil.rmtree, DOWNLOAD),
        ("QWEN", leave_an_adapter, "got a LoRA adapter alone"),
        ("QWEN", leave_gguf, "got GGUF files alone"),
        ("QWEN", quantise("gptq"), "got weights quantised by gptq"),
        ("QWEN", quantise("awq"), "got weights quantised by awq"),
        ("QWEN", leave_only_bin, "no *.safetensors file"),
        ("QWEN", leave_only_bin, DOWNLOAD),
        ("QWEN", lambda folder: min(folder.glob("*.safetensors")).unlink(), "no model-00001-of-"),
        ("QWEN", lambda folder: (folder / "tokenizer_config.json").unlink(), "no tokenizer_config.json"),
        ("QWEN", lambda folder: write_config(folder), "got a config.json that cannot be used"),
        ("LLAMA", lambda folder: None, "--llm_model LLAMA"),
        ("AUTO", lambda folder: write_config(folder, model_type="clip"), TEXT_ONLY),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_a_line(copy: Path, name: str, spoil, expected: str) -> None:
    spoil(copy)
    line = refused(copy, name)
    assert expected.format(folder=copy) in line and str(copy) in line


def test_a_relative_folder_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    asked: list[str] = []
    monkeypatch.setattr("layers.backbone.snapshot_download", lambda name, **_: asked.append(name) or 1 / 0)
    for path in ("base_models/Qwen2.5-3Bx", "models/qwen"):
        assert "no such folder" in refused(path) and f"hf download <hub id> --local-dir {path}" in refused(path, "AUTO")
    assert not asked
    assert "--local-dir" in refused("owner/name") and asked == ["owner/name"]


def test_the_hint_is_about_the_model_that_was_asked_for(copy: Path, tmp_path: Path) -> None:
    cached = Path(shutil.copytree(copy, tmp_path / "models--owner--name" / "snapshots" / "0123"))
    min(cached.glob("*.safetensors")).unlink()
    assert refused(cached).endswith("; fetch it again: hf download owner/name")
    own = Path(shutil.copytree(cached, tmp_path / "Qwen2.5-3B"))
    assert refused(own).endswith(f"hf download Qwen/Qwen2.5-3B --local-dir {own}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert f"got the file {tmp_path / 'model.gguf'}" in refused(tmp_path / "model.gguf")


def test_weights_in_8_bit_floats_become_whole_ones(backbones, copy: Path) -> None:
    """Blocks of 128 x 128 numbers, each with a scale, as DeepSeek-V3's and Qwen3's folders have them."""
    index = json.loads((copy / INDEX).read_text())["weight_map"]
    for shard in copy.glob("*.safetensors"):
        held = load_file(shard)
        for name in [name for name in held if name.endswith("_proj.weight")]:
            matrix = held[name].float()
            padded = torch.zeros([-(-size // 128) * 128 for size in matrix.shape])
            padded[: len(matrix), : matrix.shape[1]] = matrix
            blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))  # (rows, 128, columns, 128)
            scale = blocks.abs().amax((1, 3)) / 448
            whole = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[: len(matrix), : matrix.shape[1]]
            held[name], held[f"{name}_scale_inv"] = whole.to(torch.float8_e4m3fn).contiguous(), scale
        index |= dict.fromkeys(held, shard.name)
        save_file(held, shard, metadata={"format": "pt"})
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    quantise("fp8")(copy)
    found, right = (Backbone(find_backbone("QWEN", str(folder)), 2).model for folder in (copy, backbones["qwen2"]))
    for (name, tensor), expected in zip(found.named_parameters(), right.parameters(), strict=True):
        assert tensor.dtype == torch.float32 and (tensor - expected).norm() <= 0.04 * expected.norm(), name
    assert find_backbone("QWEN", str(copy)).dequantised


def test_layers_and_tensors_that_are_not_there(copy: Path) -> None:
    with pytest.raises(InputError, match="--llm_layers: got 3, expected at most 2, all that "):
        Backbone(find_backbone("QWEN", str(copy)), 3)
    name = "model.layers.0.mlp.up_proj.weight"
    index = json.loads((copy / INDEX).read_text())
    shard = copy / index["weight_map"].pop(name)
    save_file({key: t for key, t in load_file(shard).items() if key != name}, shard, metadata={"format": "pt"})
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="got no weights for .*layers.0.mlp.up_proj.weight"):
        Backbone(find_backbone("QWEN", str(copy)), 1)


def test_identity_stays_with_the_weights(backbones, copy: Path, tmp_path: Path) -> None:
    folders = backbones["qwen2"], copy, make_backbone(tmp_path / "0", seed=0), make_backbone(tmp_path / "1", seed=1)
    own, moved, *seeds = (find_backbone("QWEN", str(folder)).identity for folder in folders)
    assert moved == own and len({identity["fingerprint"] for identity in (own, *seeds)}) == 3
    assert str(tmp_path) not in json.dumps(seeds)


@FAMILIES
def test_drawn_weights_have_the_architecture_and_the_seed(load, family: str) -> None:
    before = torch.get_rng_state()
    drawn, again, other = (Backbone(load(family).info, 2, random_seed=seed).model for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)  # the trained weights are drawn as without it
    states = (model.state_dict() for model in (drawn, again, other, load(family).model))
    for held, same, *others in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(held, same) and {t.shape for t in others} == {held.shape}
        assert held.dim() != 2 or not any(torch.equal(held, t) for t in others)
    assert not any(module.training for module in drawn.modules())
    assert not any(parameter.requires_grad for parameter in drawn.parameters())
