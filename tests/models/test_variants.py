"""Time-LLM without one of its parts, assembled by hand; and backbones whose attention slides or whose words are scaled."""

import shutil
from copy import copy
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from layers.backbone import Backbone, find_backbone
from layers.fast import FastPath
from layers.norm import instance_norm
from models.TimeLLM import Model
from tests.conftest import enliven
from tests.models.test_contracts import FLOAT32, difference, outputs_and_gradients, series_difference
from tests.small_run import SEQ_LEN, command_line, make_batch, random_windows, small_model
from utils.flags import parse_flags

WINDOW = 512


@pytest.fixture(scope="module")
def sliding(backbones, tmp_path_factory) -> dict[str, Path]:
    """Folders of a tiny Mistral, and of a tiny Gemma 3 that slides in every second layer; both see 512 tokens back."""
    vocabulary = find_backbone("QWEN", str(backbones["qwen2"])).vocab_size
    shape = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": WINDOW,
        "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    kinds = ["sliding_attention", "full_attention"]
    models = {
        "mistral": lambda: MistralForCausalLM(MistralConfig(**shape)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**shape, layer_types=kinds, query_pre_attn_scalar=8)),
    }
    folders = {}
    for name, make in models.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(folders[name])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(backbones["qwen2"] / file, folders[name])
        enliven(folders[name])
    return folders


def load_auto(folder: Path, **options) -> Backbone:
    return Backbone(find_backbone("AUTO", str(folder)), 2, **options)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_sliding_window_takes_the_fast_path_where_all_fit_into_it(sliding, tmp_path: Path, name: str) -> None:
    backbone = load_auto(sliding[name])
    assert backbone.window == WINDOW and backbone.causal
    for words, fast in (("a short description", True), ("a long description " * 170, False)):
        flags = {"llm_model": "AUTO", "llm_layers": 2, "prompt_text": words}
        model = small_model(tmp_path, backbone, **flags)
        longest = model.prompts.longest + 4  # patches of 32 rows
        assert model.fast_path == fast == (longest <= WINDOW)
        assert not small_model(tmp_path, backbone, fast_path="plain", **flags).fast_path
    model = small_model(tmp_path, backbone, llm_model="AUTO", llm_layers=2, prompt_text="a short description")
    batch = make_batch(model, random_windows())
    out, gradients = outputs_and_gradients(model, batch)
    model.language_model = backbone.plain
    plain, plain_gradients = outputs_and_gradients(model, batch)
    assert series_difference(out.mT, plain.mT) < FLOAT32
    for key, gradient in plain_gradients.items():
        if gradient.abs().max() > 0:
            assert difference(gradients[key], gradient) < 10 * FLOAT32, key


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_the_window_may_be_just_as_long_as_prompt_and_patches(sliding, tmp_path: Path, name: str) -> None:
    """One row fewer, and the last patch would no longer see the first word: there the paths part."""
    longest = small_model(tmp_path, load_auto(sliding[name]), llm_model="AUTO", llm_layers=2).prompts.longest + 4
    for window, fast in ((longest, True), (longest - 1, False)):
        backbone = load_auto(sliding[name])
        backbone.window = backbone.model.config.sliding_window = window
        for layer in backbone.model.layers:
            if getattr(layer.self_attn, "sliding_window", None):
                layer.self_attn.sliding_window = window
        model = small_model(tmp_path, backbone, llm_model="AUTO", llm_layers=2)
        assert model.fast_path == fast
        ids = torch.tensor(max(model.prompts.encode(model.prompts._samples(model.prompts.template)), key=len))[None]
        assert len(model.prefix_ids) + ids.shape[1] + 4 == longest
        patches = torch.randn(1, 4, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            given = model.prefix_ids, ids, torch.tensor([ids.shape[1]]), patches
            found, expected = FastPath(backbone)(*given), backbone.plain(*given)
        assert (difference(found, expected) < FLOAT32) == fast


@pytest.mark.parametrize("prototypes", ["vocab", "direct"])
def test_prototypes_are_made_of_the_words_as_the_layers_see_them(sliding, tmp_path: Path, prototypes: str) -> None:
    backbone = load_auto(sliding["gemma3"])
    ids = torch.arange(backbone.vocab_size)[None]
    seen = backbone.token_embeddings(ids)[0]  # (V, D)
    torch.testing.assert_close(seen, backbone.embeddings * 32**0.5, rtol=1e-3, atol=0)
    torch.testing.assert_close(seen, backbone.embeddings * backbone.embedding_scale)
    model = small_model(tmp_path, backbone, llm_model="AUTO", llm_layers=2)
    mapping = model.mapping_layer
    expected = mapping.weight.t() @ seen + mapping.bias[:, None]
    torch.testing.assert_close(model.text_prototypes(), expected, rtol=1e-4, atol=1e-5)
    if prototypes == "direct":
        torch.manual_seed(1)
        direct = Model(
            parse_flags(command_line(tmp_path, backbone.info.folder, llm_model="AUTO", prototypes="direct")), backbone
        )
        assert direct.mapping_layer is None
        torch.testing.assert_close(direct.text_prototypes(), expected, rtol=1e-4, atol=1e-5)
    else:
        gradient = torch.randn_like(expected)
        model.text_prototypes().backward(gradient)
        torch.testing.assert_close(mapping.weight.grad.t(), gradient @ seen.T, rtol=1e-4, atol=1e-4)


def test_words_are_not_scaled_elsewhere(load) -> None:
    for family in ("qwen2", "llama", "gpt2", "bert"):
        assert load(family).embedding_scale == 1


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_drawn_model_of_the_window_family_runs(sliding, tmp_path: Path, name: str) -> None:
    drawn, read = load_auto(sliding[name], random_seed=3), load_auto(sliding[name])
    assert drawn.embedding_scale == read.embedding_scale
    flags = {"llm_model": "AUTO", "llm_layers": 2, "llm_ablation": "random"}
    model = small_model(tmp_path, drawn, **flags)
    assert model.fast_path
    x = random_windows(2)
    with torch.no_grad():
        fast = model(x)
        model.language_model = drawn.plain
        assert series_difference(fast, model(x)) < FLOAT32
        assert series_difference(fast, small_model(tmp_path, read, llm_model="AUTO", llm_layers=2)(x)) > 1e-3


def bare(backbones, family: str = "qwen2") -> Backbone:
    """The word embeddings alone."""
    names = {"qwen2": "QWEN", "llama": "LLAMA", "gpt2": "GPT2", "bert": "BERT"}
    return Backbone(find_backbone(names[family], str(backbones[family])), 0)


def head(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    """`[M, L, D]` -> `[M, H]` on the normalised scale."""
    linear = model.output_projection.linear
    return hidden[..., : model.d_ff].transpose(1, 2).flatten(1) @ linear.weight.T + linear.bias


def test_without_a_language_model_the_head_reads_the_reprogrammed_patches(backbones, tmp_path: Path) -> None:
    model = small_model(tmp_path, bare(backbones), llm_ablation="none")
    assert model.prompts is None and model.prefix_ids == [] and not model.fast_path
    x = random_windows(3)
    z, mean, deviation = instance_norm(x.mT.flatten(0, 1))
    with torch.no_grad():
        keys, values = model.reprogramming_layer.keys_values(model.text_prototypes())
        tokens = model.patch_embedding(z)  # (M, L, d)
        patches = torch.stack([model.reprogramming_layer(one[None], keys, values)[0] for one in tokens])
        expected = head(model, patches) * deviation + mean
        torch.testing.assert_close(model(x).mT.flatten(0, 1), expected)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "bert"])
