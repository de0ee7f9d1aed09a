"""A run as a user sees it: its folders, its record, what is refused, the language models it runs with."""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pandas as pd
import psutil
import pytest
import torch
import tqdm.std
from safetensors import safe_open
from safetensors.torch import load_file

import utils.run
from layers.backbone import find_backbone
from scripts.make_backbone import make_backbone
from scripts.past_forecasts import score_forecasts
from tests.models.test_TimeLLM import TRAINED
from tests.realdata import ROOT
from tests.small_run import COLUMNS, PRED_LEN, ROWS, command_line, figures, refusal, run_folder, train, write_csv
from utils.flags import parse_flags, recorded
from utils.forecaster import Forecaster
from utils.results import log
from utils.results.log import Journal, RunLog


def test_each_repeat_has_its_folder_and_its_seed(argv, capsys) -> None:
    words = argv(itr=2, max_iters=1, seed=2**32 - 1)  # the largest seed there is
    lines = train(words, capsys)
    folders = [run_folder(words, repeat) for repeat in (0, 1)]
    assert [f"Checkpoints saved at: {folder}" for folder in folders] == [x for x in lines if x.startswith("Checkpoints")]
    first, second = (load_file(folder / "checkpoint.safetensors") for folder in folders)
    assert not any(torch.equal(first[name], second[name]) for name in TRAINED)
    assert sum(line.startswith("Test MSE") for line in lines) == 2


def test_an_earlier_run_is_moved_aside_and_not_resumed_on_other_data(argv, capsys, tmp_path: Path) -> None:
    words = argv(model="DLinear", max_iters=1)
    folder, kept = run_folder(words), []
    train(words, capsys)
    write_csv(tmp_path / "series.csv", seed=1)
    line = refusal([*words, "--resume"], capsys)
    assert re.search("the data's values .* or start anew with --resume False", line)
    for number in (1, 2):
        kept.append((folder / "checkpoint.safetensors").read_bytes())
        aside = folder.with_name(f"{folder.name}.{number}")
        assert f"The folder held an earlier run, now in: {aside}" in train([*words, "--seed", str(number)], capsys)
        assert (aside / "checkpoint.safetensors").read_bytes() == kept[-1] and (aside / "train.log").is_file()
    assert (folder / "checkpoint.safetensors").read_bytes() not in kept


