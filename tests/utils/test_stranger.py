"""A checkpoint from a stranger, or from a failing disk, is refused with one line and runs nothing."""

import json
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from layers.errors import InputError
from utils.checkpoint import TENSORS, find_checkpoint, read_checkpoint, save_checkpoint
from utils.flags import parse_flags
from utils.forecast import read_history
from utils.recorded import recorded
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


def written(folder: Path, record: object) -> Path:
    write_tensors(folder / TENSORS, torch.nn.Linear(2, 3).state_dict(), {"record": json.dumps(record)})
    return folder


FLAGS = {
    "task_name": "long_term_forecast", "model": "TimeLLM", "model_id": "a", "model_comment": "b", "data": "custom",
    "data_path": "x.csv", "load_in_4bit": False, "e_layers": 3, "dropout": 0.2,
}  # fmt: skip


def test_flags_of_a_record_are_read_as_a_users_own(tmp_path: Path) -> None:
    args = parse_flags(["--is_training", "0", "--checkpoint", str(written(tmp_path, {"flags": FLAGS}))])
    assert (args.load_in_4bit, args.e_layers, args.dropout) == (False, 3, 0.2)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("e_layers", ["/../../x"], "--checkpoint "), ("e_layers", "/../../x", "--e_layers: found '/../../x'"),
        ("seq_len", [1], "--checkpoint "), ("seq_len", -1, "--seq_len: found '-1'"), ("des", {}, "--checkpoint "),
    ],
)  # fmt: skip
def test_strange_flags_in_a_record_are_one_line(tmp_path: Path, capsys, name, value, found) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_flags(["--is_training", "0", "--checkpoint", str(written(tmp_path, {"flags": FLAGS | {name: value}}))])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith(f"run_main.py: error: {found}") and line.count("\n") == 1


@pytest.mark.parametrize("record", [[], 3, {"flags": []}, {"flags": 3, "data": {}}, {"data": []}])
def test_a_record_of_another_shape_is_none(tmp_path: Path, record: object) -> None:
    assert recorded(written(tmp_path, record)) == {}


@pytest.mark.parametrize("part", [{"columns": 3}, {"scaler": {"mean": ["a"]}}, {"columns": [[1]]}, {}])
def test_a_record_without_scaler_is_refused(tmp_path: Path, part: dict) -> None:
    good = {"flags": {}, "data": {}, "columns": ["a"], "scaler": {"mean": [0.0], "deviation": [1.0]}}
    record = good | part if part else {"flags": {}}
    with pytest.raises(InputError, match="^--checkpoint .*: found a record without"):
        read_history(Namespace(predict_path=None), written(tmp_path, record) / TENSORS)
