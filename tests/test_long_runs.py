"""What happens to long runs, done to real processes: nothing of it loses what was saved."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.live import Lab, Live, losses, run_folder
from tests.realdata import ROOT

EVERY = ("--save_steps", 7, "--train_epochs", 3, "--eval_batch_size", 1)  # a long evaluation, to hit it


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Live:
    """A run that nothing happened to."""
    live = lab.start(lab.folder / "whole", *EVERY)
    assert live.end() == 0, live.text
    return live


def results(where: Path) -> dict[str, object]:
    """What a run leaves, to the last bit (but for the memory it took, and where it lies)."""
    folder = run_folder(where)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "scores": metrics["test"],
        "tensors": (folder / "checkpoint.safetensors").read_bytes(),
        "for torch": (folder / "checkpoint").read_bytes(),
        "record": (folder / "checkpoint.json").read_bytes(),
    }


def is_saving(live: Live) -> bool:
    return any(live.where.glob("*/.state.*.partial"))


def test_signals_in_every_phase_lose_nothing(lab: Lab, whole: Live, tmp_path: Path) -> None:
    where = tmp_path / "runs"
    texts = []

    def interrupted(seen, number: int, code: int) -> str:
        live = lab.start(where, *EVERY, "--resume")
        live.until(lambda: seen(live))
        for worker in workers(live):  # a closed terminal or a shutdown signals them all
            with suppress(ProcessLookupError):
                os.kill(worker, number)
        live.send(number)
        assert live.end() == code, live.text
        texts.append(live.text)
        return live.text

    text = interrupted(lambda live: "Using device" in live.text, signal.SIGINT, 130)
    assert "SIGINT: ended; nothing is left half-written" in text
    text = interrupted(lambda live: "iters: 3," in live.text, signal.SIGINT, 130)
    assert "\nTo resume: " in text
    text = interrupted(is_saving, signal.SIGTERM, 143)
    assert "Resuming from state.1.pt: epoch 1, iteration " in text
    text = interrupted(lambda live: "\nEpoch: 1 cost time" in live.text, signal.SIGINT, 130)
    assert "Epoch: 1 | Train Loss" not in text and "epoch 1, iteration 25 is saved" in text
    text = interrupted(lambda live: "\nEpoch: 2 cost time" in live.text, signal.SIGHUP, 129)
    assert text.count("SIGHUP: ending after the work in hand") == 1
    # A run that goes on has the best epoch's test already; one that resumes when all epochs are done has it ahead.
    text = interrupted(lambda live: "\nEpoch: 3 | Train Loss" in live.text, signal.SIGTERM, 143)
    assert "epoch 4, iteration 0 is saved" in text and "\nCheckpoints saved at" not in text
    text = interrupted(lambda live: "\nCheckpoints saved at" in live.text, signal.SIGINT, 130)
    assert "This run is finished (3 epochs); only the test is left" in text
    assert "SIGINT: the test has not ended" in text and not list(where.glob("*/metrics.json"))

    last = lab.start(where, *EVERY, "--resume")
    assert last.end() == 0, last.text
    assert results(where) == results(whole.where)
    assert losses(*texts, last.text) == losses(whole.text)

    again = lab.start(where, *EVERY, "--resume")
    assert again.end() == 0, again.text
    assert "This run is finished (3 epochs); only the test is left" in again.text and "iters:" not in again.text
    assert results(where) == results(whole.where)


def test_a_second_signal_ends_at_once_with_the_files_intact(lab: Lab, tmp_path: Path) -> None:
    live = lab.start(tmp_path / "runs", *EVERY, "--train_epochs", 99)
    live.until(lambda: "iters: 8," in live.text)
    live.send(signal.SIGSTOP)  # so that both wait when it goes on
    live.send(signal.SIGINT)
    live.send(signal.SIGTERM)
    live.send(signal.SIGCONT)
    assert live.end() in (130, 143)
    assert "ended at once" in live.text and "To resume" not in live.text
    going_on = lab.start(tmp_path / "runs", *EVERY, "--resume")
    going_on.until_line("Resuming from")
    going_on.kill()
    assert "Resuming from state.1.pt: epoch 1, iteration 7" in going_on.text


def test_workers_die_with_a_killed_run_and_a_second_run_is_refused(lab: Lab, tmp_path: Path) -> None:
    where = tmp_path / "runs"
    live = lab.start(where, *EVERY, "--train_epochs", 99)
    live.until(lambda: "iters: 8," in live.text)
    children = workers(live)
    assert children

    second = lab.start(where, *EVERY, "--resume")
    assert second.end() == 2 and second.text.count("\n") == 1, second.text
    assert "got another run that trains in it, expected none; wait for it or end it" in second.text

    live.kill()
    end = time.monotonic() + 10
    while any(_lives(child) for child in children):
        assert time.monotonic() < end
    third = lab.start(where, *EVERY, "--learning_rate", "0.5", "--train_epochs", 9, "--num_workers", 0, "--resume")
    assert third.end() == 2
    line = third.text.splitlines()[-1]
    assert "--resume: got --learning_rate 0.5, expected --learning_rate 0.0001, with which" in line
    assert "--train_epochs" not in line and "--num_" not in line


def workers(live: Live) -> list[int]:
    pid = live.process.pid
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _lives(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system that a test may fill: mount(size) gives its folder."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs is not allowed here (it takes root)")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


def fill(place: Path, leave: int) -> Path:
    """Take the disk's room but for `leave` bytes."""
    free = shutil.disk_usage(place).free
    ballast = place / "ballast"
    with suppress(OSError), ballast.open("wb") as file:  # a run that writes meanwhile has taken some of it
        file.write(bytes(max(free - leave, 0)))
    return ballast


