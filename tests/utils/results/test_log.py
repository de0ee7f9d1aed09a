"""The journal's events for TensorBoard, which is not among the libraries that a run takes: a stand-in records them."""

import csv
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from tests.small_run import run_folder, train


class Writer:
    """In place of TensorBoard's SummaryWriter."""

    def __init__(self, log_dir: Path):
        self.log_dir, self.scalars, self.kept, self.closed = log_dir, {}, {}, False

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.setdefault(tag, {})[global_step] = scalar_value

    def flush(self) -> None:
        self.kept = {tag: dict(points) for tag, points in self.scalars.items()}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    """An installed TensorBoard; the writers that are made."""
    made: list[Writer] = []
    installed, torchs_door = ModuleType("tensorboard"), ModuleType("torch.utils.tensorboard")
    installed.__spec__ = ModuleSpec("tensorboard", None)
    torchs_door.SummaryWriter = lambda log_dir: made.append(Writer(log_dir)) or made[-1]
    monkeypatch.setitem(sys.modules, "tensorboard", installed)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", torchs_door)
    return made


def rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_events_are_those_of_the_csv_files(argv, capsys, writers) -> None:
    words = argv(train_epochs=2, tensorboard=True)
    lines, folder = train(words, capsys), run_folder(words)
    (writer,) = writers
    assert writer.log_dir == folder / "tensorboard" and not any("TensorBoard" in line for line in lines)
    expected: dict[str, dict[int, float]] = {}
    for row in rows(folder / "steps.csv"):
        at = 11 * int(row["epoch"] - 1) + int(row["iteration"])
        expected.setdefault("step/loss", {})[at] = row["loss"]
        expected.setdefault("step/learning_rate", {})[at] = row["learning_rate"]
    assert list(expected["step/loss"]) == list(range(1, 23))
    assert [expected["step/learning_rate"][at] for at in (1, 22)] == [1e-3, 5e-4]
    for row in rows(folder / "history.csv"):
        for name in row.keys() - {"epoch"}:
            expected.setdefault(f"epoch/{name}", {})[int(row["epoch"])] = row[name]
    assert {"epoch/train_loss", "epoch/vali_loss", "epoch/test_loss", "epoch/seconds"} < expected.keys()
    assert writer.kept == expected and writer.closed


def test_a_run_goes_on_without_tensorboard(argv, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # not installed, wherever the tests run
    words = argv(max_iters=1, tensorboard=True)
    lines = train(words, capsys)
    assert [line for line in lines if "TensorBoard" in line] == [
        "--tensorboard: TensorBoard is not installed (pip install tensorboard); the run goes on without events"
    ]
    assert any(line.startswith("Test MSE") for line in lines) and not (run_folder(words) / "tensorboard").exists()
    assert not any("TensorBoard" in line for line in train(argv(max_iters=1), capsys))
