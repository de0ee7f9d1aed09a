"""Time-LLM: Time Series Forecasting by Reprogramming Large Language Models (Jin et al., ICLR 2024).

Read beside section 3 of the paper. Shapes: B windows, N channels, M = B*N sequences, T = seq_len,
H = pred_len, L patches, d = d_model, h = n_heads, f = d_ff, D = the language model's width,
V = its vocabulary, K text prototypes.
"""

from argparse import Namespace
from typing import cast

import torch
from torch import nn

from data_provider.batches import Batch
from data_provider.description import dataset_description
from layers.ablation import SUBSTITUTES, Nothing
from layers.backbone import Backbone, BackboneInfo, find_backbone
from layers.fast import FastPath, LanguageModel, choose_path, cross_attention
from layers.mapping import MappingLayer
from layers.norm import instance_norm
from layers.notes import NotesEffect
from layers.patch import FlattenHead, PatchEmbedding, patch_count
from layers.prompt import PromptEncoder, Prompts, PromptTemplate, pad_prompts
from layers.reprogramming import ReprogrammingLayer
from models.base import ForecastModel
from models.LinearStack import Model as LinearStack

PROTOTYPES = 1000


def layers_of(configs: Namespace) -> int:
    """How many of the language model's layers are loaded: none where something stands in their place."""
    return 0 if configs.llm_ablation in SUBSTITUTES else configs.llm_layers


