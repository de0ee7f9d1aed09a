"""A checkpoint from a stranger, or from a failing disk, is refused with one line and runs nothing."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from layers.errors import InputError
from utils.checkpoint import TENSORS, find_checkpoint, read_checkpoint, save_checkpoint
from utils.tensors import write_tensors

SHAPES = {"weight": (3, 2), "bias": (3,)}


def saved(folder: Path) -> Path:
    save_checkpoint(folder, torch.nn.Linear(2, 3), {"columns": ["ü"]})
    return folder / TENSORS


def test_saved_and_read(tmp_path: Path) -> None:
    tensors, record = read_checkpoint(saved(tmp_path), SHAPES)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    assert record["columns"] == ["ü"] and record == json.loads((tmp_path / "checkpoint.json").read_text("utf-8"))


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        with pytest.raises(InputError, match=r"^--checkpoint .*(damaged|shape|tensor)"):
            read_checkpoint(path, SHAPES)


class Bomb:
    """Runs code where it is unpickled without care."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("how", ["torch", "torch, nested", "pickle"])
def test_no_pickle_runs(tmp_path: Path, how: str) -> None:
    bomb, path = Bomb(tmp_path / "exploded"), tmp_path / "checkpoint"
    if how == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"weight": torch.ones(3, 2), "bias": torch.ones(3), "x": bomb} if "," in how else bomb, path)
    with pytest.raises(InputError, match="found something else than tensors"):
        read_checkpoint(find_checkpoint(tmp_path), SHAPES)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("held", [{1: torch.ones(1)}, {"module": 3}, [torch.ones(1)], {"../../x": torch.ones(1)}])
def test_strange_names_are_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "checkpoint")
    with pytest.raises(InputError, match="found (no|the unknown) tensor"):
        read_checkpoint(tmp_path / "checkpoint", SHAPES)


@pytest.mark.parametrize("record", ["nonsense", "[]", '{"backbone": 3}'])
def test_a_strange_record_is_refused(tmp_path: Path, record: str) -> None:
    write_tensors(tmp_path / TENSORS, torch.nn.Linear(2, 3).state_dict(), {"record": record})
    with pytest.raises(InputError, match="found a record that cannot be read"):
        read_checkpoint(tmp_path / TENSORS, SHAPES)
