"""Time-LLM without one of its parts, assembled by hand; and backbones whose attention slides or whose words are scaled."""

import shutil
from copy import copy
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from data_provider.batches import Batch
from layers.backbone import Backbone, find_backbone
from layers.fast import FastPath
from layers.norm import instance_norm
from models.TimeLLM import Model
from tests.conftest import NAMES, enliven
from tests.models.test_contracts import FLOAT32, assert_paths_agree, difference, outputs_and_gradients, series_difference
from tests.small_run import SEQ_LEN, make_batch, random_windows, small_model

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


@pytest.mark.parametrize("skip", ["ridge", "linear"])
def test_the_skip_is_a_linear_map_of_the_normalised_window(backbones, tmp_path: Path, skip: str) -> None:
    model = small_model(tmp_path, bare(backbones), llm_ablation="none", skip=skip)
    without = small_model(tmp_path, bare(backbones), llm_ablation="none")
    names = set(model.state_dict()) - set(without.state_dict())
    assert names == {"linear_map"} and ("linear_map" in dict(model.named_parameters())) == (skip == "linear")
    x = random_windows(3)
    z, mean, std = instance_norm(x.mT)
    with torch.no_grad():
        torch.testing.assert_close(model(x), mean.mT.expand(-1, 8, -1))  # head and map are zero
        model.linear_map.copy_(torch.randn(SEQ_LEN, 8, generator=torch.Generator().manual_seed(0)))
        for key, tensor in without.output_projection.state_dict().items():
            model.output_projection.state_dict()[key].copy_(tensor)
        expected = without(x) + (z @ model.linear_map * std).mT
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("skip", ["ridge", "stack"])
def test_a_head_beside_the_map_is_trained_alone_and_averaged(backbones, tmp_path: Path, skip: str) -> None:
    flags = {"llm_ablation": "none", "head_dropout": 0.5, "dropout": 0, "enc_in": 2}
    model = small_model(tmp_path, bare(backbones), skip=skip, skip_mode="beside", stack_windows=48, **flags)
    without, x = small_model(tmp_path, bare(backbones), **flags), random_windows(3, SEQ_LEN + model.history)
    for name, tensor in model.state_dict().items():  # the map's; the others are drawn alike
        if name not in without.state_dict() and name != "head_share":
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) / 9)
    with torch.no_grad():
        own, made = without(x[:, model.history :]), {}
        for share in (0.0, 0.25, 1.0):
            model.head_share.fill_(share)
            made[share] = model(x)
        torch.testing.assert_close(made[1.0], own)
        torch.testing.assert_close(made[0.25], 0.25 * own + 0.75 * made[0.0])
        assert (made[0.0] - own).abs().mean() > 0.1
        trained = []
        for each, windows in ((model, x), (without, x[:, model.history :])):
            torch.manual_seed(0)
            trained.append(each.train()(windows))
        assert torch.equal(*trained) and not torch.equal(trained[0], own)  # features drop out
    assert model.head_share.shape == (1,) and "head_share" not in dict(model.named_parameters())


@pytest.mark.parametrize("ablation", ["none", "attention", "transformer"])
def test_a_recomputing_or_four_bit_backbone_has_no_layer_to_recompute_or_quantise(
    backbones, tmp_path: Path, ablation
) -> None:
    expected = small_model(tmp_path, bare(backbones), llm_ablation=ablation)(random_windows())
    info = find_backbone("QWEN", str(backbones["qwen2"]))
    for options, tolerance in (({"recompute": True}, 1e-6), ({"four_bit": True}, 2e-2)):
        model = small_model(tmp_path, Backbone(info, 0, **options), llm_ablation=ablation)
        assert series_difference(model(random_windows()), expected) < tolerance


