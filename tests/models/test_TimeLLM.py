"""The model as a whole: what is trained, what stays frozen, and its figures against plain tensor algebra."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from transformers import AutoModel

from data_provider.description import DEFAULT_DESCRIPTION
from layers.backbone import Backbone, find_backbone
from layers.errors import InputError
from layers.norm import instance_norm
from models.TimeLLM import Model
from tests.conftest import NAMES
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


def test_what_is_trained_and_saved(model, tmp_path: Path) -> None:
    assert set(model.state_dict()) == set(TRAINED)
    assert {name for name, _ in model.named_parameters()} == set(TRAINED)
    assert all(parameter.requires_grad for parameter in model.parameters())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["patch_embedding.value_embedding.tokenConv.weight"] == [8, 16, 3]
    assert shapes["mapping_layer.weight"] == [1000, model.backbone.vocab_size]
    assert shapes["reprogramming_layer.key_projection.weight"] == [16, 128]  # h*f, D
    assert shapes["reprogramming_layer.out_projection.weight"] == [128, 16]
    assert shapes["output_projection.linear.weight"] == [PRED_LEN, 8 * 4]  # H, f*L
    args = parse_flags(command_line(tmp_path, model.backbone.info.folder))
    with torch.device("meta"):  # shapes need no weights
        bare = Model(args, model.backbone.info).state_dict()
    assert shapes == {name: list(tensor.shape) for name, tensor in bare.items()}


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


def test_training_moves_the_trained_parts_and_leaves_the_backbone_its_bytes(model) -> None:
    held = model.backbone.model.state_dict()
    before, start = ({name: t.clone() for name, t in state.items()} for state in (held, model.state_dict()))
    batch, optimizer = make_batch(model.train(), random_windows()), build_optimizer("adam", model, 1e-2)
    for language_model in (model.language_model, model.backbone.plain):
        model.language_model = language_model
        model.zero_grad()
        forward_backward(model, batch, Accelerator(cpu=True))
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in held.items())
    assert not any(module.training for module in model.backbone.model.modules())
    still = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, start[name])}
    assert still == {"reprogramming_layer.key_projection.bias"}  # has no effect, so no gradient


def test_direct_prototypes_start_where_the_mapping_layer_does(load, tmp_path: Path) -> None:
    vocab, direct = (small_model(tmp_path, load("qwen2"), llm_layers=2, prototypes=kind) for kind in ("vocab", "direct"))
    W, b = vocab.state_dict()["mapping_layer.weight"], vocab.state_dict()["mapping_layer.bias"]
    torch.testing.assert_close(direct.state_dict()["prototypes"], W @ load("qwen2").embeddings + b[:, None])
    names = set(TRAINED) - {"mapping_layer.weight", "mapping_layer.bias"} | {"prototypes"}
    assert set(direct.state_dict()) == {name for name, _ in direct.named_parameters()} == names
    x = random_windows()
    with torch.no_grad():
        torch.testing.assert_close(direct(x), vocab(x))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_description_far_too_long_leaves_room_for_the_patches(load, tmp_path: Path, family: str) -> None:
    """In 512 and 1024 positions."""
    flags = {"llm_model": family.upper(), "seq_len": 512, "llm_layers": 2, "prompt_text": "A word or two. " * 500}
    model, x = small_model(tmp_path, load(family), **flags), random_windows(2, seq_len=512)
    tokens = len(model.prompts.prefix_ids) + int(make_batch(model, x).prompts.length.max()) + 64
    positions = load(family).info.max_positions
    assert positions - 40 < tokens <= positions and torch.isfinite(model(x)).all()


def test_the_prompt_has_the_description_of_the_data(load, tmp_path: Path) -> None:
    def description(**flags: object) -> str:
        return small_model(tmp_path, load("qwen2"), **flags).prompts.template.description

    assert description(prompt_text="Load of\n a town.") == "Load of a town."
    assert description(prompt_domain=1, data="ETTm2", data_path="ETTm2.csv").startswith("The Electricity Transformer")
    with pytest.raises(InputError, match="--prompt_domain.* 1.*mine.txt"):
        description(prompt_domain=1, data_path="mine.csv")


# The whole forward pass again, in plain tensor algebra around transformers' own reading of the folder.


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


def forecast(folder: Path, trained: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """Model.md's steps 2 to 7 for one series `[T]` -> `[H]`; h = 2 heads of f = 8, P = 16, S = 8."""
    t = {name: tensor.double() for name, tensor in trained.items()}
    language_model = AutoModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    E = language_model.get_input_embeddings().weight  # (V, D)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt_text(z.numpy())).ids

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

    hidden = language_model(inputs_embeds=torch.cat([E[ids], patches])[None]).last_hidden_state[0, -L:, :8]  # (L, f)
    return t["output_projection.linear.weight"] @ hidden.T.flatten() + t["output_projection.linear.bias"]


@pytest.mark.parametrize("path", ["auto", "plain"])
@pytest.mark.parametrize("family", NAMES)
def test_against_plain_tensor_algebra(load, tmp_path: Path, family: str, path: str) -> None:
    model = small_model(tmp_path, load(family), llm_model=NAMES[family], llm_layers=2, fast_path=path)
    x = random_windows(2, seed=5)[1:]  # (1, T, N)
    x[..., 0] = x[..., 0] * 1000 + 20
    # Step 1 has a test of its own; its last bit would show in the digits of the prompt.
    z, mean, std = instance_norm(x[0].T.contiguous())
    with torch.no_grad():
        found = model(x)[0].T  # (N, H)
        for channel, series in enumerate(z):
            expected = forecast(model.backbone.info.folder, model.state_dict(), series)
            assert ((found[channel] - mean[channel]) / std[channel] - expected).abs().max() < 1e-5
