"""The model as a whole: what is trained, what stays frozen, and its figures against plain tensor algebra."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tokenizers import Tokenizer

from data_provider.description import DEFAULT_DESCRIPTION
from layers.backbone import Backbone, BackboneInfo, find_backbone
from layers.errors import InputError
from layers.norm import instance_norm
from models.TimeLLM import Model
from tests.small_run import PRED_LEN, SEQ_LEN, command_line, make_batch, random_windows, small_model
from utils.flags import parse_flags
from utils.training.optimizer import build_optimizer
from utils.training.train import forward_backward

PROJECTIONS = [
    f"reprogramming_layer.{name}_projection.{kind}"
    for name in ("query", "key", "value", "out")
    for kind in ("weight", "bias")
]
TRAINED = [
    "patch_embedding.value_embedding.tokenConv.weight",
    "mapping_layer.weight",
    "mapping_layer.bias",
    *PROJECTIONS,
    "output_projection.linear.weight",
    "output_projection.linear.bias",
]


@pytest.fixture
def model(load, tmp_path: Path) -> Model:
    return small_model(tmp_path, load("qwen2"), llm_layers=2)


def backbone_bytes(model: Model) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in model.backbone.model.state_dict().items()}


def train_steps(model: Model, steps: int = 3) -> None:
    batch = make_batch(model, random_windows())
    optimizer = build_optimizer("adam", model, 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        forward_backward(model, batch, Accelerator(cpu=True))
        optimizer.step()


def test_what_is_trained_and_saved(model) -> None:
    assert set(model.state_dict()) == set(TRAINED)
    assert {name for name, _ in model.named_parameters()} == set(TRAINED)
    assert all(parameter.requires_grad for parameter in model.parameters())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["patch_embedding.value_embedding.tokenConv.weight"] == [8, 16, 3]
    assert shapes["mapping_layer.weight"] == [1000, model.backbone.vocab_size]
    assert shapes["reprogramming_layer.key_projection.weight"] == [16, 128]  # h*f, D
    assert shapes["reprogramming_layer.out_projection.weight"] == [128, 16]
    assert shapes["output_projection.linear.weight"] == [PRED_LEN, 8 * 4]  # H, f*L


def test_backbone_keeps_its_bytes_and_its_eval_mode(model) -> None:
    before = backbone_bytes(model)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    for language_model in (model.language_model, model.backbone.plain):
        model.language_model = language_model
        train_steps(model)
    assert backbone_bytes(model) == before
    assert not any(module.training for module in model.backbone.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.model.parameters())
    still = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, start[name])}
    assert still == {"reprogramming_layer.key_projection.bias"}  # has no effect, so no gradient


def test_direct_prototypes_start_where_the_mapping_layer_does(load, tmp_path: Path) -> None:
    vocab = small_model(tmp_path, load("qwen2"), llm_layers=2)
    direct = small_model(tmp_path, load("qwen2"), llm_layers=2, prototypes="direct")
    W, b = vocab.state_dict()["mapping_layer.weight"], vocab.state_dict()["mapping_layer.bias"]
    start = direct.state_dict()["prototypes"]
    torch.testing.assert_close(start, W @ load("qwen2").embeddings + b[:, None])
    with torch.no_grad():
        assert torch.equal(start, vocab.text_prototypes())
    names = set(TRAINED) - {"mapping_layer.weight", "mapping_layer.bias"} | {"prototypes"}
    assert set(direct.state_dict()) == {name for name, _ in direct.named_parameters()} == names
    x = random_windows()
    with torch.no_grad():
        torch.testing.assert_close(direct(x), vocab(x))


def test_mapping_and_shapes_need_no_weights(load, tmp_path: Path) -> None:
    info = load("qwen2").info
    assert isinstance(info, BackboneInfo)
    args = parse_flags(command_line(tmp_path, info.folder))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Model(args, info).state_dict().items()}
    full = small_model(tmp_path, load("qwen2"), llm_layers=2)
    assert shapes == {name: tensor.shape for name, tensor in full.state_dict().items()}


def test_the_prompt_has_the_description_of_the_data(load, tmp_path: Path) -> None:
    def description(**flags: object) -> str:
        return small_model(tmp_path, load("qwen2"), llm_layers=2, **flags).prompts.template.description

    assert description() == DEFAULT_DESCRIPTION
    assert description(prompt_text="Load of\n a town.") == "Load of a town."
    assert description(prompt_domain=1, data="ETTm2", data_path="ETTm2.csv").startswith("The Electricity Transformer")
    with pytest.raises(InputError, match="--prompt_domain.* 1.*mine.txt"):
        description(prompt_domain=1, data_path="mine.csv")


def test_the_language_model_is_loaded_where_none_is_given(backbones, tmp_path: Path) -> None:
    args = parse_flags(command_line(tmp_path, backbones["qwen2"], llm_layers=2))
    model = Model(args).float()
    assert model(random_windows(2)).shape == (2, PRED_LEN, 2) and model.backbone.device.type == "cpu"


def test_the_language_model_moves_along(backbones, tmp_path: Path) -> None:
    """To another device, with a fast path of its own there; a change of number types is the trained parts' alone."""
    backbone = Backbone(find_backbone("QWEN", str(backbones["qwen2"])), 2)
    model = small_model(tmp_path, backbone, llm_layers=2)
    chosen = model.language_model
    assert model.double().backbone.dtype == torch.float32 and model.language_model is chosen
    model.to("meta")
    assert model.backbone.device.type == "meta" and model.language_model is not chosen
    twin = model.language_model.model
    tensors = [*twin.parameters(), *twin.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert set(map(id, tensors)) == set(map(id, [*backbone.model.parameters(), *backbone.model.buffers()]))


@pytest.mark.parametrize(("family", "name"), [("bert", "BERT"), ("gpt2", "GPT2")])
def test_few_positions(load, tmp_path: Path, family: str, name: str) -> None:
    """With a description far too long, prompt and patches fit into 512 and 1024 positions."""
    text = "A word or two. " * 500
    model = small_model(tmp_path, load(family), llm_model=name, seq_len=512, llm_layers=2, prompt_text=text)
    x = random_windows(2, seq_len=512)
    batch = make_batch(model, x)
    tokens = len(model.prompts.prefix_ids) + int(batch.prompts.length.max()) + 64
    positions = load(family).info.max_positions
    assert positions - 40 < tokens <= positions
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()


# The whole forward pass again, in plain tensor algebra on the weights of the files.


def prompt_text(z: np.ndarray) -> str:
    steps = len(z)
    correlation = [float(np.dot(z.astype(float), np.roll(z.astype(float), -lag))) for lag in range(steps)]
    lags = sorted(range(steps), key=lambda lag: (-round(correlation[lag], 6), lag))[:5]
    return (
        f"<|start_prompt|>Dataset description: {DEFAULT_DESCRIPTION}Task description: forecast the next "
        f"{PRED_LEN} steps given the previous {steps} steps information; Input statistics: "
        f"min value {float(z.min())}, "
        f"max value {float(z.max())}, median value {float(np.sort(z)[(steps - 1) // 2])}, "
        f"the trend of input is {'upward' if z[-1] > z[0] else 'downward'}, "
        f"top 5 lags are : {lags}<|<end_prompt>|>"
    )


def qwen2(folder: Path, inputs: torch.Tensor) -> torch.Tensor:
    """Qwen2's decoder `[n, D]` -> `[n, D]`: RMS norm, rotary positions, grouped queries, SwiGLU."""
    config = json.loads((folder / "config.json").read_text())
    w = {k: t.double() for shard in folder.glob("*.safetensors") for k, t in load_file(shard).items()}
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    n, width = len(inputs), config["hidden_size"] // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[f"model.{name}.weight"]

    theta = config["rope_parameters"]["rope_theta"]
    angle = torch.arange(n)[:, None].double() / theta ** (torch.arange(0, width, 2).double() / width)

    def turn(x: torch.Tensor) -> torch.Tensor:  # (heads, n, e): value i is paired with value i + e/2
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    x = inputs.double()
    for i in range(config["num_hidden_layers"]):

        def linear(y: torch.Tensor, name: str, i: int = i) -> torch.Tensor:
            bias = w.get(f"model.layers.{i}.{name}.bias", 0.0)
            return y @ w[f"model.layers.{i}.{name}.weight"].T + bias

        y = norm(x, f"layers.{i}.input_layernorm")
        q, k, v = (
            linear(y, f"self_attn.{p}_proj").view(n, count, width).transpose(0, 1)
            for p, count in (("q", heads), ("k", kv), ("v", kv))
        )
        mixed = []
        for head in range(heads):
            group = head // (heads // kv)
            scores = turn(q[head : head + 1])[0] @ turn(k[group : group + 1])[0].T / width**0.5
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
            mixed.append(scores.softmax(-1) @ v[group])
        x = x + linear(torch.cat(mixed, dim=-1), "self_attn.o_proj")
        y = norm(x, f"layers.{i}.post_attention_layernorm")
        gate = linear(y, "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(y, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "norm")


def forecast(folder: Path, trained: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """Model.md's steps 2 to 7 for one series `[T]` -> `[H]`; h = 2 heads of f = 8, P = 16, S = 8."""
    t = {name: tensor.double() for name, tensor in trained.items()}

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt_text(z.numpy())).ids
    shards = [load_file(shard) for shard in folder.glob("*.safetensors")]
    E = next(s["model.embed_tokens.weight"] for s in shards if "model.embed_tokens.weight" in s).double()

    padded = torch.cat([z, z[-1:].repeat(8)]).double()
    patches = torch.stack([padded[i * 8 : i * 8 + 16] for i in range((SEQ_LEN - 16) // 8 + 2)])  # (L, P)
    L = len(patches)
    kernel = t["patch_embedding.value_embedding.tokenConv.weight"]  # (d, P, 3)
    tokens = torch.stack([sum(kernel[:, :, j] @ patches[(i + j - 1) % L] for j in range(3)) for i in range(L)])

    prototypes = t["mapping_layer.weight"] @ E + t["mapping_layer.bias"][:, None]  # (K, D)

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        layer = f"reprogramming_layer.{name}_projection"
        return x @ t[f"{layer}.weight"].T + t[f"{layer}.bias"]

    q, k, v = project(tokens, "query"), project(prototypes, "key"), project(prototypes, "value")
    heads = [(q[:, s] @ k[:, s].T / 8**0.5).softmax(-1) @ v[:, s] for s in (slice(0, 8), slice(8, 16))]
    patches = project(torch.cat(heads, dim=-1), "out")  # (L, D)

    hidden = qwen2(folder, torch.cat([E[ids], patches]))[-L:, :8]  # (L, f)
    return t["output_projection.linear.weight"] @ hidden.T.flatten() + t["output_projection.linear.bias"]


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_against_plain_tensor_algebra(load, tmp_path: Path, path: str) -> None:
    model = small_model(tmp_path, load("qwen2"), llm_layers=2, fast_path=path)
    x = random_windows(2, seed=5)[1:]  # (1, T, N)
    x[..., 0] = x[..., 0] * 1000 + 20
    # Step 1 has a test of its own; its last bit would show in the digits of the prompt.
    z, mean, deviation = instance_norm(x[0].T.contiguous())
    with torch.no_grad():
        found = model(x)[0].T  # (N, H)
    for channel, series in enumerate(z):
        expected = forecast(model.backbone.info.folder, model.state_dict(), series)
        assert ((found[channel] - mean[channel]) / deviation[channel] - expected).abs().max() < 1e-5