@pytest.mark.parametrize("seed", [None, 3], ids=["read", "drawn"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_sliding_window_takes_the_fast_path_where_all_fit_into_it(sliding, tmp_path: Path, name: str, seed) -> None:
    backbone = load_auto(sliding[name], random_seed=seed)
    flags = {"llm_model": "AUTO", "llm_layers": 2}
    assert not small_model(tmp_path, backbone, prompt_text="a long description " * 170, **flags).fast_path
    model = small_model(tmp_path, backbone, prompt_text="a short description", **flags)
    assert_paths_agree(model, make_batch(model, random_windows()), 10 * FLOAT32)


def test_prototypes_are_made_of_the_words_as_the_layers_see_them(sliding, tmp_path: Path) -> None:
    backbone = load_auto(sliding["gemma3"])
    seen = backbone.token_embeddings(torch.arange(backbone.vocab_size)[None])[0]  # (V, D)
    torch.testing.assert_close(seen, backbone.embeddings * 32**0.5, rtol=1e-3, atol=0)
    models = [small_model(tmp_path, backbone, llm_model="AUTO", prototypes=kind) for kind in ("vocab", "direct")]
    mapping = models[0].mapping_layer
    expected = mapping.weight.t() @ seen + mapping.bias[:, None]
    for model in models:
        torch.testing.assert_close(model.text_prototypes(), expected, rtol=1e-4, atol=1e-5)
    gradient = torch.randn_like(expected)
    models[0].text_prototypes().backward(gradient)
    torch.testing.assert_close(mapping.weight.grad.t(), gradient @ seen.T, rtol=1e-4, atol=1e-4)


def bare(backbones, family: str = "qwen2") -> Backbone:
    """The word embeddings alone."""
    return Backbone(find_backbone(NAMES[family], str(backbones[family])), 0)


def by_hand(model: Model, batch: Batch) -> torch.Tensor:
    """Forecasts `[M, H]`, each sequence by itself: its prompt without padding, through transformers' own model."""
    z, mean, std = instance_norm(batch.x)
    rows, L = [], (SEQ_LEN - 16) // 8 + 2
    for m, series in enumerate(z):
        patches = model.reprogramming_layer(model.patch_embedding(series[None]), *model.prototype_kv())  # (1, L, D)
        ids = []
        if batch.prompts is not None:
            ids = model.prefix_ids + batch.prompts.ids[m, : batch.prompts.length[m]].tolist()
        words = model.backbone.embeddings[torch.tensor(ids, dtype=torch.long)][None]
        if model.substitute is not None:
            hidden = model.substitute(words, torch.ones(1, len(ids), dtype=torch.bool), patches)
        else:
            hidden = model.backbone.model(inputs_embeds=torch.cat([words, patches], dim=1)).last_hidden_state[:, -L:]
        rows.append(hidden[0, :, : model.d_ff].T.flatten())  # feature by feature
    head = model.output_projection.linear
    return (torch.stack(rows) @ head.weight.T + head.bias) * std + mean


VARIANTS = {
    "whole": {},
    "no prompt": {"use_prompt": 0},
    "no reprogramming": {"use_reprogramming": 0},
    "no language model": {"llm_ablation": "none"},
    "attention": {"llm_ablation": "attention"},
    "transformer": {"llm_ablation": "transformer"},
}


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_its_parts_put_together_and_each_is_trained(
    backbones, load, tmp_path: Path, family: str, variant: str
) -> None:
    substituted = "llm_ablation" in VARIANTS[variant]
    # A copy: without prototypes its words stay in the computer's memory.
    backbone = bare(backbones, family) if substituted else copy(load(family))
    model = small_model(tmp_path, backbone, llm_model=NAMES[family], llm_layers=2, **VARIANTS[variant])
    assert model.fast_path == (family != "bert" and not substituted)
    assert (model.prompts is None) == (variant in ("no prompt", "no language model"))
    batch = make_batch(model, random_windows())
    assert batch.prompts is None or len(set(batch.prompts.length.tolist())) > 2
    out, gradients = outputs_and_gradients(model, batch)
    with torch.no_grad():
        assert series_difference(out.mT, by_hand(model, batch).mT) < FLOAT32
    still = {name for name, gradient in gradients.items() if not gradient.any()}
    assert still == (set() if variant == "no reprogramming" else {"reprogramming_layer.key_projection.bias"})
    if model.fast_path:
        assert_paths_agree(model, batch, FLOAT32 * (5 if variant == "no prompt" else 1))
