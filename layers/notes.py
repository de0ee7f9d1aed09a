"""What texts beside a series do to its forecast: encoded once by the frozen language model, they say how the window goes on.

Shapes: B windows, M = B*N sequences, T = seq_len, H = pred_len, D the texts' width, V texts, k notes of a window.
"""

import itertools

import torch
from torch import nn

from layers.backbone import Backbone

WIDTH, HIDDEN, MAPS = 16, 64, 8
MOST_TOKENS, AT_ONCE = 512, 16  # tokens of a text, and texts


@torch.inference_mode()
def encode(backbone: Backbone, texts: list[str]) -> torch.Tensor:
    """The mean over each text's tokens of the language model's last hidden states, `[V, D]` float32 on the CPU; of its word
    vectors, where it has no layers."""
    most = min(MOST_TOKENS, backbone.max_positions)
    ids = backbone.tokenizer(texts, truncation=True, max_length=most, verbose=False)["input_ids"]
    found = torch.zeros(len(texts), backbone.hidden_size)
    for _, places in itertools.groupby(sorted(range(len(texts)), key=lambda place: len(ids[place])), lambda n: len(ids[n])):
        alike = list(places)  # of one length: nothing is padded
        for part in (alike[start : start + AT_ONCE] for start in range(0, len(alike), AT_ONCE)):
            hidden = backbone.token_embeddings(torch.tensor([ids[place] for place in part]))
            if backbone.model.config.num_hidden_layers:
                hidden = backbone.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
            found[part] = hidden[..., : backbone.hidden_size].float().mean(dim=1).cpu()
    return found


def hashed_words(texts: list[str], width: int) -> torch.Tensor:
    """A bag of hashed words of each text, `[V, D]`: what no language model has read."""
    from sklearn.feature_extraction.text import HashingVectorizer  # only now: it takes half a second to load

    return torch.from_numpy(HashingVectorizer(n_features=width).transform(texts).toarray()).float()


class NotesEffect(nn.Module):
    """Notes -> what they add to the forecast of each row, at first nothing.

    A note opens gates, for each row others: for the forecast without notes, counted from the column's own zero (half of it
    is half the output), for the mean of the window, for a constant, and for MAPS linear maps of its course, so that it can
    go on in another way. A gate sees the text, and how far the row is from the beginning of the note and from the window.
    """

    centre: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor  # (N,)
    vectors: torch.Tensor  # (V, D)

    def __init__(self, width: int, seq_len: int, pred_len: int):
        """`width`: D."""
        super().__init__()
        self.width, self.seq_len, self.pred_len = width, seq_len, pred_len
        self.embed = nn.Linear(width, WIDTH, bias=False)
        self.maps = nn.Linear(seq_len, pred_len * MAPS, bias=False)
        last = nn.Linear(HIDDEN, 3 + MAPS)
        self.gate = nn.Sequential(nn.Linear(WIDTH + 3, HIDDEN), nn.GELU(), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero", torch.zeros(1), persistent=False)
        self.register_buffer("vectors", torch.zeros(1, width), persistent=False)

    def read(self, vectors: torch.Tensor, zero: torch.Tensor) -> None:
        """Take the vectors `[V, D]` of the texts that batches name by number, and the columns' zero `[N]`, standardised."""
        self.vectors, self.zero = vectors.to(self.centre), zero.to(self.centre)

    def fit(self, numbers: list[int]) -> None:
        """Centre and scale the texts by some of them, those of the training."""
        if numbers:
            self.centre.copy_(self.vectors[numbers].mean(dim=0))
            apart = (self.vectors[numbers] - self.centre).square().sum(dim=1).mean().sqrt()
            self.scale.copy_(apart.clamp(min=1e-6) / WIDTH**0.5)

    def forward(self, base: torch.Tensor, x: torch.Tensor, channel: torch.Tensor, notes: torch.Tensor) -> torch.Tensor:
        """Forecasts without notes `[M, H]`, windows `[M, T]`, channels `[M]`, notes `[M, k, 4]` -> what to add, `[M, H]`."""
        every, of = torch.unique(notes, dim=0, return_inverse=True)  # (U, k, 4): channels and many windows are alike
        text, first, last, began = every.to(base.device).unbind(-1)  # (U, k)
        row = torch.arange(self.pred_len, device=base.device)
        holds = (row >= first[..., None]) & (row <= last[..., None])  # (U, k, H)
        age = (row - began[..., None]).clamp(max=self.seq_len) / self.pred_len  # (U, k, H)
        ahead = row.expand_as(age) / self.pred_len
        seen = (-began / self.seq_len).clamp(0, 1)[..., None].expand_as(age)  # how much of the window is after its beginning
        texts = self.embed((self.vectors[text] - self.centre) / self.scale)  # (U, k, 16)
        asked = torch.cat([texts[:, :, None].expand(*age.shape, -1), torch.stack([age, ahead, seen], dim=-1)], dim=-1)
        gates = (self.gate(asked) * holds[..., None]).sum(dim=1)[of]  # (M, H, 3 + MAPS)
        zero, mean = self.zero[channel][:, None], x.mean(dim=1, keepdim=True)  # (M, 1)
        course = self.maps(x - mean).view(len(base), self.pred_len, MAPS)
        levels = torch.stack([base - zero, (mean - zero).expand_as(base), torch.ones_like(base)], dim=-1)
        return (gates * torch.cat([levels, course], dim=-1)).sum(dim=-1)
