"""kill -9 at 20 random moments of one run. Its own command, `bash scripts/test_kill.sh`: it takes minutes."""

import json
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.live import Lab, losses, run_folder
from tests.realdata import ROOT

KILLS = 20
FLAGS = ("--train_epochs", 9, "--save_steps", 3, "--resume")


class Command:
    """A run by its command line, as a user starts it."""

    def __init__(self, lab: Lab, where: Path):
        where.mkdir(exist_ok=True)
        self.where, self.output = where, where.parent / f"{where.name}.{time.monotonic_ns()}.out"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(lab.command(where, *FLAGS), cwd=ROOT, stdout=out, stderr=out)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, seen) -> None:
        while not seen() and self.process.poll() is None:
            time.sleep(0.001)

    def phase(self) -> str:
        """What a stopped process was doing."""
        lines = self.text.splitlines()
        last = lines[-1] if lines else ""
        if any(self.where.glob("*/.state.*.partial")):
            return "writing a state"
        if any(self.where.glob("*/.checkpoint.*.partial")):
            return "writing a checkpoint"
        if self.process.poll() is not None:
            return "after its end"
        if "Test MSE" in self.text:
            return "leaving"
        if any(last.startswith(start) for start in ("Checkpoints saved", "This run is finished")):
            return "final test"
        if "cost time" in last:
            return "evaluating"
        if "EarlyStopping" in last or "Saving model" in last:
            return "keeping the best"
        return "training" if "iters: " in self.text or "Resuming from" in self.text else "starting and loading"

    def kill(self) -> str:
        """Stop it, look where it is, kill it."""
        self.process.send_signal(signal.SIGSTOP)
        phase, text = self.phase(), self.text  # a dying worker may complain afterwards
        self.process.kill()
        self.process.wait()
        assert "Traceback" not in text and "WARNING" not in text, text
        return phase


def wait_for_a_random_moment(run: Command, chance: random.Random) -> None:
    """Anywhere in the start, in training and evaluation, or in the writing of a file."""
    kind = chance.choices(("start", "later", "epoch end", "writing"), (2, 7, 4, 7))[0]
    if kind == "start":
        time.sleep(chance.uniform(0, 6))
        return
    run.wait_for(lambda: "\ntest " in run.text)
    run.wait_for(lambda: "iters: " in run.text or "finished" in run.text)
    if kind == "later":
        time.sleep(chance.uniform(0, 1))
        return
    if kind == "epoch end":
        run.wait_for(lambda: "cost time" in run.text)
        time.sleep(chance.uniform(0, 0.5))
        return
    time.sleep(chance.uniform(0, 0.5))
    run.wait_for(lambda: any(run.where.glob("*/.*.partial")))
    time.sleep(chance.uniform(0, 0.01))


@pytest.mark.long
def test_twenty_kills_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab(tmp_path)
    whole = Command(lab, tmp_path / "whole")
    assert whole.process.wait(300) == 0, whole.text

    seed = random.SystemRandom().randrange(10**6)
    chance, phases, texts = random.Random(seed), Counter(), []
    for _ in range(KILLS):
        run = Command(lab, tmp_path / "killed")
        wait_for_a_random_moment(run, chance)
        phases[run.kill()] += 1
        texts.append(run.text)
    last = Command(lab, tmp_path / "killed")
    assert last.process.wait(300) == 0, last.text
    with capsys.disabled():
        print(f"\n{KILLS} kills (seed {seed}): " + ", ".join(f"{n} {phase}" for phase, n in phases.most_common()))

    one, other = run_folder(tmp_path / "whole"), run_folder(tmp_path / "killed")
    for name in ("checkpoint.safetensors", "checkpoint.json", "checkpoint"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, other)]
    assert metrics[0]["test"] == metrics[1]["test"]
    assert losses(*texts, last.text) == losses(whole.text)
    assert not list((tmp_path / "killed").rglob("*.partial"))