def test_a_disk_that_is_too_small_is_told_before_training(lab: Lab, small_disk) -> None:
    place = small_disk("30m")
    live = lab.start(place / "runs")
    assert live.end() == 2
    line = live.text.splitlines()[-1]
    assert "expected 38.4 MB for two states of 7.3 MB and three checkpoints of 2.3 MB; free 6.9 MB there" in line, line
    assert not list(place.rglob("*.partial"))


def test_a_disk_that_fills_up_later_keeps_the_last_state(lab: Lab, whole: Live, small_disk) -> None:
    place = small_disk("60m")
    live = lab.start(place / "runs", *EVERY)
    live.until(lambda: "iters: 15," in live.text)  # the states of iterations 7 and 14 are there
    ballast = fill(place, 2**20)
    assert live.end() == 1, live.text
    line = live.text.splitlines()[-1]
    assert line.startswith("run_main.py: error: ") and "is full" in line and "; free " in line, line
    assert "the same command with --resume resumes from state." in line
    assert not list(place.rglob("*.partial"))

    ballast.unlink()
    resumed = lab.start(place / "runs", *EVERY, "--resume")
    assert resumed.end() == 0, resumed.text
    assert "Resuming from state." in resumed.text
    assert results(place / "runs") == results(whole.where)


def test_a_read_only_disk_is_told_before_training(lab: Lab, small_disk, tmp_path: Path) -> None:
    place = small_disk("60m")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    live = Live(lab.argv(place / "runs"), tmp_path / "output")
    assert live.end() == 2
    assert "got no writing (Read-only file system), expected a folder that can be written" in live.text.splitlines()[-1]


def test_a_folder_that_vanishes_ends_the_run_with_one_line(lab: Lab, tmp_path: Path) -> None:
    where = tmp_path / "runs"
    live = lab.start(where, *EVERY, "--train_epochs", 99)
    live.until(lambda: "iters: 2," in live.text)
    run_folder(where).rename(tmp_path / "elsewhere")
    assert live.end() == 1
    assert "has vanished; bring it back" in live.text.splitlines()[-1]


def test_a_terminal_whose_reader_is_gone_does_not_end_the_run(lab: Lab, whole: Live, tmp_path: Path) -> None:
    where = tmp_path / "runs"
    command = lab.command(where, "--train_epochs", 1)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        errors = process.stderr.read()
    assert process.returncode == 0 and "Error" not in errors, errors
    log = (run_folder(where) / "train.log").read_text()
    assert losses(whole.text)[:10] == losses(log)[:10] and "Test MSE" in log


def test_a_run_without_resume_moves_the_earlier_one_aside(lab: Lab, whole: Live, tmp_path: Path) -> None:
    where = tmp_path / "runs"
    shutil.copytree(whole.where, where)
    before = results(where)
    for number in (1, 2):
        live = lab.start(where, "--train_epochs", 99)
        live.until(lambda live=live: "iters: 1," in live.text)
        live.send(signal.SIGINT)
        assert live.end() == 130, live.text
        assert f"The folder held an earlier run, now in: {run_folder(where)}.{number}\n" in live.text
    (tmp_path / "first").mkdir()
    folder = run_folder(where)
    folder.with_name(f"{folder.name}.1").rename(tmp_path / "first" / "run")
    assert results(tmp_path / "first") == before
