"""What stands in the language model's place in its ablations (Tan et al., Are Language Models Actually Useful for Time
Series Forecasting?, NeurIPS 2024): nothing, one attention layer, one Transformer block; trained, and far smaller.

`forward` takes the token embeddings of the prompts `[M, S, D]`, which of them count `[M, S]`, and patches `[M, L, D]`; it
gives `[M, L, D]`. M sequences, L patches, S tokens of the prompt, D the language model's width.
"""

import torch
from torch import nn


class Nothing(nn.Identity):
    """Without the language model: what goes in comes out."""

    def forward(self, token_embeddings, real, patches: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return patches


class AttentionLayer(nn.Module):
    """LLM2Attn: multi-head attention of the patches over prompt and patches. That of the prompt would not be read."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, token_embeddings: torch.Tensor, real: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([token_embeddings.to(patches.dtype), patches], dim=1)  # (M, S + L, D)
        hidden = torch.cat([~real, real.new_zeros(patches.shape[:2])], dim=1)  # (M, S + L)
        mixed, _ = self.attention(patches, tokens, tokens, key_padding_mask=hidden, need_weights=False)
        return mixed


class TransformerBlock(nn.Module):
    """LLM2Trsf: attention and a feed-forward block, each added to its input and normalised."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = AttentionLayer(width, heads)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, token_embeddings: torch.Tensor, real: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        x = self.attention_norm(patches + self.attention(token_embeddings, real, patches))
        return self.feed_forward_norm(x + self.feed_forward(x))


SUBSTITUTES = {"none": Nothing, "attention": AttentionLayer, "transformer": TransformerBlock}  # by `--llm_ablation`
