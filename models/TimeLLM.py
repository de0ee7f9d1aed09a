"""Time-LLM: Time Series Forecasting by Reprogramming Large Language Models (Jin et al., ICLR 2024).

Read beside section 3 of the paper. Shapes: B windows, N channels, M = B*N sequences, T = seq_len,
H = pred_len, L patches, d = d_model, h = n_heads, f = d_ff, D = the language model's width,
V = its vocabulary, K text prototypes.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from layers.backbone import Backbone
from layers.backbone_files import BackboneInfo, find_backbone
from layers.errors import InputError
from layers.head import FlattenHead
from layers.norm import instance_norm
from layers.patch import PatchEmbedding, patch_count
from layers.prompt import MAX_PROMPT_TOKENS, PromptEncoder, PromptTemplate, pad_prompts
from layers.reprogramming import ReprogrammingLayer

PROTOTYPES = 1000
PROMPT_BANK = Path(__file__).resolve().parents[1] / "dataset" / "prompt_bank"
DEFAULT_DESCRIPTION = "Each value of the series was measured at a regular interval of time."


class Prompts(NamedTuple):
    """Token ids `[M, n]` that follow the opening, right-padded, and their true lengths `[M]`."""

    ids: torch.Tensor
    length: torch.Tensor

    def to(self, device: torch.device) -> "Prompts":
        return Prompts(self.ids.to(device, non_blocking=True), self.length.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> "Prompts":
        return Prompts(self.ids[start:stop], self.length[start:stop])


def describe(configs) -> str:
    """The prompt's description: `--prompt_text`, else the bank's text where it is asked for (custom
    files: where there is one), else one line.

    Raises:
        InputError: `--prompt_domain 1`, and the bank has no text for the data set.
    """
    if getattr(configs, "prompt_text", None):
        return " ".join(configs.prompt_text.split())
    file = bank_file(configs)
    inherited = getattr(configs, "checkpoint", None)  # then the flag may stand for the training's data
    if file is None and configs.prompt_domain and not inherited:
        name = "ETT" if configs.data.startswith("ETT") else Path(configs.data_path).stem
        raise InputError(f"--prompt_domain 1: found no {name}.txt in {PROMPT_BANK}; write one or leave the flag out")
    if file is None or not (configs.prompt_domain or configs.data == "custom"):
        return DEFAULT_DESCRIPTION
    return " ".join(file.read_text(encoding="utf-8").split())


def bank_file(configs) -> Path | None:
    """The data set's text in `dataset/prompt_bank`, named after `--data` or after its file."""
    names = [configs.data, Path(configs.data_path).stem]
    if configs.data.startswith("ETT"):
        names.append("ETT")
    files = [PROMPT_BANK / f"{name}.txt" for name in names]
    return next((file for file in files if file.is_file()), None)


