"""What happens to long runs, done to real processes: nothing of it loses what was saved."""

import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.live import Lab, Live, losses, results, run_folder

EVERY = ("--save_steps", 7, "--train_epochs", 3, "--eval_batch_size", 1)  # a long evaluation, to hit it


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Live:
    live = lab.start(lab.folder / "whole", *EVERY)
    assert live.end() == 0, live.text
    return live


def test_signals_in_every_phase_lose_nothing(lab: Lab, whole: Live, tmp_path: Path) -> None:
    where = tmp_path / "runs"
    texts = []

    def interrupted(seen, number: int, code: int) -> str:
        live = lab.start(where, *EVERY, "--resume")
        live.until(lambda: seen(live))
        live.send(number)
        assert live.end() == code, live.text
        texts.append(live.text)
        return live.text

    text = interrupted(lambda live: "Using device" in live.text, signal.SIGINT, 130)
    assert "SIGINT: ended; nothing is left half-written" in text
    text = interrupted(lambda live: any(where.glob("*/.state.*.partial")), signal.SIGTERM, 143)
    assert "\nTo resume: " in text
    text = interrupted(lambda live: "\nEpoch: 1 cost time" in live.text, signal.SIGHUP, 129)
    assert "Resuming from state." in text
    assert "Epoch: 1 | Train Loss" not in text and "epoch 1, iteration 25 is saved" in text
    assert text.count("SIGHUP: ending after the work in hand") == 1
    # A run that goes on has the best epoch's test already; one that resumes when all epochs are done has it ahead.
    text = interrupted(lambda live: "\nEpoch: 3 | Train Loss" in live.text, signal.SIGTERM, 143)
    assert "epoch 4, iteration 0 is saved" in text and "\nCheckpoints saved at" not in text
    text = interrupted(lambda live: "\nCheckpoints saved at" in live.text, signal.SIGINT, 130)
    assert "This run is finished (3 epochs); only the test is left" in text
    assert "SIGINT: the test has not ended" in text and not list(where.glob("*/metrics.json"))

    last = lab.start(where, *EVERY, "--resume")
    assert last.end() == 0 and "iters:" not in last.text, last.text
    assert results(where) == results(whole.where)
    assert losses(*texts, last.text) == losses(whole.text)


def test_a_second_signal_ends_at_once_with_the_files_intact(lab: Lab, tmp_path: Path) -> None:
    live = lab.start(tmp_path / "runs", *EVERY, "--num_workers", 0)
    live.until(lambda: "iters: 8," in live.text)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):  # two wait when it goes on
        live.send(number)
    assert live.end() in (130, 143)
    assert "ended at once" in live.text and "To resume" not in live.text
    going_on = lab.start(tmp_path / "runs", *EVERY, "--num_workers", 0, "--resume")
    going_on.until(lambda: "\nResuming from" in going_on.text)
    going_on.kill()
    assert "Resuming from state.1.pt: epoch 1, iteration 7" in going_on.text


def test_workers_die_with_a_killed_run_and_a_second_run_is_refused(lab: Lab, tmp_path: Path) -> None:
    where = tmp_path / "runs"
    live = lab.start(where, *EVERY, "--train_epochs", 99)
    live.until(lambda: "iters: 8," in live.text)
    children = [psutil.Process(pid) for pid in live.workers()]
    assert children

    second = lab.start(where, *EVERY, "--resume")
    assert second.end() == 2 and second.text.count("\n") == 1, second.text
    assert "got another run that trains in it, expected none; wait for it or end it" in second.text

    live.kill()
    end = time.monotonic() + 10
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < end
    third = lab.start(where, *EVERY, "--learning_rate", "0.5", "--train_epochs", 9, "--num_workers", 0, "--resume")
    assert third.end() == 2
    line = third.text.splitlines()[-1]
    assert "--resume: got --learning_rate 0.5, expected --learning_rate 0.0001, with which" in line
    assert "--train_epochs" not in line and "--num_" not in line


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


def test_a_disk_that_cannot_hold_the_run_is_told_before_training(lab: Lab, small_disk, tmp_path: Path) -> None:
    place = small_disk("30m")
    live = lab.start(place / "runs")
    assert live.end() == 2
    line = live.text.splitlines()[-1]
    assert "expected 38.4 MB for two states and the checkpoints; free 6.9 MB there" in line, line
    assert not list(place.rglob("*.partial"))

    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    live = Live(lab.argv(place / "runs"), tmp_path / "output")
    assert live.end() == 2
    assert "got no writing (Read-only file system), expected a folder that can be written" in live.text.splitlines()[-1]


def test_a_disk_that_fills_up_later_keeps_the_last_state(lab: Lab, whole: Live, small_disk) -> None:
    place = small_disk("60m")
    live = lab.start(place / "runs", *EVERY)
    live.until(lambda: "iters: 15," in live.text)  # the states of iterations 7 and 14 are there
    ballast = place / "ballast"
    with suppress(OSError):  # the run, which writes meanwhile, may have taken some of it
        ballast.write_bytes(bytes(max(shutil.disk_usage(place).free - 2**20, 0)))
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


def test_a_run_without_resume_moves_the_earlier_one_aside(lab: Lab, whole: Live, tmp_path: Path) -> None:
    where = tmp_path / "runs"
    shutil.copytree(whole.where, where)
    live = lab.start(where, "--train_epochs", 99)
    live.until(lambda: "iters: 1," in live.text)
    live.send(signal.SIGINT)
    assert live.end() == 130, live.text
    folder = run_folder(where)
    assert f"The folder held an earlier run, now in: {folder}.1\n" in live.text
    (tmp_path / "first").mkdir()
    folder.with_name(f"{folder.name}.1").rename(tmp_path / "first" / "run")
    assert results(tmp_path / "first") == results(whole.where)