@pytest.mark.parametrize("ablation", ["attention", "transformer"])
def test_a_substitute_reads_the_whole_prompt_without_its_padding(
    backbones, tmp_path: Path, family: str, ablation: str
) -> None:
    name = {"qwen2": "QWEN"}.get(family, family.upper())
    backbone = bare(backbones, family)
    model = small_model(tmp_path, backbone, llm_ablation=ablation, llm_model=name)
    assert backbone.model.config.num_hidden_layers == 0 and not model.fast_path
    x = random_windows(3)
    sequences = make_batch(model, x)
    assert len(set(sequences.prompts.length.tolist())) > 2
    z, mean, deviation = instance_norm(sequences.x)
    with torch.no_grad():
        shared = model.prototype_kv()
        patches = model.reprogramming_layer(model.patch_embedding(z), *shared)  # (M, L, D)
        rows = []
        for m, patch in enumerate(patches):
            length = int(sequences.prompts.length[m])
            ids = torch.tensor(model.prefix_ids + sequences.prompts.ids[m, :length].tolist())
            words = backbone.embeddings[ids][None]
            rows.append(model.substitute(words, torch.ones(1, len(ids), dtype=torch.bool), patch[None])[0])
        expected = head(model, torch.stack(rows)) * deviation + mean
        out = model(sequences, shared)
        assert series_difference(out.mT, expected.mT) < FLOAT32
        alone = model(x[1:2])
        assert series_difference(alone[0], model(x)[1]) < FLOAT32


