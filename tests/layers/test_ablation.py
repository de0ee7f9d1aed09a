"""What stands in the language model's place, against PyTorch's own layers and sums written here."""

import torch
from torch import nn

from layers.ablation import AttentionLayer, TransformerBlock

M, S, L, D, HEADS = 3, 7, 4, 12, 3


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words of prompts that differ in length, which of them count, and patches."""
    generator = torch.Generator().manual_seed(0)
    words, patches = (torch.randn(M, n, D, dtype=dtype, generator=generator) for n in (S, L))
    real = torch.arange(S) < torch.tensor([7, 0, 4])[:, None]
    return words, real, patches


def lively(substitute: nn.Module) -> nn.Module:
    """Weights under which every part counts, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in substitute.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2)
    return substitute


def test_attention_by_hand() -> None:
    """Sequence by sequence, without the padding, head by head."""
    layer = lively(AttentionLayer(D, HEADS))
    words, real, patches = inputs()
    held = layer.attention  # in training: there is no dropout in it
    found = layer(words, real, patches)
    for m in range(M):
        tokens = torch.cat([words[m, real[m]], patches[m]])  # (s + L, D)
        q, k, v = (
            (x @ weight.T + bias).unflatten(1, (HEADS, -1)).transpose(0, 1)
            for x, weight, bias in zip(
                (patches[m], tokens, tokens), held.in_proj_weight.chunk(3), held.in_proj_bias.chunk(3), strict=True
            )
        )
        mixed = (q @ k.transpose(1, 2) / (D / HEADS) ** 0.5).softmax(-1) @ v  # (h, L, D / h)
        torch.testing.assert_close(found[m], held.out_proj(mixed.transpose(0, 1).flatten(1)))


def test_a_block_is_a_layer_of_pytorchs_encoder_read_at_the_patches() -> None:
    block = lively(TransformerBlock(D, HEADS))
    theirs = nn.TransformerEncoderLayer(
        D, HEADS, 4 * D, dropout=0.0, activation="gelu", batch_first=True, norm_first=False
    ).double()
    pairs = {
        "self_attn": block.attention.attention, "norm1": block.attention_norm, "norm2": block.feed_forward_norm,
        "linear1": block.feed_forward[0], "linear2": block.feed_forward[2],
    }  # fmt: skip
    tensors = {f"{name}.{key}": t for name, module in pairs.items() for key, t in module.state_dict().items()}
    theirs.load_state_dict(tensors)
    words, real, patches = inputs()
    hidden = torch.cat([~real, torch.zeros(M, L, dtype=torch.bool)], dim=1)
    expected = theirs(torch.cat([words, patches], dim=1), src_key_padding_mask=hidden)[:, -L:]
    torch.testing.assert_close(block(words, real, patches), expected)
    torch.testing.assert_close(block.eval()(words, real, patches), expected)
