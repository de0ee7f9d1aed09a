"""The two contracts of the model: a forecast does not depend on its batch, and fast equals plain."""

import pytest
import torch
from accelerate import Accelerator

from layers.backbone import Backbone, find_backbone
from layers.fast import FastPath
from layers.prompt import PromptEncoder
from tests.layers.test_prompt import joining_tokenizer
from tests.small_run import make_batch, random_windows, small_model
from utils.training.optimizer import build_optimizer
from utils.training.train import forward_backward

CAUSAL = {"qwen2": "QWEN", "llama": "LLAMA", "gpt2": "GPT2"}
NAMES = CAUSAL | {"bert": "BERT"}
# Relative to the largest value; processors differ in the order of sums. 4 bit computes in bfloat16, whose step is 0.8 %.
FLOAT32, BFLOAT16 = 3e-5, 5e-2


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


def test_models_with_different_prefixes_may_share_a_fast_path(load, tmp_path) -> None:
    """The cached prefix belongs to the text. A tokenizer that joins tokens over its end leaves it empty."""
    first, second, joined = models = [model_of(load, tmp_path, "qwen2", pred_len=horizon) for horizon in (8, 9, 8)]
    joined.prompts = PromptEncoder(joining_tokenizer(), joined.prompts.template, max_tokens=2048)
    assert joined.prompts.prefix_ids == []
    for model in models:
        model.language_model = first.language_model
    for model in (first, second, joined, first):
        assert_paths_agree(model, make_batch(model, random_windows(2)), FLOAT32)


@pytest.mark.parametrize("parts", [0, 1, 4, 5, 100])
def test_loss_and_gradients_in_parts_are_those_of_the_mean_squared_error(load, tmp_path, parts: int) -> None:
    model = model_of(load, tmp_path, "qwen2")
    batch = make_batch(model, random_windows(3))  # 6 sequences
    loss = forward_backward(model, batch, Accelerator(cpu=True), parts)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = (model(batch) - batch.y).square().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in model.named_parameters():
        assert difference(found[name], parameter.grad) < FLOAT32, name


@pytest.mark.parametrize("path", ["auto", "plain"])
@pytest.mark.parametrize("family", CAUSAL)
def test_recomputed_layers_have_the_same_gradients(load, backbones, tmp_path, family: str, path: str) -> None:
    """And keep less: what automatic differentiation holds for the backward pass is counted."""
    kept, results = [], []
    recomputing = Backbone(find_backbone(CAUSAL[family], str(backbones[family])), 2, recompute=True)
    for backbone in (load(family), recomputing):
        model, held = small_model(tmp_path, backbone, llm_model=CAUSAL[family], llm_layers=2, fast_path=path), []
        batch = make_batch(model, random_windows(2))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.nbytes) or t, lambda t: t):
            results.append(outputs_and_gradients(model, batch, max_sequences=4))
        kept.append(sum(held))
    (out, whole), (other, again) = results
    assert difference(other, out) < FLOAT32
    assert all(difference(again[name], gradient) < FLOAT32 for name, gradient in whole.items())
    assert kept[1] < 0.8 * kept[0]


def test_what_the_guard_looks_at_has_the_mapping_layers_gradient(load, tmp_path) -> None:
    """In two factors, as an optimizer of blocks asks for it: one number that is infinite there must show."""
    model = model_of(load, tmp_path, "qwen2")
    batch = make_batch(model, random_windows(2))
    _, whole = outputs_and_gradients(model, batch)
    build_optimizer("adam", model, 1e-3)
    model.zero_grad()
    forward_backward(model, batch, Accelerator(cpu=True))
    (factor,) = (g for g in model.gradients() if all(g is not p.grad for p in model.parameters()))
    product = model.backbone.embeddings @ factor.T  # (V, K)
    assert model.mapping_layer.weight.grad is None
    assert difference(product, whole["mapping_layer.weight"]) < FLOAT32
    factor[0, 0] = torch.inf
    assert not all(gradient.isfinite().all() for gradient in model.gradients())
    model.zero_grad()
    assert list(model.gradients()) == []