class Model(nn.Module):
    """The trained parts, and the frozen language model they feed.

    The language model is held outside of PyTorch's module tree: it has no place among the
    parameters, in the state dict or in `train()`.
    """

    def __init__(self, configs, backbone: Backbone | BackboneInfo | None = None):
        """Args:
            configs: the run's flags (an argparse namespace).
            backbone: the language model; None loads the one that the flags name. With a BackboneInfo
                the model can be built (for its shapes, on the meta device) but not run.
        """
        super().__init__()
        self.pred_len = configs.pred_len
        self.d_ff = configs.d_ff
        if backbone is None:
            backbone = Backbone(
                find_backbone(configs.llm_model, configs.llm_model_path),
                configs.llm_layers,
                four_bit=configs.load_in_4bit,
                recompute=configs.grad_checkpoint,
            )
        self._frozen = [backbone]  # in a list, where nn.Module does not look
        patches = patch_count(configs.seq_len, configs.patch_len, configs.stride)
        sees_all = backbone.window is None or backbone.window >= MAX_PROMPT_TOKENS + patches
        self.fast_path = configs.fast_path == "auto" and backbone.causal and sees_all
        self.patch_embedding = PatchEmbedding(
            configs.patch_len, configs.stride, configs.d_model, configs.dropout
        )
        self.mapping_layer = nn.Linear(backbone.vocab_size, PROTOTYPES)
        if configs.prototypes == "direct":
            self._map_directly()
        self.reprogramming_layer = ReprogrammingLayer(
            configs.d_model, configs.n_heads, configs.d_ff, backbone.hidden_size
        )
        self.output_projection = FlattenHead(configs.d_ff, patches, configs.pred_len, configs.dropout)
        template = PromptTemplate(describe(configs), configs.seq_len, configs.pred_len, configs.prompt_decimals)
        self.prompts = PromptEncoder(backbone.tokenizer, template, backbone.max_positions - patches)

    @property
    def backbone(self) -> Backbone:
        return self._frozen[0]

    def text_prototypes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the K text prototypes W·E + b, each `[1, h, K, f]`.

        They depend on trained tensors only: once a step, or once an evaluation, is enough.
        """
        prototypes = self.prototypes if self.mapping_layer is None else self._mapped()  # (K, D)
        return self.reprogramming_layer.keys_values(prototypes)

    def _mapped(self) -> torch.Tensor:
        """W·E + b `[K, D]`, multiplied in the embeddings' number type."""
        E, W = self.backbone.embeddings, self.mapping_layer.weight  # (V, D) frozen, (K, V)
        return (W.to(E.device, E.dtype) @ E).to(W.dtype) + self.mapping_layer.bias.to(E.device)[:, None]

    @torch.no_grad()
    def _map_directly(self) -> None:
        """Train the prototypes themselves, from where the mapping layer would have started.

        E has more rows than columns, so W·E + b can be any K x D matrix: the same set of prototypes is
        within reach with K·D values in place of K·V.
        """
        bias = self.mapping_layer.bias
        if bias.is_meta:
            start = bias.new_empty(PROTOTYPES, self.backbone.hidden_size)
        else:
            start = self._mapped().to(bias.device)
        self.prototypes, self.mapping_layer = nn.Parameter(start), None

    def forecast(
        self, x: torch.Tensor, prompts: Prompts, prototypes: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Series `[M, T]` with their prompts -> forecasts `[M, H]` on the series' own scale."""
        z, mean, deviation = instance_norm(x)  # (M, T), (M, 1), (M, 1)
        tokens = self.patch_embedding(z)  # (M, L, d)
        patches = self.reprogramming_layer(tokens, *prototypes)  # (M, L, D)
        run = self.backbone.fast if self.fast_path else self.backbone.plain
        hidden = run(self.prompts.opening_ids, *prompts, patches)  # (M, L, D)
        out = self.output_projection(hidden[..., : self.d_ff])  # (M, H)
        return out * deviation + mean

    def forward(self, x_enc, x_mark_enc=None, x_dec=None, x_mark_dec=None, prompts: Prompts | None = None):
        """Windows `[B, T, N]` -> forecasts `[B, H, N]`.

        The marks and the decoder input that the family of scripts passes are not used by this model.
        Without `prompts` they are made here.
        """
        B, T, N = x_enc.shape
        if prompts is None:
            prompts = self.make_prompts(x_enc.cpu()).to(x_enc.device)
        out = self.forecast(x_enc.transpose(1, 2).reshape(B * N, T), prompts, self.text_prototypes())
        return out.view(B, N, self.pred_len).transpose(1, 2)

    def make_prompts(self, x: torch.Tensor) -> Prompts:
        """Windows `[B, T, N]` on the CPU -> the prompts of their B*N sequences, window by window."""
        return Prompts(*pad_prompts([ids for window in x for ids in self.prompts.for_window(window)]))

    def _apply(self, fn, recurse=True):
        """Move the language model along (`.to`, `.cuda`), but leave its number types alone."""
        super()._apply(fn, recurse)
        device = self.output_projection.linear.bias.device
        if isinstance(self.backbone, Backbone) and device != self.backbone.device:
            self.backbone.to(device)
        return self