class Model(ForecastModel):
    """The trained parts, and the frozen language model they feed.

    The language model is no nn.Module: it has no place among the parameters, in the state dict or in `train()`.

    Attributes:
        language_model: runs the frozen layers: `layers.fast.FastPath` where it may, else `backbone.plain`; with
            `--llm_ablation`, `substitute` in their place.
        fast_path: whether the patches run over a frozen prompt.
    """

    uses_llm = True
    reads_masks = True
    prototypes: nn.Parameter  # (K, D), with `--prototypes direct` alone

    def __init__(
        self,
        configs: Namespace,
        backbone: Backbone | BackboneInfo | None = None,
        prompts: PromptEncoder | None = None,
    ):
        """Args:
            configs: the run's flags.
            backbone: the language model; None loads the one that the flags name. With a BackboneInfo
                the model can be built (for its shapes, on the meta device) but not run.
            prompts: the prompts' encoder, where it was made before; None makes it, where one is needed.

        Raises:
            InputError: the backbone's files or the data set's description are missing, or the prompt does not fit.
        """
        super().__init__()
        if backbone is None:
            backbone = Backbone(
                find_backbone(configs.llm_model, configs.llm_model_path),
                layers_of(configs),
                four_bit=configs.load_in_4bit,
                recompute=configs.grad_checkpoint,
                random_seed=configs.seed if configs.llm_ablation == "random" else None,
            )
        patches = patch_count(configs.seq_len, configs.patch_len, configs.stride)
        # A BackboneInfo has its shapes, and that is all that it is asked for.
        self.backbone = cast(Backbone, backbone)
        self.pred_len, self.d_ff = configs.pred_len, configs.d_ff

        self.patch_embedding = PatchEmbedding(configs.patch_len, configs.stride, configs.d_model, configs.dropout)
        self.reprogramming_layer: ReprogrammingLayer | nn.Linear
        if configs.use_reprogramming:
            self.mapping_layer = MappingLayer(backbone.vocab_size, PROTOTYPES)
            if configs.prototypes == "direct":
                # From where the mapping layer would have started. E has more rows than columns, so W·E + b can be any
                # K x D matrix: the same set of prototypes is within reach with K·D values in place of K·V.
                start = self.mapping_layer.bias.new_empty(PROTOTYPES, backbone.hidden_size)
                if isinstance(backbone, Backbone):
                    with torch.no_grad():
                        start = self.mapping_layer(backbone.embeddings, backbone.embedding_scale)
                self.prototypes, self.mapping_layer = nn.Parameter(start), None
            self.reprogramming_layer = ReprogrammingLayer(
                configs.d_model, configs.n_heads, configs.d_ff, backbone.hidden_size, attend=cross_attention
            )
        else:
            self.reprogramming_layer = nn.Linear(configs.d_model, backbone.hidden_size)
        if isinstance(backbone, Backbone) and self.mapping_layer is None:  # no step multiplies with them
            backbone.keep_embeddings_on_host()
        self.output_projection = FlattenHead(configs.d_ff, patches, configs.pred_len, configs.dropout, configs.head_dropout)
        substitute = SUBSTITUTES.get(configs.llm_ablation)
        self.substitute = substitute(backbone.hidden_size, backbone.heads) if substitute else None
        self.stack = LinearStack(configs) if configs.skip == "stack" else None
        self.history = 0 if self.stack is None else self.stack.history
        if configs.skip != "none":  # a linear map of the normalised window
            zeros = torch.zeros(configs.seq_len, configs.pred_len)
            if self.stack is None:
                self.linear_map = zeros if configs.skip == "ridge" else nn.Parameter(zeros)  # ridge's: saved, not trained
        if configs.skip_mode == "beside":
            self.head_share = torch.full((1,), 0.5)
        elif configs.skip != "none":  # the head adds to the map, from zero on
            for parameter in self.output_projection.parameters():
                nn.init.zeros_(parameter)

        if getattr(configs, "reads_notes", False):  # last, so that all before begins as without
            self.notes = NotesEffect(backbone.hidden_size, configs.seq_len, configs.pred_len)

        reads_prompt = configs.use_prompt and not isinstance(self.substitute, Nothing)
        if prompts is None and reads_prompt:
            words = PromptTemplate(
                dataset_description(configs), configs.seq_len, configs.pred_len, configs.prompt_decimals, configs.prompt_lags
            )
            says_notes = self.notes is not None and bool(configs.text_prompt)
            prompts = PromptEncoder(backbone.tokenizer, words, backbone.max_positions - patches, says_notes)
        self.prompts = prompts if reads_prompt else None
        longest = 0 if self.prompts is None else self.prompts.longest
        sees_all = backbone.window >= longest + patches  # in bfloat16 the trial would not see a few words missing
        self.fast_path = configs.fast_path == "auto" and sees_all and self.substitute is None
        self.language_model: LanguageModel = self._run_substitute
        self.why_plain = ""
        if isinstance(backbone, Backbone) and self.substitute is None:
            self.language_model, self.why_plain = choose_path(
                backbone, self.prefix_ids, longest - len(self.prefix_ids), patches, self.fast_path
            )
            self.fast_path = isinstance(self.language_model, FastPath)

    @property
    def prefix_ids(self) -> list[int]:
        """Token ids that every prompt starts with; none without prompts."""
        return [] if self.prompts is None else self.prompts.prefix_ids

    def path(self) -> str:
        """How the language model runs, for the log."""
        if self.substitute is not None:
            return f"no language model ({type(self.substitute).__name__})"
        return "fast path" if self.fast_path else "plain path" + (f" ({self.why_plain})" if self.why_plain else "")

    def forward(self, batch: Batch, prototype_kv: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
        """See `ForecastModel`. Prompts that the data loader has not made are made here."""
        return self.with_notes(batch, self._forecast(batch, prototype_kv))

    def _forecast(self, batch: Batch, prototype_kv: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        x, prompts = batch.x, batch.prompts
        if prototype_kv is None:
            prototype_kv = self.prototype_kv()
        if prompts is None:
            seen = x if self.prompts is None else x.cpu()  # prompts of no token say nothing of x
            prompts = self.make_prompts(seen[:, :, None], batch.notes).to(x.device)
        z, mean, std = instance_norm(x, batch.x_mask)  # (M, T), (M, 1), (M, 1)
        tokens = self.patch_embedding(z)  # (M, L, d)
        patches = self.reprogramming_layer(tokens, *prototype_kv)  # (M, L, D)
        hidden = self.language_model(self.prefix_ids, *prompts, patches)  # (M, L, D)
        out = self.output_projection(hidden[..., : self.d_ff])  # (M, H)
        if self.head_share is not None:
            own = out * std + mean
            return own if self.training else torch.lerp(self.linear_forecast(batch), own, self.head_share)
        if self.linear_map is not None:
            with torch.autocast(x.device.type, enabled=False):
                out = out + z @ self.linear_map
        return out * std + (mean if self.stack is None else self.stack(batch))

    def linear_forecast(self, batch: Batch) -> torch.Tensor:
        """See `ForecastModel`: that of `--skip`."""
        return super().linear_forecast(batch) if self.stack is None else self.stack(batch)

    def prototype_kv(self) -> tuple[torch.Tensor, ...]:
        """Keys and values of the K text prototypes, each `[1, h, K, f]`; without reprogramming nothing.

        They depend on trained tensors only: once a step, or once an evaluation, is enough.
        """
        if not isinstance(self.reprogramming_layer, ReprogrammingLayer):
            return ()
        return self.reprogramming_layer.keys_values(self.text_prototypes())

    def text_prototypes(self) -> torch.Tensor:
        """W·E + b `[K, D]` of the token embeddings E, multiplied in their number type."""
        if self.mapping_layer is None:
            return self.prototypes
        return self.mapping_layer(self.backbone.embeddings, self.backbone.embedding_scale)  # (V, D) -> (K, D)

    def make_prompts(self, x: torch.Tensor, notes: torch.Tensor | None = None) -> Prompts:
        """Windows `[B, T, N]` on the CPU and their notes `[B, k, 4]` -> the prompts of their B*N sequences, window by
        window; without prompts, ones of no token."""
        if self.prompts is None:
            return pad_prompts([[]] * (x.shape[0] * x.shape[2]))
        return pad_prompts(self.prompts.for_windows(x, notes))

    # As `Backbone.plain`; the prompt's padding is hidden from what stands in the language model's place.
    def _run_substitute(
        self, prompt_prefix: list[int], ids: torch.Tensor, length: torch.Tensor, patches: torch.Tensor
    ) -> torch.Tensor:
        assert self.substitute is not None
        first = torch.tensor(prompt_prefix, dtype=torch.long, device=ids.device).expand(len(ids), -1)
        embedded = self.backbone.token_embeddings(torch.cat([first, ids], dim=1))  # (M, P0 + n, D)
        slot = torch.arange(embedded.shape[1], device=embedded.device)
        return self.substitute(embedded, slot < len(prompt_prefix) + length[:, None], patches)

    # Move the language model along (`.to`, `.cuda`), but leave its number types alone.
    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        device = self.output_projection.linear.bias.device
        if isinstance(self.backbone, Backbone) and device != self.backbone.device:
            self.backbone.to(device)
            if self.fast_path:
                self.language_model = FastPath(self.backbone)
        return self
