"""The two contracts of the model: a forecast does not depend on its batch, and fast equals plain."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from layers.backbone import Backbone, find_backbone
from layers.fast import FastPath
from layers.prompt import PromptEncoder
from tests.layers.test_prompt import joining_tokenizer
from tests.small_run import make_batch, random_windows, small_model
from utils.training.train import forward_backward

CAUSAL = {"qwen2": "QWEN", "llama": "LLAMA", "gpt2": "GPT2"}
NAMES = CAUSAL | {"bert": "BERT"}
# Relative to the largest value. 4 bit computes in bfloat16, whose step is 0.8 %.
FLOAT32, BFLOAT16 = 1e-5, 5e-2


def model_of(load, tmp_path, family: str, four_bit: bool = False, **flags):
    return small_model(tmp_path, load(family, four_bit), llm_model=NAMES[family], llm_layers=2, **flags)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def series_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest `difference` of a forecast `[..., H, N]`, each series against its own size."""
    return max(difference(x, y) for x, y in zip(a.mT.flatten(0, -2), b.mT.flatten(0, -2), strict=True))


def outputs_and_gradients(model, batch, max_sequences: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forecasts `[M, H]` and the gradient of every trained tensor, without dropout."""
    model.eval()
    model.zero_grad()
    forward_backward(model, batch, Accelerator(cpu=True), max_sequences)
    with torch.no_grad():
        out = model(batch)
    return out, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_paths_agree(model, batch, tolerance: float) -> None:
    fast_path, model.language_model = model.language_model, model.backbone.plain
    assert isinstance(fast_path, FastPath)
    plain, plain_gradients = outputs_and_gradients(model, batch)
    model.language_model = fast_path
    fast, fast_gradients = outputs_and_gradients(model, batch)
    assert series_difference(fast.mT, plain.mT) < tolerance
    assert len(plain_gradients) == 13 - ("prototypes" in plain_gradients)
    for name, gradient in plain_gradients.items():
        if name == "reprogramming_layer.key_projection.bias":  # zero by construction: softmax is shift-invariant
            assert (gradient == 0).all() and (fast_gradients[name] == 0).all()
            continue
        assert gradient.abs().max() > 0, name
        # The mapping's bias sums D values of both signs, so more of its rounding is left.
        allowed = 5 * tolerance if name == "mapping_layer.bias" else tolerance
        assert difference(fast_gradients[name], gradient) < allowed, name


@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "4 bit"])
@pytest.mark.parametrize("family", CAUSAL)
def test_fast_equals_plain(load, tmp_path, family: str, four_bit: bool) -> None:
    model = model_of(load, tmp_path, family, four_bit)
    assert model.fast_path and model.prompts.prefix_ids
    batch = make_batch(model, random_windows())
    assert len(set(batch.prompts.length.tolist())) > 2  # prompts of different lengths
    assert_paths_agree(model, batch, BFLOAT16 if four_bit else FLOAT32)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize(("family", "four_bit"), [(f, b) for b in (False, True) for f in NAMES if not (f == "bert" and b)])
def test_a_window_alone_equals_itself_in_a_batch(load, tmp_path, family: str, four_bit: bool, fast: bool) -> None:
    if fast and family == "bert":
        pytest.skip("a bidirectional backbone has no fast path")
    model = model_of(load, tmp_path, family, four_bit, fast_path="auto" if fast else "plain")
    assert model.fast_path == fast
    x = random_windows(4)
    tolerance = BFLOAT16 if four_bit else FLOAT32
    with torch.no_grad():
        together = model(x)
        for i in range(len(x)):
            assert series_difference(model(x[i : i + 1])[0], together[i]) < tolerance
        turned = model(x.flip(0)).flip(0)
        assert series_difference(turned, together) < tolerance


def test_prompt_and_position_count(load, tmp_path) -> None:
    """The tests above could not fail if the forecast did not look at the prompt, or at positions."""
    model = model_of(load, tmp_path, "qwen2")
    batch = make_batch(model, random_windows())
    with torch.no_grad():
        shared = model.prototype_kv()
        out = model(batch, shared)
        turned = batch.prompts._replace(ids=batch.prompts.ids.flip(0), length=batch.prompts.length.flip(0))
        assert difference(model(replace(batch, prompts=turned), shared), out) > 1e-3
        shorter = batch.prompts._replace(length=batch.prompts.length - 1)
        assert difference(model(replace(batch, prompts=shorter), shared), out) > 1e-4


def test_bert_is_bidirectional_and_takes_the_plain_path(load, tmp_path) -> None:
    model = model_of(load, tmp_path, "bert")
    assert not model.fast_path
    _, found = outputs_and_gradients(model, make_batch(model, random_windows()))
    zero = {name for name, gradient in found.items() if gradient.abs().max() == 0}
    assert zero == {"reprogramming_layer.key_projection.bias"}
    embeddings = torch.randn(1, 5, model.backbone.hidden_size)
    no_prompt = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long)
    with torch.no_grad():
        before = model.backbone.plain([], *no_prompt, embeddings)
        embeddings[:, -1] = torch.randn(model.backbone.hidden_size)
        assert difference(model.backbone.plain([], *no_prompt, embeddings)[:, 0], before[:, 0]) > 1e-3


def test_paths_agree_without_a_shared_opening(backbones, tmp_path) -> None:
    """A tokenizer that joins tokens over the end of the opening: each series carries its whole prompt."""
    model = small_model(tmp_path, Backbone(find_backbone("QWEN", str(backbones["qwen2"])), 2))
    model.prompts = PromptEncoder(joining_tokenizer(), model.prompts.template, max_tokens=2048)
    assert model.prompts.prefix_ids == []
    assert_paths_agree(model, make_batch(model, random_windows(2)), FLOAT32)


def test_the_opening_may_change_between_two_models(load, tmp_path) -> None:
    """The cached opening belongs to the text, not to the fast path that two models share."""
    language_model = FastPath(load("qwen2"))
    for horizon in (8, 9, 8):
        model = model_of(load, tmp_path, "qwen2", pred_len=horizon)
        model.language_model = language_model
        assert_paths_agree(model, make_batch(model, random_windows(2)), FLOAT32)


@pytest.mark.parametrize("failing_pass", [1, 2, 3])
def test_a_pass_that_ran_out_of_memory_leaves_nothing_behind(backbones, tmp_path, failing_pass: int) -> None:
    """Batches are tried again in smaller parts: what the first try began must not be taken for finished."""
    backbone = Backbone(find_backbone("QWEN", str(backbones["qwen2"])), 2)
    models = [small_model(tmp_path, backbone, pred_len=horizon) for horizon in (8, 9)]
    models[1].language_model = models[0].language_model
    x = random_windows(2)
    with torch.no_grad():
        expected = [model(x) for model in models]
        models[0](x)
        passes = iter(range(1, 4))

        def out_of_memory(module, inputs):
            if next(passes, 4) == failing_pass:
                raise RuntimeError("out of memory")

        hook = models[0].language_model.model.layers[1].register_forward_pre_hook(out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            models[1](x)
        hook.remove()
        for model, right in [*zip(models, expected, strict=True), (models[0], expected[0])]:
            assert series_difference(model(x), right) < FLOAT32


def test_an_empty_opening_may_follow_another(backbones, tmp_path) -> None:
    backbone = Backbone(find_backbone("QWEN", str(backbones["qwen2"])), 2)
    model, other = small_model(tmp_path, backbone), small_model(tmp_path, backbone)
    other.language_model = model.language_model
    other.prompts = PromptEncoder(joining_tokenizer(), model.prompts.template, max_tokens=2048)
    for each in (model, other, model):
        assert_paths_agree(each, make_batch(each, random_windows(2)), FLOAT32)


@pytest.mark.parametrize("parts", [1, 2, 4, 5, 100])
def test_batches_in_parts_have_the_same_gradients(load, tmp_path, parts: int) -> None:
    model = model_of(load, tmp_path, "qwen2")
    batch = make_batch(model, random_windows(3))  # 6 sequences
    _, whole = outputs_and_gradients(model, batch)
    _, summed = outputs_and_gradients(model, batch, max_sequences=parts)
    for name, gradient in whole.items():
        if gradient.abs().max() > 0:
            assert difference(summed[name], gradient) < FLOAT32, name


@pytest.mark.parametrize("path", ["auto", "plain"])
@pytest.mark.parametrize("family", CAUSAL)
def test_recomputed_layers_have_the_same_gradients(load, backbones, tmp_path, family: str, path: str) -> None:
    """And keep less: what automatic differentiation holds for the backward pass is counted."""
    kept, results = [], []
    recomputing = Backbone(find_backbone(CAUSAL[family], str(backbones[family])), 2, recompute=True)
    for backbone in (load(family), recomputing):
        model = small_model(tmp_path, backbone, llm_model=CAUSAL[family], llm_layers=2, fast_path=path)
        batch, held = make_batch(model, random_windows(2)), []

        def count(tensor: torch.Tensor, held: list[int] = held) -> torch.Tensor:
            held.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            results.append(outputs_and_gradients(model, batch, max_sequences=4))
        kept.append(sum(held))
    (out, whole), (other, again) = results
    assert difference(other, out) < FLOAT32
    for name, gradient in whole.items():
        assert difference(again[name], gradient) < FLOAT32, name
    assert kept[1] < 0.8 * kept[0]


def test_loss_is_the_mean_squared_error_and_gradients_are_its_own(load, tmp_path) -> None:
    model = model_of(load, tmp_path, "qwen2")
    batch = make_batch(model, random_windows())
    loss = forward_backward(model, batch, Accelerator(cpu=True))
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = (model(batch) - batch.y).square().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
