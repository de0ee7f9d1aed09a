"""Memory: what is counted before a run, what is advised when it is short, and that nothing outlives its use."""

import gc
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import utils.training.memory
from layers.backbone import Backbone, find_backbone
from layers.patch import patch_count
from tests.conftest import NAMES
from tests.small_run import command_line, make_batch, random_windows, small_model, train
from utils.flags import parse_flags
from utils.setup import setup
from utils.training.context import Context
from utils.training.memory import advice, main_memory

SEQ_LEN = 128


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/job_7/step_0", "sys/fs/cgroup", ("memory.max", "anon", "max")),  # v2, as Slurm has it
        ("4:memory:/job_7/step_0", "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "total_rss", str(2**63 - 4096))),
        (
            "0::/../../elsewhere",
            "sys/fs/cgroup",
            ("memory.max", "anon", "max"),
        ),  # a container, its own root
        ("0::/", "sys/fs/cgroup", ("memory.max", "anon", "max")),
    ],
)
def test_memory_is_that_of_the_container_or_the_job(monkeypatch, tmp_path: Path, line, folder, names) -> None:
    """The limit of an outer group counts; cached files, which Linux drops, do not."""
    limit, row, none = names
    monkeypatch.setattr(utils.training.memory, "ROOT", tmp_path)
    machine = psutil.virtual_memory()
    assert main_memory()[0] == machine.total  # no groups
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"5:cpuset:/other\n{line}\n")
    outer = tmp_path / folder / ("job_7" if "job_7" in line else "")
    for group, most in ((outer / "step_0", none), (outer, 3_000_000), (tmp_path / folder / "other", 1000)):
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{most}\n")
        (group / "memory.stat").write_text(f"file 2900000\n{row} 1000000\n")
    assert main_memory() == (3_000_000, 2_000_000)


def kept_bytes(forward: Callable[[], torch.Tensor], weights: Iterable[torch.Tensor]) -> int:
    """What a forward pass keeps beside the weights: tensors that autograd saves, and those that are held outside
    of it, as recomputed layers hold their inputs."""
    saved: list[torch.Tensor] = []

    gc.freeze()  # what there is already is not listed below
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
            out = forward()
        held = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    finally:
        gc.unfreeze()
    assert out.requires_grad
    plain = [tensor.untyped_storage() for tensor in saved + held if not tensor.is_mkldnn]
    mine = {tensor.untyped_storage().data_ptr() for tensor in weights if not tensor.is_mkldnn}
    # Each once, however many tensors are views of it.
    return sum({storage.data_ptr(): storage.nbytes() for storage in plain if storage.data_ptr() not in mine}.values())


# How far the estimate may be from what is kept, as a factor. GPT-2 and BERT have other blocks than the decoders
# that were counted: biases, two matrices in place of three, norms with a mean.
@pytest.mark.parametrize(
    ("family", "path", "recompute", "factor"),
    [
        ("qwen2", "auto", False, 1.1), ("gpt2", "auto", False, 1.4), ("llama", "plain", False, 1.4),
        ("bert", "plain", False, 2.4), ("qwen2", "auto", True, 1.1), ("gpt2", "auto", True, 1.1),
        ("bert", "plain", True, 1.01),
    ],
)  # fmt: skip
def test_bytes_of_a_sequence_are_about_what_a_layer_keeps(
    backbones, tmp_path: Path, family: str, path: str, recompute: bool, factor: float
) -> None:
    """Two layers against one: what the second keeps, and the whole, which counts one layer at work besides."""
    estimated, kept = [], []
    for layers in (1, 2):
        backbone = Backbone(find_backbone(NAMES[family], str(backbones[family])), layers, recompute=recompute)
        model = small_model(tmp_path, backbone, llm_model=NAMES[family], fast_path=path, seq_len=SEQ_LEN)
        batch = make_batch(model, random_windows(4, SEQ_LEN))
        patches = torch.randn(len(batch), patch_count(SEQ_LEN, 16, 8), backbone.hidden_size, requires_grad=True)
        assert model.fast_path == (path == "auto")
        inputs = model.prompts.prefix_ids, *batch.prompts, patches
        counted = kept_bytes(
            partial(model.language_model, *inputs), [*backbone.model.parameters(), *backbone.model.buffers()]
        )
        prompt = len(model.prompts.prefix_ids) + batch.prompts.ids.shape[1]
        estimated.append(backbone.bytes_per_sequence(patches.shape[1], prompt, model.fast_path, recompute))
        kept.append(counted / len(batch))
    assert 1 / factor < (estimated[1] - estimated[0]) / (kept[1] - kept[0]) < factor
    assert kept[1] < estimated[1]


