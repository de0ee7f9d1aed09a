"""Finding, checking and loading the frozen language model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layers.backbone import Backbone, find_backbone
from layers.errors import InputError
from scripts.make_backbone import make_backbone

INDEX = "model.safetensors.index.json"


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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize(
    ("family", "layer"),
    [("qwen2", "layers."), ("llama", "layers."), ("gpt2", "h."), ("bert", "encoder.layer.")],
)
def test_only_the_first_layers_are_loaded(backbones, load, family: str, layer: str) -> None:
    both = load(family).model.state_dict()
    name = {"qwen2": "QWEN", "llama": "LLAMA", "gpt2": "GPT2", "bert": "BERT"}[family]
    first = Backbone(find_backbone(name, str(backbones[family])), 1).model
    held = first.state_dict()
    second = {key for key in both if key.startswith(f"{layer}1.")}
    assert second and set(held) == set(both) - second
    assert all(torch.equal(tensor, both[key]) for key, tensor in held.items())
    count = sum(p.numel() for p in first.parameters())
    assert count == sum(p.numel() for key, p in load(family).model.named_parameters() if key not in second)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "bert"])
def test_weights_are_those_of_the_files_frozen_and_in_eval_mode(backbones, load, family: str) -> None:
    model, files = load(family).model, weights(backbones[family])
    for name, parameter in model.named_parameters():
        file = name if name in files else f"model.{name}"
        assert torch.equal(parameter, files[file]), name
        assert parameter.dtype == torch.float32 and not parameter.requires_grad
    assert not any(module.training for module in model.modules())


def test_what_a_folder_says_of_itself(backbones) -> None:
    info = find_backbone("QWEN", str(backbones["qwen2"]))
    assert (info.hidden_size, info.layers, info.causal, info.max_positions) == (128, 2, True, 32768)
    assert find_backbone("GPT2", str(backbones["gpt2"])).max_positions == 1024
    bert = find_backbone("BERT", str(backbones["bert"]))
    assert (bert.max_positions, bert.causal) == (512, False)
    assert find_backbone("AUTO", str(backbones["llama"])).causal
    assert not find_backbone("AUTO", str(backbones["bert"])).causal


def test_four_bit_leaves_the_embeddings_alone(backbones, load) -> None:
    model, files = load("qwen2", four_bit=True).model, weights(backbones["qwen2"])
    embeddings = files["model.embed_tokens.weight"].bfloat16()
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    projections = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(projections) == 2 * 7  # query, key, value, output; gate, up, down
    for module in projections:
        assert module.weight.dtype == torch.uint8 and module.weight.quant_state.quant_type == "nf4"
        assert module.compute_dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_missing_folder(tmp_path: Path) -> None:
    line = refused(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in line and "hf download Qwen/Qwen2.5-3B --local-dir " in line


@pytest.mark.parametrize("path", ["base_models/Qwen2.5-3Bx", "models/qwen"])
def test_a_relative_folder_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    asked: list[str] = []
    monkeypatch.setattr("layers.backbone.snapshot_download", lambda name, **_: asked.append(name) or 1 / 0)
    assert "no such folder" in refused(path)
    assert f"hf download <hub id> --local-dir {path}" in refused(path, "AUTO")
    assert not asked
    assert "--local-dir" in refused("owner/name") and asked == ["owner/name"]


@pytest.mark.parametrize("kind", ["t5", "clip", "llava", "vit"])
def test_only_language_models_of_text_alone(copy: Path, kind: str) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": kind}))
    expected = "expected a text-only language model (decoder or encoder)"
    assert refused(copy, "AUTO") == f"--llm_model_path {copy}: got a model of type {kind}, {expected}"


def test_only_bin_weights(copy: Path) -> None:
    for file in [*copy.glob("*.safetensors"), copy / INDEX]:
        file.unlink()
    torch.save({}, copy / "pytorch_model.bin")
    line = refused(copy)
    assert "no *.safetensors file" in line and f"hf download Qwen/Qwen2.5-3B --local-dir {copy}" in line


def test_missing_shard(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    line = refused(copy)
    assert f"no {shard.name}" in line and str(copy) in line


def test_wrong_family(backbones) -> None:
    line = refused(backbones["llama"], "QWEN")
    assert "--llm_model QWEN" in line and "llama" in line


def test_unreadable_configuration_or_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer_config.json").unlink()
    assert "no tokenizer_config.json" in refused(copy)
    (copy / "config.json").write_text("{}")
    assert "got a config.json that cannot be used" in refused(copy)


def test_more_layers_than_there_are(backbones) -> None:
    with pytest.raises(InputError, match="--llm_layers: got 3, expected at most 2, all that "):
        Backbone(find_backbone("QWEN", str(backbones["qwen2"])), 3)


def test_tensor_missing_in_the_shards(copy: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop(name, None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})
    index = json.loads((copy / INDEX).read_text())
    del index["weight_map"][name]
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="got no weights for .*layers.0.mlp.up_proj.weight"):
        Backbone(find_backbone("QWEN", str(copy)), 1)


def test_no_code_of_the_folder_is_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(copy / 'executed')!r}, 'w')\n")
    Backbone(find_backbone("QWEN", str(copy)), 1)
    assert not (copy / "executed").exists()


def test_identity_stays_with_the_weights(backbones, copy: Path, tmp_path: Path) -> None:
    identity = find_backbone("QWEN", str(backbones["qwen2"])).identity
    assert find_backbone("QWEN", str(copy)).identity == identity
    seeds = [find_backbone("QWEN", str(make_backbone(tmp_path / f"{s}", seed=s))).identity for s in (0, 1)]
    assert seeds[0]["fingerprint"] != seeds[1]["fingerprint"] != identity["fingerprint"]
    assert str(tmp_path) not in json.dumps(identity)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "bert"])
def test_drawn_weights_have_the_architecture_and_the_seed(backbones, load, family: str) -> None:
    name = {"qwen2": "QWEN", "llama": "LLAMA", "gpt2": "GPT2", "bert": "BERT"}[family]
    info = find_backbone(name, str(backbones[family]))
    torch.manual_seed(9)
    before = torch.get_rng_state()
    drawn, again, other = (Backbone(info, 2, random_seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)  # the trained weights are drawn as without it
    read = load(family).model.state_dict()
    held = drawn.model.state_dict()
    assert {key: tensor.shape for key, tensor in held.items()} == {key: tensor.shape for key, tensor in read.items()}
    for key, tensor in held.items():
        assert torch.equal(tensor, again.model.state_dict()[key])
        if tensor.dim() == 2:
            assert not torch.equal(tensor, read[key]) and not torch.equal(tensor, other.model.state_dict()[key])
    assert not any(module.training for module in drawn.model.modules())
    assert not any(parameter.requires_grad for parameter in drawn.model.parameters())
    assert drawn.model.config._attn_implementation == load(family).model.config._attn_implementation


def test_without_layers_the_words_are_there(backbones, load) -> None:
    for family, name in (("qwen2", "QWEN"), ("llama", "LLAMA"), ("gpt2", "GPT2"), ("bert", "BERT")):
        bare = Backbone(find_backbone(name, str(backbones[family])), 0)
        assert bare.model.config.num_hidden_layers == 0 and bare.heads == load(family).heads == bare.info.heads
        assert torch.equal(bare.embeddings, load(family).embeddings)
        positions = 1024 if family == "gpt2" else 514 if family == "bert" else 0  # the longest tables of them
        assert sum(p.numel() for p in bare.model.parameters()) <= bare.embeddings.numel() + (positions + 2) * 128


# The meta device stands for a GPU: what has been there has lost its values, and shows whether it was.
@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "bert"])
@pytest.mark.parametrize("how", ["read", "in 4 bits", "drawn"])
def test_words_on_the_host_never_were_on_the_device(backbones, family: str, how: str) -> None:
    name = {"qwen2": "QWEN", "llama": "LLAMA", "gpt2": "GPT2", "bert": "BERT"}[family]
    info = find_backbone(name, str(backbones[family]))
    options = {"dtype": torch.bfloat16, "random_seed": 7 if how == "drawn" else None}
    expected = Backbone(info, 2, **options)
    generator = torch.get_rng_state()
    apart = Backbone(info, 2, "meta", four_bit=how == "in 4 bits", embeddings_on_host=True, **options)
    assert torch.equal(torch.get_rng_state(), generator)  # the trained weights are drawn as without it
    check_apart(apart, expected.embeddings)
    check_apart(apart.to(torch.device("meta")), expected.embeddings)
    if how == "read":
        moved = Backbone(info, 2, embeddings_on_host=True, **options).to(torch.device("meta"))
        check_apart(moved, expected.embeddings)


def check_apart(backbone: Backbone, words: torch.Tensor) -> None:
    """Words on the CPU, all else on the meta device, and no hook that would bring the words there."""
    assert backbone.embeddings.device.type == "cpu" and torch.equal(backbone.embeddings, words)
    layer = backbone.model.get_input_embeddings()
    others = [p for p in backbone.model.parameters() if p is not layer.weight]
    assert backbone.device.type == "meta" and {p.device.type for p in others} == {"meta"}
    assert not any(hasattr(module, "_hf_hook") for module in backbone.model.modules())
    ids = torch.tensor([[3, 5]])
    assert torch.equal(layer(ids), words[ids])
