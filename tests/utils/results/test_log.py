"""A run's journal: events for TensorBoard, which is not among the libraries that a run takes, are those of the CSV files."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import Mock

import pandas as pd

from tests.small_run import run_folder, train
from utils.results.log import RunLog

MISSING = "--tensorboard: TensorBoard is not installed (pip install tensorboard); the run goes on without events"


def test_events_are_those_of_the_csv_files(argv, capsys, monkeypatch) -> None:
    installed, writer = ModuleType("tensorboard"), Mock()
    installed.__spec__ = ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", installed)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock(SummaryWriter=writer))
    words = argv(train_epochs=2, tensorboard=True)
    lines, folder = train(words, capsys), run_folder(words)
    writer.assert_called_once_with(folder / "tensorboard")
    assert MISSING not in lines
    steps, history = pd.read_csv(folder / "steps.csv"), pd.read_csv(folder / "history.csv")
    at = 11 * (steps["epoch"] - 1) + steps["iteration"]
    assert at.tolist() == list(range(1, 23)) and steps["learning_rate"].iloc[[0, -1]].tolist() == [1e-3, 5e-4]
    assert {"train_loss", "vali_loss", "test_loss", "seconds"} < set(history)
    expected = {(f"step/{name}", n): v for name in ("loss", "learning_rate") for n, v in zip(at, steps[name], strict=True)}
    for name in set(history) - {"epoch"}:
        expected |= {(f"epoch/{name}", n): v for n, v in zip(history["epoch"], history[name], strict=True)}
    calls = writer.return_value.method_calls
    found = {(tag, n): value for _, (tag, value, n), _ in (call for call in calls if call[0] == "add_scalar")}
    assert found.keys() == expected.keys() and all(abs(found[key] - expected[key]) <= 1e-9 for key in expected)
    assert [call[0] for call in calls][-2:] == ["flush", "close"]


def test_a_run_goes_on_without_tensorboard(argv, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # not installed, wherever the tests run
    words = argv(max_iters=1, tensorboard=True)
    lines = train(words, capsys)
    assert lines.count(MISSING) == 1 and not (run_folder(words) / "tensorboard").exists()
    assert any(line.startswith("Test MSE") for line in lines)
    assert MISSING not in train(argv(max_iters=1), capsys)


def test_a_log_that_cannot_be_written_is_said_once_and_goes_on(tmp_path, capsys) -> None:
    log = RunLog(tmp_path)  # a folder
    for line in ("a", "b"):
        log(line)
    assert capsys.readouterr().out == f"a\nWARNING: {tmp_path} cannot be written (Is a directory)\nb\n"
    silent = RunLog(tmp_path / "log", terminal=False)
    silent("c")
    assert silent.lines == ["c"] and (tmp_path / "log").read_text() == "c\n" and capsys.readouterr().out == ""
