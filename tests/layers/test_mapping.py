"""The mapping layer against PyTorch's linear layer and optimizers: values, gradients, steps, files."""

import pytest
import torch
from torch import nn

import layers.mapping as mapping_module
from layers.mapping import MappingLayer
from utils.training.optimizer import BlockAdam

V, K, D = 300, 40, 24  # three blocks of words, the last one shorter


@pytest.fixture(autouse=True)
def blocks(monkeypatch) -> None:
    monkeypatch.setattr(mapping_module, "CPU_BLOCK_BYTES", 128 * K * 4)


def layers() -> tuple[MappingLayer, nn.Linear, torch.Tensor]:
    """Ours, PyTorch's layer from the same seed, and embeddings."""
    torch.manual_seed(0)
    theirs = nn.Linear(V, K)
    torch.manual_seed(0)
    return MappingLayer(V, K), theirs, torch.randn(V, D)


def gradient(layer: MappingLayer) -> torch.Tensor:
    return torch.cat([block for _, block in layer.gradient_blocks(layer.gradient_factor)]).t()


def test_a_seed_draws_what_pytorchs_layer_draws_and_files_hold_its_shapes() -> None:
    ours, theirs, _ = layers()
    held = ours.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in theirs.state_dict().items())
    held["weight"].mul_(2)  # a view: who writes into the state dict writes into the layer
    assert torch.equal(ours.weight.t(), 2 * theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight.t(), theirs.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factored", [False, True])
def test_values_and_gradients_are_automatic_differentiations(dtype: torch.dtype, factored: bool) -> None:
    """Of two passes, which add up. The products are in the embeddings' type."""
    ours, theirs, E = layers()
    ours.factored, E = factored, E.to(dtype)
    target = torch.randn(K, D)
    tolerance = max(1e-5, 4 * torch.finfo(dtype).eps)
    for factor in (1.0, 3.0):
        expected = 2.5 * (theirs.weight @ E.float()) + theirs.bias[:, None]
        (factor * (expected - target).square().sum()).backward()
        found = ours(E, scale=2.5)
        (factor * (found - target).square().sum()).backward()
        assert found.dtype == torch.float32 and (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert (ours.weight.grad is None) == factored == (ours.gradient_factor is not None)
    weight_gradient = gradient(ours) if factored else ours.weight.grad.t()
    for found, expected in ((weight_gradient, theirs.weight.grad), (ours.bias.grad, theirs.bias.grad)):
        assert (found - expected).abs().max() <= 2 * tolerance * expected.abs().max()
    assert set(ours.state_dict()) == {"weight", "bias"} and len(list(ours.parameters())) == 2  # no embeddings


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
def test_steps_of_blocks_are_the_plain_optimizers(decoupled: bool) -> None:
    """Of which the last are another optimizer's with the same state, as in a run that is resumed."""
    ours, theirs, E = layers()
    blocks = BlockAdam(list(ours.parameters()), ours, 1e-2, decoupled)
    plain = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs.parameters(), lr=1e-2)
    for optimizer in (blocks, plain):
        optimizer.param_groups[0]["eps"] = 1.0  # Adam would turn the rounding of a gradient near 0 into a step
    for step in range(4):
        if step == 2:
            held, blocks = blocks.state_dict(), BlockAdam(list(ours.parameters()), ours, 1e-2, decoupled)
            blocks.load_state_dict(held)
        ours(E).square().sum().backward()
        (theirs.weight @ E + theirs.bias[:, None]).square().sum().backward()
        blocks.step()
        plain.step()
        ours.zero_grad()
        ours.gradient_factor = None
        theirs.zero_grad()
        torch.testing.assert_close(ours.weight.t(), theirs.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-5, atol=1e-6)
    assert blocks.state[ours.weight]["step"] == 4
    for name in ("exp_avg", "exp_avg_sq"):
        found, expected = blocks.state[ours.weight][name].t(), plain.state[theirs.weight][name]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name
