"""The mapping layer: the gradient of its weight in two factors, against automatic differentiation; steps of rows."""

import copy

import pytest
import torch
from torch import nn

import layers.mapping as mapping_module
from layers.mapping import MappingLayer
from utils.training.optimizer import RowAdam

V, K, D = 70, 40, 24


@pytest.fixture
def blocks(monkeypatch) -> None:
    """Blocks of 16 rows: three of them, the last one shorter."""
    monkeypatch.setattr(mapping_module, "BLOCK_BYTES", 16 * V * 4)


def layers(dtype: torch.dtype = torch.float32) -> tuple[MappingLayer, nn.Linear, torch.Tensor]:
    """Ours, PyTorch's layer of the same weights, and embeddings."""
    torch.manual_seed(0)
    ours = MappingLayer(V, K)
    ours.factored = True
    theirs = nn.Linear(V, K)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(V, D).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_automatic_differentiations(blocks, dtype: torch.dtype) -> None:
    ours, theirs, E = layers(dtype)
    target = torch.randn(K, D)
    expected = (theirs.weight.to(dtype) @ E).to(torch.float32) + theirs.bias[:, None]
    (expected - target).square().sum().backward()
    found = ours(E)
    (found - target).square().sum().backward()
    assert torch.equal(found, expected) and torch.equal(ours.bias.grad, theirs.bias.grad)
    assert ours.weight.grad is None and ours.row_gradient.shape == (K, D)
    assert [rows.stop - rows.start for rows, _ in ours.gradient_blocks()] == [16, 16, 8]
    assert torch.equal(torch.cat([block for _, block in ours.gradient_blocks()]), theirs.weight.grad)


def test_gradients_of_two_passes_add_up() -> None:
    ours, theirs, E = layers()
    for scale in (1.0, 3.0):
        (scale * ours(E)).square().sum().backward()
        (scale * (theirs.weight @ E + theirs.bias[:, None])).square().sum().backward()
    gradient = torch.cat([block for _, block in ours.gradient_blocks()])
    torch.testing.assert_close(gradient, theirs.weight.grad, rtol=1e-4, atol=1e-4)


def test_embeddings_are_no_part_of_the_layer() -> None:
    ours, _, E = layers()
    ours(nn.Parameter(E))
    assert set(ours.state_dict()) == {"weight", "bias"} and len(list(ours.parameters())) == 2


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
@pytest.mark.parametrize("scaled", [False, True])
def test_steps_of_rows_are_the_optimizers_to_the_last_bit(blocks, decoupled: bool, scaled: bool) -> None:
    """Four steps, the third of which is skipped as one with infinite gradients is."""
    ours, theirs, E = layers()
    rows = RowAdam(list(ours.parameters()), ours, 1e-2, decoupled)
    whole = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs.parameters(), lr=1e-2, fused=True)
    for step in range(4):
        for optimizer in (rows, whole):
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.grad_scale = torch.tensor(4.0) if scaled else None
        scale = 4.0 if scaled else 1.0
        (scale * ours(E).square().sum()).backward()
        (scale * (theirs.weight @ E + theirs.bias[:, None]).square().sum()).backward()
        rows.step()
        whole.step()
        ours.zero_grad()
        ours.row_gradient = None
        theirs.zero_grad()
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias), step
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(rows.state[ours.weight][name], whole.state[theirs.weight][name]), name


def test_states_of_torchs_optimizer_and_of_ours_are_the_same() -> None:
    """A run that was saved with one resumes with the other."""
    ours, theirs, E = layers()
    whole = torch.optim.Adam(theirs.parameters(), lr=1e-2, fused=True)
    (theirs.weight @ E + theirs.bias[:, None]).square().sum().backward()
    whole.step()
    ours.load_state_dict(theirs.state_dict())
    rows = RowAdam(list(ours.parameters()), ours, 1e-2, decoupled=False)
    held = copy.deepcopy(whole.state_dict()["state"])
    rows.load_state_dict({"state": held, "param_groups": rows.state_dict()["param_groups"]})
    theirs.zero_grad()
    (theirs.weight @ E + theirs.bias[:, None]).square().sum().backward()
    ours(E).square().sum().backward()
    whole.step()
    rows.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_without_an_optimizer_that_asks_for_rows_it_is_as_any_other_layer() -> None:
    """A training loop of somebody's own, with PyTorch's optimizer, trains the weight."""
    ours, theirs, E = layers()
    ours.factored = False
    optimizer = torch.optim.Adam(ours.parameters(), lr=1e-2)
    ours(E).square().sum().backward()
    (theirs.weight @ E + theirs.bias[:, None]).square().sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad) and ours.row_gradient is None
    optimizer.step()
    assert not torch.equal(ours.weight, theirs.weight)
