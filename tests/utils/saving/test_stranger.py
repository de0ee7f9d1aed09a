"""A checkpoint from a stranger, or from a failing disk, is refused with one line and runs nothing."""

import json
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from layers.errors import InputError
from utils.command_line import parse_flags
from utils.results.forecast import read_history
from utils.saving.checkpoint import Checkpoint, save_checkpoint
from utils.saving.record import TENSORS, read_record
from utils.saving.tensors import write_tensors

SHAPES = {"weight": (3, 2), "bias": (3,)}


def saved(folder: Path) -> Path:
    save_checkpoint(folder, torch.nn.Linear(2, 3).state_dict(), {"columns": ["ü"]})
    return folder / TENSORS


def test_saved_and_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(saved(tmp_path))
    tensors, record = checkpoint.tensors(SHAPES), checkpoint.record
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    assert record["columns"] == ["ü"] and record == json.loads((tmp_path / "checkpoint.json").read_text("utf-8"))


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        with pytest.raises(InputError, match=r"^--checkpoint .*(damaged|shape|tensor)"):
            Checkpoint.open(path).tensors(SHAPES)


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
    with pytest.raises(InputError, match="got something else than tensors"):
        Checkpoint.open(tmp_path).tensors(SHAPES)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("held", [{1: torch.ones(1)}, {"module": 3}, [torch.ones(1)], {"../../x": torch.ones(1)}])
def test_strange_names_are_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "checkpoint")
    with pytest.raises(InputError, match="got (no|the unknown) tensor"):
        Checkpoint.open(tmp_path / "checkpoint").tensors(SHAPES)


@pytest.mark.parametrize("record", ["nonsense", "[]", "[" * 100_000, '{"backbone": 3}', '{"flags": []}', '{"data": 3}'])
def test_a_strange_record_is_refused(tmp_path: Path, record: str) -> None:
    write_tensors(tmp_path / TENSORS, torch.nn.Linear(2, 3).state_dict(), {"record": record})
    with pytest.raises(InputError, match="got a record that cannot be read"):
        Checkpoint.open(tmp_path / TENSORS).tensors(SHAPES)


@pytest.mark.parametrize(
    "entries",
    [
        [], 3, {"weight": 3}, {"weight": {"shape": 3}}, {"weight": {"shape": ["a"]}}, {"weight": {"shape": [float("inf")]}},
        {"__metadata__": []}, {"__metadata__": {"record": 3}}, {"__metadata__": None},
    ],
)  # fmt: skip
def test_a_strange_header_is_refused(tmp_path: Path, entries: object) -> None:
    text = json.dumps(entries).encode()
    (tmp_path / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="^--checkpoint .*: got a damaged file .it has no header of a safetensors file"):
        Checkpoint.open(tmp_path)
    assert read_record(tmp_path) == {}


@pytest.mark.parametrize("length", [0, 2, 2**40, 2**63])
def test_a_header_that_is_not_as_long_as_it_says_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / TENSORS).write_bytes(length.to_bytes(8, "little") + b"{}"[: max(length - 1, 0)])
    with pytest.raises(InputError, match="got a damaged file"):
        Checkpoint.open(tmp_path)


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
        ("e_layers", ["/../../x"], "--checkpoint "), ("e_layers", "/../../x", "--e_layers: got '/../../x'"),
        ("seq_len", [1], "--checkpoint "), ("seq_len", -1, "--seq_len: got '-1'"), ("des", {}, "--checkpoint "),
    ],
)  # fmt: skip
def test_strange_flags_in_a_record_are_one_line(tmp_path: Path, capsys, name, value, found) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_flags(["--is_training", "0", "--checkpoint", str(written(tmp_path, {"flags": FLAGS | {name: value}}))])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith(f"run_main.py: error: {found}") and line.count("\n") == 1


@pytest.mark.parametrize("record", [[], 3, {"flags": []}, {"flags": 3, "data": {}}, {"data": []}])
def test_a_record_of_another_shape_is_none(tmp_path: Path, record: object) -> None:
    assert read_record(written(tmp_path, record)) == {}


@pytest.mark.parametrize(
    "part",
    [
        {"columns": 3}, {"columns": [[1]]}, {"columns": []}, {"scaler": {"mean": ["a"]}}, {"scaler": {"mean": [0.0]}},
        {"scaler": {"mean": [0.0, 0.0], "deviation": [1.0]}}, {"scaler": {"mean": [True], "deviation": [1.0]}},
        {"scaler": {"mean": [float("nan")], "deviation": [1.0]}}, {"scaler": {"mean": [0.0], "deviation": [float("inf")]}},
        {"scaler": {"mean": [10**400], "deviation": [1.0]}}, {},
    ],
)  # fmt: skip
def test_a_record_without_scaler_is_refused(tmp_path: Path, part: dict) -> None:
    good = {"flags": {}, "data": {}, "columns": ["a"], "scaler": {"mean": [0.0], "deviation": [1.0]}}
    record = good | part if part else {"flags": {}}
    with pytest.raises(InputError, match="^--checkpoint .*: got a record without"):
        read_history(Namespace(predict_path=None), Checkpoint.open(written(tmp_path, record)))