def test_every_part_of_an_ablation_is_trained(backbones, tmp_path: Path) -> None:
    for ablation in ("none", "attention", "transformer"):
        model = small_model(tmp_path, bare(backbones), llm_ablation=ablation)
        _, gradients = outputs_and_gradients(model, make_batch(model, random_windows()))
        still = {name for name, gradient in gradients.items() if not gradient.any()}
        assert still == {"reprogramming_layer.key_projection.bias"}, ablation
        assert any(name.startswith("substitute.") for name in gradients) == (ablation != "none")


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "bert"])
def test_without_a_prompt_both_paths_see_the_patches_alone(load, tmp_path: Path, family: str) -> None:
    name = {"qwen2": "QWEN"}.get(family, family.upper())
    model = small_model(tmp_path, load(family), llm_model=name, llm_layers=2, use_prompt=0)
    assert model.prompts is None and model.fast_path == (family != "bert")
    sequences = make_batch(model, random_windows())
    assert sequences.prompts is None
    out, gradients = outputs_and_gradients(model, sequences)
    with torch.no_grad():
        z, mean, deviation = instance_norm(sequences.x)
        patches = model.reprogramming_layer(model.patch_embedding(z), *model.prototype_kv())
        hidden = model.backbone.model(inputs_embeds=patches).last_hidden_state
        expected = head(model, hidden) * deviation + mean
    assert series_difference(out.mT, expected.mT) < FLOAT32
    model.language_model = model.backbone.plain
    plain, plain_gradients = outputs_and_gradients(model, sequences)
    assert series_difference(out.mT, plain.mT) < FLOAT32
    for key, gradient in plain_gradients.items():
        assert difference(gradients[key], gradient) < 5 * FLOAT32 or not gradient.any(), key


def test_without_reprogramming_a_linear_map_feeds_the_language_model(load, tmp_path: Path) -> None:
    # A backbone of its own: without prototypes its words stay in the computer's memory.
    model = small_model(tmp_path, copy(load("qwen2")), llm_layers=2, use_reprogramming=0)
    assert model.mapping_layer is None and model.prototype_kv() == () and model.fast_path
    assert set(dict(model.named_parameters())) == {
        "patch_embedding.value_embedding.tokenConv.weight", "reprogramming_layer.weight", "reprogramming_layer.bias",
        "output_projection.linear.weight", "output_projection.linear.bias",
    }  # fmt: skip
    sequences = make_batch(model, random_windows())
    out, gradients = outputs_and_gradients(model, sequences)
    assert all(gradient.any() for gradient in gradients.values())
    with torch.no_grad():
        z, mean, deviation = instance_norm(sequences.x)
        patches = model.patch_embedding(z) @ model.reprogramming_layer.weight.T + model.reprogramming_layer.bias
        prompts = sequences.prompts
        hidden = model.backbone.plain(model.prefix_ids, prompts.ids, prompts.length, patches)
        assert series_difference(out.mT, (head(model, hidden) * deviation + mean).mT) < FLOAT32
    _, parts = outputs_and_gradients(model, sequences, max_sequences=2)
    for key, gradient in gradients.items():
        assert difference(parts[key], gradient) < FLOAT32, key


@pytest.mark.parametrize("skip", ["ridge", "linear"])
def test_the_skip_is_a_linear_map_of_the_normalised_window(backbones, tmp_path: Path, skip: str) -> None:
    model = small_model(tmp_path, bare(backbones), llm_ablation="none", skip=skip)
    without = small_model(tmp_path, bare(backbones), llm_ablation="none")
    names = set(model.state_dict()) - set(without.state_dict())
    assert names == {"linear_map"} and ("linear_map" in dict(model.named_parameters())) == (skip == "linear")
    x = random_windows(3)
    z, mean, deviation = instance_norm(x.mT)
    with torch.no_grad():
        torch.testing.assert_close(model(x), mean.mT.expand(-1, 8, -1))  # head and map are zero
        model.linear_map.copy_(torch.randn(SEQ_LEN, 8, generator=torch.Generator().manual_seed(0)))
        for key, tensor in without.output_projection.state_dict().items():
            model.output_projection.state_dict()[key].copy_(tensor)
        expected = without(x) + (z @ model.linear_map * deviation).mT
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("ablation", ["none", "attention", "transformer"])
def test_a_recomputing_or_four_bit_backbone_has_no_layer_to_recompute_or_quantise(
    backbones, tmp_path: Path, ablation
) -> None:
    expected = small_model(tmp_path, bare(backbones), llm_ablation=ablation)(random_windows())
    info = find_backbone("QWEN", str(backbones["qwen2"]))
    for options, tolerance in (({"recompute": True}, 1e-6), ({"four_bit": True}, 2e-2)):
        model = small_model(tmp_path, Backbone(info, 0, **options), llm_ablation=ablation)
        assert series_difference(model(random_windows()), expected) < tolerance
