"""Backbones that all tests share: one tiny folder of each family, read once."""

import gc
import os
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: models this small gain nothing
# from threads, and threads that wait for each other on a busy machine cost seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from safetensors.torch import load_file, save_file

from layers.backbone import Backbone, find_backbone
from scripts.make_backbone import make_backbone

NAMES = {"qwen2": "QWEN", "llama": "LLAMA", "gpt2": "GPT2", "bert": "BERT"}


@pytest.fixture(autouse=True, scope="module")
def frozen_modules():
    """A run collects garbage twice; without the libraries' own objects to go through, that takes no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def enliven(folder: Path) -> Path:
    """Give a random backbone's matrices the size that keeps signals alive through its layers.

    At the usual initial deviation of 0.02 a narrow model hardly looks at its prompt or at positions:
    a test of either would pass without them.
    """
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        matrices = {name: t * 5 for name, t in tensors.items() if t.dim() == 2 and "embed" not in name and "wte" not in name}
        save_file(tensors | matrices, shard, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder of a tiny backbone with 2 layers, as downloaded models lie on the disk."""
    root = tmp_path_factory.mktemp("backbones")
    return {family: enliven(make_backbone(root / family, family=family)) for family in NAMES}


@pytest.fixture(scope="session")
def load(backbones: dict[str, Path]):
    """`load(family, four_bit)`: that backbone with both of its layers, read once a session."""
    held: dict[tuple[str, bool], Backbone] = {}

    def loaded(family: str, four_bit: bool = False) -> Backbone:
        key = family, four_bit
        if key not in held:
            held[key] = Backbone(find_backbone(NAMES[family], str(backbones[family])), 2, four_bit=four_bit)
        return held[key]

    return loaded


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Sums in one order, whatever the machine; and no fight over its cores."""
    torch.set_num_threads(1)
