"""PatchTST against PyTorch's own attention and formulas put together here with the same weights."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from models.PatchTST import EncoderLayer, Model
from tests.small_run import defaults


def configs(**flags: object) -> Namespace:
    """The flags' defaults, for a small window."""
    small = {"seq_len": 24, "label_len": 12, "pred_len": 8, "enc_in": 3, "patch_len": 6, "stride": 4, "n_heads": 4}
    return defaults(**small | flags)


def random_model(**flags: object) -> Model:
    """A model in float64 whose normalisations are not those of its start."""
    torch.manual_seed(0)
    model = Model(configs(**flags)).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def attention(layer: EncoderLayer, x: torch.Tensor) -> torch.Tensor:
    """`nn.MultiheadAttention` with the layer's weights; its keys have a random bias, which must not matter."""
    d = x.shape[-1]
    module = nn.MultiheadAttention(d, layer.n_heads, batch_first=True).double()
    projections = layer.query_projection, layer.key_projection, layer.value_projection
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        module.in_proj_bias.copy_(torch.cat([layer.query_projection.bias, torch.randn(d), torch.zeros(d)]))
        module.out_proj.weight.copy_(layer.out_projection.weight)
        module.out_proj.bias.zero_()
    return module(x, x, x)[0]


def batch_norm(norm: nn.BatchNorm1d, x: torch.Tensor) -> torch.Tensor:
    """Feature by feature over `[M, L, d]`."""
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        flat = x.reshape(-1, x.shape[-1])
        mean, var = flat.mean(0), flat.var(0, unbiased=False)
    return (x - mean) / torch.sqrt(var + 1e-5) * norm.weight + norm.bias


def forecast(model: Model, series: torch.Tensor) -> torch.Tensor:
    """One series after the other up to the encoder: `[M, T]` -> `[M, H]`."""
    P, S = model.patch_len, model.stride
    tokens, scales = [], []
    for x in series:
        mean, std = x.mean(), (x.var(unbiased=False) + 1e-5).sqrt()
        z = [*((x - mean) / std).tolist()]
        z += [z[-1]] * S
        patches = torch.tensor([z[start : start + P] for start in range(0, len(z) - P + 1, S)], dtype=torch.float64)
        tokens.append(patches @ model.patch_embedding.weight.T + model.patch_embedding.bias + model.position)
        scales.append((mean, std))
    hidden = torch.stack(tokens)  # (M, L, d)
    for layer in model.encoder:
        assert isinstance(layer, EncoderLayer)
        hidden = batch_norm(layer.attention_norm, hidden + attention(layer, hidden))
        first, _, _, last = layer.feed_forward
        inner = hidden @ first.weight.T + first.bias
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5)) @ last.weight.T
        hidden = batch_norm(layer.feed_forward_norm, hidden + inner)
    flat = torch.stack([h.T.reshape(-1) for h in hidden])  # (M, d*L), feature by feature
    out = flat @ model.head.linear.weight.T + model.head.linear.bias
    return torch.stack([row * std + mean for row, (mean, std) in zip(out, scales, strict=True)])


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_forecast_against_parts_put_together(training: bool) -> None:
    model = random_model(dropout=0.0).train(training)
    x = torch.randn(2, 24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5 + 2
    expected = forecast(model, x.transpose(1, 2).reshape(6, 24)).view(2, 3, 8).transpose(1, 2)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_batch_without_numbers_leaves_no_trace(wrong: float) -> None:
    """Two models see the same batches, PyTorch's normalisation in the one; a wrong batch is seen by the other alone."""
    ours, plain = random_model(dropout=0.0), random_model(dropout=0.0)
    for layer in plain.encoder:
        for name in ("attention_norm", "feed_forward_norm"):
            norm = nn.BatchNorm1d(16).double()
            norm.load_state_dict(getattr(layer, name).state_dict())
            setattr(layer, name, norm)
    x = torch.randn(2, 4, 24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    bad = x[0].clone()
    bad[0, 5, 0] = wrong
    for model, batches in ((ours, (x[0], bad, x[1])), (plain, x)):
        for each in batches:
            model.train()(each).sum().backward()
    for one, other in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)