# Trained values with --prototypes vocab, by the tensors' shapes: patches 8·16·3; mapping 1000·570 + 1000; queries
# 16·8 + 16; keys and values 16·128 + 16 each; back to the backbone 128·16 + 128; head 8·32 + 8.
VOCAB = 384 + 571_000 + 144 + 2 * 2064 + 2176 + 264
DIRECT = VOCAB - 571_000 + 1000 * 128
# A layer of the backbone: queries and output 128·128 each, keys and values 64·128 each, three biases, three matrices
# of 512·128, two norms; the last norm comes once. float32.
TWO_LAYERS = 4 * (2 * (2 * 16_384 + 2 * 8192 + 256 + 3 * 65_536 + 2 * 128) + 128)


@pytest.mark.parametrize(
    ("flags", "savings"),
    [
        # Beside a value and its gradient (8 bytes) Adam holds two moments (8), in 8 bits 2 bytes. The gradient of the
        # mapping's weight (4) exists as a whole with adamw8bit alone.
        ({}, {"--prototypes direct": 570_000 * 12, "--load_in_4bit": TWO_LAYERS * 0.7,
              "--optimizer adamw8bit": VOCAB * 6 - 570_000 * 4, "--llm_layers 1": TWO_LAYERS / 2}),
        ({"prototypes": "direct"}, {"--load_in_4bit": TWO_LAYERS * 0.7, "--llm_layers 1": TWO_LAYERS / 2,
                                    "--optimizer adamw8bit": DIRECT * 6}),
        ({"optimizer": "adamw8bit"}, {"--prototypes direct": 570_000 * 10, "--load_in_4bit": TWO_LAYERS * 0.7,
                                      "--llm_layers 1": TWO_LAYERS / 2}),
        # What is so already is not named.
        ({"llm_layers": 1, "prototypes": "direct", "optimizer": "adamw8bit", "load_in_4bit": True}, {}),
    ],
)  # fmt: skip
def test_advice_is_ordered_by_what_it_saves(load, tmp_path: Path, flags: dict, savings: dict[str, float]) -> None:
    flags = {"llm_layers": 2} | flags
    backbone = load("qwen2", bool(flags.get("load_in_4bit")))
    args = parse_flags(command_line(tmp_path, backbone.info.folder, **flags))
    named = ", ".join(f"{flag} (saves about {saved / 1e6:.1f} MB)" for flag, saved in savings.items())
    assert list(savings.values()) == sorted(savings.values(), reverse=True)
    named = f"{named}, " if savings else ""
    expected = f"change, in order of effect: {named}a shorter --seq_len; or end other programs that use the GPU"
    assert advice(args, small_model(tmp_path, backbone, **flags)) == expected


def test_a_repeats_model_is_gone_before_the_next_is_loaded(small, capsys, monkeypatch) -> None:
    watched: list[weakref.ref] = []

    def watch(*args: Any) -> Context:
        assert [ref() for ref in watched if ref() is not None] == []
        context = setup(*args)
        held = context, context.training, context.training.optimizer, context.training.saver, context.loaders["train"]
        watched.extend(map(weakref.ref, (*held, *context.model.modules(), *context.model.parameters())))
        watched.extend(map(weakref.ref, (context.model.backbone, *context.model.backbone.model.parameters())))
        return context

    monkeypatch.setattr("utils.run.setup", watch)
    train(small(itr=2, max_iters=2, do_predict=True), capsys)
    assert len(watched) > 2 * 20 and not any(ref() for ref in watched)
