"""The frozen language model: loaded, and run over prompts and patches (Time-LLM, section 3.1, "frozen backbone").

One builder serves every language model through transformers' Auto classes.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, PreTrainedModel

from layers.backbone_files import BackboneInfo
from layers.errors import input_error
from layers.fp16 import make_safe


def require_bitsandbytes(flag: str) -> None:
    """Raises InputError where `flag` (without its dashes) needs bitsandbytes and it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise input_error(f"--{flag}", "no bitsandbytes", "an installed one", "install it with: pip install bitsandbytes")


class Backbone:
    """A frozen language model of `layers` layers. Not an nn.Module: it is neither trained nor saved.

    Attributes:
        info: what its folder says of it.
        model: transformers' model, without a head.
        embeddings: `[V, D]` input embeddings, never quantised.
        causal: whether a token sees those before it alone.
        window: how far back it sees; None: to the start.
        recompute: whether the layers run again in the backward pass.
        word_scale: what the layers see of a word over its embedding; Gemma's embedding layer multiplies.
    """

    def __init__(
        self,
        info: BackboneInfo,
        layers: int,
        device: torch.device | str = "cpu",
        four_bit: bool = False,
        recompute: bool = False,
        dtype: torch.dtype | None = None,
        random_seed: int | None = None,
        words_on_host: bool = False,
    ):
        """Read the first `layers` layers; with 0, the word embeddings alone.

        Args:
            dtype: number type of the weights, with `four_bit` of what is computed with them; None: float32 on the
                CPU, bfloat16 on CUDA and with `four_bit`. With float16 the layers must run under autocast to it.
            recompute: keep only each layer's input for the backward pass, and run the layer again there.
            random_seed: draw the weights, of the same architecture, instead of reading them.
            words_on_host: the embeddings go to the computer's memory, whatever the device: for who looks words up in
                them, and multiplies with no more than a block of them at once.

        Raises:
            InputError: more layers than there are, or weights that the folder lacks.
        """
        self.info = info
        self.hidden_size, self.vocab_size = info.hidden_size, info.vocab_size
        self.max_positions, self.causal, self.tokenizer = info.max_positions, info.causal, info.tokenizer
        self.window = info.window
        device = torch.device(device)
        if dtype is None:
            dtype = torch.bfloat16 if four_bit or device.type == "cuda" else torch.float32
        if random_seed is not None:
            self.model = _draw(info, layers, device, dtype, random_seed, words_on_host)
        else:
            self.model = _load(info, layers, device, four_bit, dtype, words_on_host)
        if dtype == torch.float16:
            make_safe(self.model)
        self.model.requires_grad_(False).eval()
        self.recompute = recompute
        self.word_scale = float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))
        self._words_on_host = words_on_host
        if recompute:
            _recompute_layers(self.model)

    @property
    def embeddings(self) -> torch.Tensor:
        return cast(torch.Tensor, self.model.get_input_embeddings().weight)  # (V, D)

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return next(p for p in self.model.parameters() if p is not self.embeddings).device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

    @property
    def stream_dtype(self) -> torch.dtype:
        """Number type of the residual stream, from layer to layer."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward block."""
        return getattr(self.model.config, "intermediate_size", None) or 4 * self.hidden_size

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.model.config.num_attention_heads

    @property
    def groups(self) -> int:
        """Query heads that share a key-value head."""
        config = self.model.config
        return config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    @property
    def plain_attention(self) -> str:
        """Which of transformers' attention functions `plain` uses: "sdpa", where nobody sets another."""
        return self.model.config._attn_implementation

    @plain_attention.setter
    def plain_attention(self, name: str) -> None:
        self.model.config._attn_implementation = name

    def words(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[M, n]`, on any device -> what the layers see of them, `[M, n, D]` on the layers' device."""
        found = self.model.get_input_embeddings()(ids.to(self.embeddings.device, non_blocking=True))
        return found.to(self.device, self.stream_dtype, non_blocking=True)

    def keep_words_on_host(self) -> None:
        """Bring the embeddings to the computer's memory, where `words_on_host` would have put them at once.

        The GPU's memory is left with a hole of their size.
        """
        self._words_on_host = True
        if self.embeddings.device.type != "cpu":
            self.model.get_input_embeddings().to("cpu")  # the whole layer: Gemma's has a scale besides

    def plain(self, opening: list[int], ids: torch.Tensor, length: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """The whole sequence with gradients, through transformers' own masks and attention.

        Args:
            opening: token ids that every sequence starts with.
            ids: `[M, n]` right-padded ids that follow, of which the first `length[m]` count; on any device.
            patches: `[M, L, D]`.

        Returns:
            `[M, L, D]` last hidden states at the patches, in the patches' type.
        """
        M, L, _ = patches.shape
        first = torch.tensor(opening, dtype=torch.long, device=ids.device).expand(M, -1)
        words = self.words(torch.cat([first, ids], dim=1))  # (M, P0 + n, D)
        inputs = torch.cat([words, patches.to(self.stream_dtype)], dim=1)  # (M, P0 + n + L, D)
        slot = torch.arange(inputs.shape[1], device=patches.device)[None]
        start, stop = len(opening), len(opening) + ids.shape[1]
        real = (slot < start + length[:, None]) | (slot >= stop)  # (M, P0 + n + L), no padding
        hidden = self.model(
            inputs_embeds=inputs,
            attention_mask=real.long(),
            position_ids=(real.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, -L:].to(patches.dtype)

    def to(self, device: torch.device) -> "Backbone":
        """Move to another device. A fast path that was made before is for the old one."""
        _move(self.model, device, self._words_on_host)
        return self

    def bytes_per_sequence(self, patches: int, prompt: int, fast: bool, recompute: bool = False) -> int:
        """About what a training step holds for one sequence while it runs backward, in bytes.

        Counted are the tensors that the layers keep for their gradients: on the fast path those of the
        patches and the keys and values of all slots; on the plain path those of all tokens.
        """
        D, layers, inner = self.hidden_size, self.model.config.num_hidden_layers, self.inner_size
        slots = prompt + patches
        wide = self.stream_dtype.itemsize // self.dtype.itemsize  # 2 in fp16, whose residual stream is float32
        if fast:  # residual stream twice, queries, attention's result; gate and up; keys and values
            kept = patches * ((2 * wide + 2) * D + 2 * inner) + slots * 2 * D // self.groups
        else:  # besides, in both norms two float32 copies, the activation, expanded keys and values
            kept = slots * ((13 + wide) * D + 3 * inner)
        if recompute:  # each layer's input; one layer at a time holds the rest
            once_more, kept = kept, (patches if fast else slots) * wide * D + fast * slots * 2 * D // self.groups
        else:
            once_more = 0
        once = (
            once_more + slots * 4 * wide * D + patches * (2 * D + 2 * wide * inner)
        )  # one layer at work, and the embedding
        return (kept * layers + once) * self.embeddings.element_size()


class Recomputed(nn.Module):
    """A decoder layer under activation checkpointing. (transformers' own switch asks for train mode.)"""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str):
        """What a model reads off its layers, such as `attention_type`, is the layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args, **kwargs):
        """As the layer's. Nothing random happens in a frozen layer, so no generator's state has to be kept."""
        return checkpoint(self.layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _recompute_layers(model: PreTrainedModel) -> None:
    """Put every decoder layer of `model` under activation checkpointing."""
    layers = next(
        child
        for child in model.modules()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers
    )
    for i, layer in enumerate(layers):
        layers[i] = Recomputed(layer)


def _config(info: BackboneInfo, layers: int) -> Any:
    if layers > info.layers:
        raise input_error("--llm_layers", layers, f"at most {info.layers}, all that {info.folder} has")
    config = AutoConfig.from_pretrained(info.folder, trust_remote_code=False)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _move(model: PreTrainedModel, device: torch.device, words_on_host: bool) -> None:
    """Move a model, but for its embeddings where they stay on the host: these are not even moved and brought back."""
    layer: Any = model.get_input_embeddings()
    words, where = layer.weight, layer.weight.device
    if words_on_host:
        layer.weight = nn.Parameter(words.new_empty(0), requires_grad=False)
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper has lost its signature
    if words_on_host:
        layer.weight = words
        layer.to(where)  # what it has besides


def _draw(
    info: BackboneInfo, layers: int, device: torch.device, dtype: torch.dtype, seed: int, words_on_host: bool
) -> PreTrainedModel:
    """The architecture, with weights as its authors' training would have begun."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = dict(info.family.options)
        model = AutoModel.from_config(_config(info, layers), attn_implementation="sdpa", dtype=dtype, **options)
    _move(model, device, words_on_host)
    return model


def _load(
    info: BackboneInfo, layers: int, device: torch.device, four_bit: bool, dtype: torch.dtype, words_on_host: bool
) -> PreTrainedModel:
    config = _config(info, layers)
    options = dict(info.family.options)
    places: dict[str, torch.device | str] = {"": device}
    apart = words_on_host and device.type != "cpu"
    if apart:
        places[_words_name(config, options)] = "cpu"
    if four_bit:
        require_bitsandbytes("load_in_4bit")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_enable_fp32_cpu_offload=apart,  # allows any part on the CPU, in any number type
        )
    # The layers left out are reported as unexpected; that report would only alarm. What is missing
    # is checked below.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        with _no_hooks():
            model, found = AutoModel.from_pretrained(
                info.folder,
                config=config,
                dtype=dtype,
                device_map=places,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])[0]
        raise input_error(
            f"--llm_model_path {info.folder}", f"no weights for {missing}", f"those of the first {layers} layers"
        )
    _tame_four_bit_layers(model)
    return model


def _words_name(config: Any, options: dict[str, Any]) -> str:
    """What the embedding layer is called in a model of this architecture."""
    with torch.device("meta"):
        outline = AutoModel.from_config(config, **options)
    layer = outline.get_input_embeddings()
    return next(name for name, module in outline.named_modules() if module is layer)


@contextmanager
def _no_hooks() -> Iterator[None]:
    """Keep transformers from leaving a model whose parts are on several devices to accelerate.

    Its hooks would copy the embeddings to the GPU for each look-up, and drop them again. `Backbone.words` brings the
    ids to the embeddings instead.
    """
    module: Any = transformers.modeling_utils
    dispatch = module.accelerate_dispatch
    module.accelerate_dispatch = lambda *_: None
    try:
        yield
    finally:
        module.accelerate_dispatch = dispatch


def _tame_four_bit_layers(model: nn.Module) -> None:
    """Two habits of bitsandbytes that its layers shall not have here.

    Where the processor has bf16 instructions, it repacks a CPU layer's weights at its first pass without
    gradient, and from then on returns results that carry none. And a weight holds its layer, for the time
    before it is quantised: a cycle, for which a model would stay in memory until the garbage collector comes.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.weight.module = None