def test_a_drive_without_locks_and_syncs_is_one_warning(argv, capsys, monkeypatch) -> None:
    """As Windows drives and mounted shares are: no lock, no folder is synced, none is renamed while a file in it is open."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    sync, rename, folder = os.fsync, Path.rename, run_folder(words := argv(model="DLinear", max_iters=1, plots=0))

    def rename_closed(path: Path, to: Path) -> Path:
        opened = [file.path for file in psutil.Process().open_files()]
        return refuse() if any(Path(name).parent == path for name in opened) else rename(path, to)

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(Path, "rename", rename_closed)
    monkeypatch.setattr(os, "fsync", lambda file: refuse() if stat.S_ISDIR(os.fstat(file).st_mode) else sync(file))
    for number in (0, 1):
        lines = train(words, capsys)
        warned = [line for line in lines if "WARNING" in line]
        assert warned == [f"WARNING: {folder} cannot be locked (Input/output error): start no second run in it"]
        assert folder.with_name(f"{folder.name}.{number}").is_dir() == bool(number) and figures(lines)


def test_a_terminal_in_ascii_and_a_backend_that_is_not_here(argv, tmp_path: Path) -> None:
    """Names are escaped; pictures are drawn whatever the notebook's shell has set, and accelerate's numbers are not read."""
    write_csv(tmp_path / "series.csv", columns=("温度", "OT"))
    words = argv(model="DLinear", max_iters=1, num_workers=1)
    env = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://not_installed.inline", "ACCELERATE_MIXED_PRECISION": "fp8"}
    command = [sys.executable, "run_main.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert r"2 channels: \u6e29\u5ea6, OT" in done.stdout and figures(done.stdout.splitlines())
    assert "温度" in (run_folder(words) / "train.log").read_text(encoding="utf-8")
    assert list((run_folder(words) / "plots").glob("test_windows*.png"))


@pytest.mark.parametrize("program", sorted([*ROOT.glob("run_*.py"), *ROOT.glob("scripts/*.py")]), ids=lambda path: path.name)
def test_a_python_without_the_libraries_is_one_line(program: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-S", program, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    line = rf"{program.name}: error: .*python.*: got Python \S+ without torch, .*; bash scripts/setup_env.sh makes it, .*\n"
    assert re.fullmatch(line, done.stderr), done.stderr


def test_what_a_checkpoint_holds(argv, backbones, capsys, tmp_path: Path) -> None:
    words = argv(max_iters=1, features="MS")
    lines, folder, args = train(words, capsys), run_folder(words), parse_flags(words)
    record = json.loads((folder / "checkpoint.json").read_text())
    filled = {"enc_in": 3, "llm_dim": 128, "prompt_text": record["flags"]["prompt_text"]}
    assert "one series" in filled["prompt_text"]
    assert record["flags"] == {name: vars(args)[name] for name in recorded(args)} | filled
    assert record["columns"] == list(COLUMNS) and record["data"].pop("mark")["rows"] == 224
    assert record["data"].pop("learned_until") == "2020-01-10 07:00:00"  # the last of 224 hours
    assert record["data"] == {"file": "series.csv", "rows": ROWS, "synthetic": False, "step": "1 hour"}
    identity = find_backbone("QWEN", str(backbones["qwen2"])).identity
    note = "random weights, which know no language"
    assert record["backbone"] == identity | {"layers": 1, "load_in_4bit": False, "note": note}
    assert record["versions"]["torch"] == torch.__version__ and math.isfinite(record["vali_loss"])
    with safe_open(folder / "checkpoint.safetensors", "pt") as held:
        header = json.loads(held.metadata()["record"])
    assert (
        header.pop("intervals") == {"levels": [80.0], "windows": 25, "newest_windows": 82}
        and header["flags"] == record["flags"]
    )
    # nothing of the language model; the same weights for torch.load, which no test needs
    tensors, same = load_file(folder / "checkpoint.safetensors"), torch.load(folder / "checkpoint")
    assert tensors.keys() == {*TRAINED, "intervals.offsets", "intervals.newest"} and same.keys() == set(TRAINED)
    assert all(torch.equal(tensors[name], same[name]) for name in TRAINED)
    (folder / "checkpoint").unlink()
    # a batch larger than the training split is refused where it is used, another language model is noticed
    larger = [*words, "--batch_size", "186"]
    assert "--batch_size: got 186, expected at most 185, for 185 training windows" in refusal(larger, capsys)
    again = train([*larger, "--is_training", "0"], capsys)
    assert figures(again) == figures(lines) and not any(line.startswith("WARNING") for line in again)
    other = make_backbone(tmp_path / "other", seed=5)
    again = train([*words, "--is_training", "0", "--llm_model_path", str(other)], capsys)
    assert sum(line.startswith("WARNING: the checkpoint was trained on") for line in again) == 1


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", {}), ("gpt2", {"max_sequences": 7}), ("bert", {"prototypes": "direct"}),
        ("qwen2", {"load_in_4bit": True}), ("qwen2", {"fast_path": "plain"}),
    ],
)  # fmt: skip
def test_other_backbones_and_ways_to_run(backbones, capsys, tmp_path: Path, family: str, flags: dict) -> None:
    name = {"qwen2": "QWEN"}.get(family, family.upper())
    write_csv(tmp_path / "series.csv", 200)
    words = command_line(tmp_path, backbones[family], llm_model=name, max_iters=2, plots=0, torch_checkpoint=0, **flags)
    lines = train(words, capsys)
    path = "plain" if family == "bert" or "fast_path" in flags else "fast"
    assert any(f"; {path} path" in line for line in lines) and not (run_folder(words) / "checkpoint").exists()
    assert figures(train([*words, "--is_training", "0"], capsys)) == figures(lines)


MISSING = "--tensorboard: TensorBoard is not installed (pip install tensorboard); the run goes on without events"


def test_events_are_those_of_the_csv_files(argv, capsys, monkeypatch) -> None:
    installed, writer = ModuleType("tensorboard"), Mock()
    installed.__spec__ = ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", installed)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock(SummaryWriter=writer))
    words = argv(model="PatchTST", train_epochs=2, tensorboard=True, plots=0)
    assert MISSING not in train(words, capsys)
    folder = run_folder(words)
    writer.assert_called_once_with(folder / "tensorboard")
    steps, history = pd.read_csv(folder / "steps.csv"), pd.read_csv(folder / "history.csv")
    assert {"train_loss", "vali_loss", "test_loss", "seconds"} < set(history)
    steps.index = 11 * (steps["epoch"] - 1) + steps["iteration"]
    assert steps.index.tolist() == list(range(1, 23)) and steps["learning_rate"].iloc[[0, -1]].tolist() == [1e-3, 5e-4]
    expected = steps[["loss", "learning_rate"]].add_prefix("step/").unstack().to_dict()
    expected |= history.set_index("epoch").add_prefix("epoch/").unstack().to_dict()
    calls = writer.return_value.method_calls
    found = {(tag, n): value for _, (tag, value, n), _ in (call for call in calls if call[0] == "add_scalar")}
    assert found == pytest.approx(expected, abs=1e-9) and [call[0] for call in calls][-2:] == ["flush", "close"]
    # and where TensorBoard is not installed, wherever the tests run, a run goes on without
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    lines = train(argv(model="DLinear", max_iters=1, tensorboard=True, plots=0), capsys)
    assert lines.count(MISSING) == 1 and any(line.startswith("Test MSE") for line in lines)


def test_a_log_that_cannot_be_written_is_said_once_and_goes_on(tmp_path, capsys) -> None:
    log = RunLog(tmp_path)  # a folder
    for line in ("a", "b"):
        log(line)
    assert capsys.readouterr().out == f"a\nWARNING: {tmp_path} cannot be written (Is a directory)\nb\n"


def test_a_resume_keeps_the_step_losses_up_to_where_it_begins(tmp_path: Path) -> None:
    rows = ["epoch,iteration,loss,learning_rate", "1,1,0.5,0.1", "1,2,0.4,0.1", "1,3,0.3,0.1", "2,1,0.2,0.1"]
    (tmp_path / "steps.csv").write_text("\n".join(rows) + "\n")
    Journal(tmp_path, 3).start(1, 2)
    assert (tmp_path / "steps.csv").read_text().splitlines() == rows[:3]


def test_files_of_one_name_have_a_folder_each(small, capsys, tmp_path: Path, monkeypatch) -> None:
    """Tests and forecasts of two files data.csv: nothing of the first is lost, and the same file finds its own again."""
    words = small(model="DLinear", max_iters=1, eval_batch_size=64)
    train(words, capsys)
    folder, found = run_folder(words), {}
    for seed, place in enumerate("bc", start=1):
        (tmp_path / place).mkdir()
        write_csv(tmp_path / place / "data.csv", 160, seed=seed)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    monkeypatch.chdir(tmp_path)

    for root in (str(tmp_path / "b"), "c", "b", "c/../b", "link", str(tmp_path / "c")):
        there = ["--is_training", "0", "--checkpoint", str(folder), "--root_path", root, "--data_path", "data.csv"]
        found.setdefault(Path(root).resolve().name, set()).add(figures(train([*words, *there], capsys)))
        train([*words, *there, "--do_predict", "--append"], capsys)
    assert len(found["b"]) == len(found["c"]) == 1 and found["b"] != found["c"]
    places = {"b": folder / "on_data", "c": folder / "on_data.2"}
    assert set(places.values()) == set(folder.glob("on_*"))
    for name, place in places.items():
        mse = json.loads((place / "metrics.json").read_text())["test"]["mse"]
        assert {(f"{mse:.7f}")} == {each[0] for each in found[name]}
        assert (place / "source.txt").read_text() == str((tmp_path / name / "data.csv").resolve())
        assert len((place / "forecasts.csv").read_text().splitlines()) == 1 + PRED_LEN
    assert (folder / "forecasts.csv").exists() is False  # the run's own folder has results of its own data alone


def test_a_checkpoint_finds_its_data_and_language_model_from_another_folder(
    small, backbones, capsys, tmp_path: Path, monkeypatch
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project / "data", elsewhere / "data"):  # one of this name is here, too, without the file
        folder.mkdir(parents=True)
    write_csv(project / "data" / "series.csv", 200)
    shutil.copytree(backbones["qwen2"], project / "models" / "tiny")
    monkeypatch.chdir(project)
    there = {"root_path": "data", "llm_model_path": "models/tiny", "checkpoints": "runs"}
    words = small(max_iters=1, intervals=80, **there)
    expected, run = figures(train([*words, "--do_predict", "--append"], capsys)), run_folder(words).resolve()
    monkeypatch.chdir(elsewhere)
    assert figures(train(["--is_training", "0", "--checkpoint", str(run), "--device", "cpu"], capsys)) == expected
    assert "series.csv up to" in score_forecasts(run)
    frame = pd.read_csv(project / "data" / "series.csv")
    assert len(Forecaster.load(run, device="cpu").predict(frame)) == PRED_LEN
    project.rename(tmp_path / "moved")  # with all that is in it
    run = tmp_path / "moved" / run.relative_to(project)
    assert len(Forecaster.load(run / "checkpoint.safetensors", device="cpu").predict(frame)) == PRED_LEN
    (tmp_path / "moved" / "data").rename(tmp_path / "gone")
    line = refusal(["--is_training", "0", "--checkpoint", str(run), "--device", "cpu"], capsys)
    assert line.startswith("--root_path data --data_path series.csv: got no such file")


def test_a_long_evaluation_says_the_time_left(small, capsys, monkeypatch) -> None:
    """12 steps of 20 seconds by a clock of our own; then a run whose every batch is long."""
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr(log, "time", Mock(monotonic=lambda: now[0]))

    def lines(**words: RunLog) -> list[str]:
        for _ in log.Progress(range(12), desc="val batches", **words):
            now[0] += 20
        out, err = capsys.readouterr()
        assert err == ""
        return out.splitlines()

    capsys.readouterr()
    told = ((3, "03:00"), (6, "02:00"), (9, "01:00"), (12, "00:00"))
    assert lines() == [f"\tval batches: {done} of 12; left time: {left}" for done, left in told]
    assert lines(log=RunLog(terminal=False)) == []  # another process of a group
    cells = log.Progress(total=4, desc="cells")
    now[0] += 100
    cells.update()
    now[0] += 90
    cells.set_postfix_str("the second")  # which does not change how long the first took
    cells.close()
    told = ("05:00", "05:00, the second")
    assert capsys.readouterr().out.splitlines() == [f"\tcells: 1 of 4; left time: {left}" for left in told]
    monkeypatch.undo()
    words = small(model="DLinear", max_iters=4, eval_batch_size=8)
    assert not any("left time" in line and "batches" in line for line in train(words, capsys))
    monkeypatch.setitem(log.Progress.__init__.__kwdefaults__, "every", 0.0)
    said = {line for line in train(words, capsys) if "batches" in line}
    # 20 validation and 40 test rows in windows of 8 rows ahead; the run's log has the lines, too
    assert {f"\t{split} batches: 0 of {count}; left time: ?" for split, count in (("val", 2), ("test", 5))} <= said
    assert said <= set((run_folder(words) / "train.log").read_text().splitlines())


def test_a_bar_in_a_terminal_and_no_line(small, capsys, monkeypatch) -> None:
    monkeypatch.setitem(log.Progress.__init__.__kwdefaults__, "every", 0.0)
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    utils.run.main(parse_flags(small(model="DLinear", max_iters=4, eval_batch_size=8)))
    out, err = capsys.readouterr()
    assert "batches" not in out and "val batches: " in err and "test batches: " in err and "| 0/4 [" in err
    monkeypatch.undo()
    reader, writer = os.openpty()  # a terminal without a size
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        list(log.Progress(range(3), desc="parts", mininterval=0))
    said = b""
    while b"parts:  67%|" not in said:  # what is said comes in pieces; where they end, read fails
        said += os.read(reader, 1000)
    os.close(reader)


def test_a_later_test_has_the_levels_of_the_training_and_says_that_the_file_has_grown(argv, capsys, tmp_path: Path) -> None:
    words = argv(model="Ridge", plots=0, intervals="70", save_predictions=0)
    assert not any("in the training" in line for line in train(words, capsys))
    later, series = (
        ["--is_training", "0", "--checkpoint", str(run_folder(words)), "--device", "cpu"],
        tmp_path / "series.csv",
    )
    for rows in (ROWS, ROWS + 40):
        said = [
            line for line in train(later, capsys) if line.startswith(f"{series} has {rows} rows, {ROWS} in the training")
        ]
        assert len(said) == (rows > ROWS)
        metrics = json.loads((run_folder(words) / "metrics.json").read_text())
        assert list(metrics["intervals"]["levels"]) == ["70"] and metrics["remarks"] == said
        frame = pd.read_csv(series)
        more = pd.date_range("2020-01-01", periods=ROWS + 40, freq="h")[ROWS:].strftime("%Y-%m-%d %H:%M:%S")
        pd.concat([frame, frame[:40].assign(date=more)]).to_csv(series, index=False)
