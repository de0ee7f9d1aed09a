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
from utils.saving.state import state_files

KILLS = 20
FLAGS = ("--train_epochs", 9, "--save_steps", 3, "--resume")
# What is waited for, and the most seconds that pass then before the kill.
MOMENTS = {
    "in the start": (lambda run: True, 6),
    "in training": (lambda run: "iters: " in run.text, 1.5),
    "at an epoch's end": (lambda run: "cost time" in run.text, 0.5),
    "writing a state": (lambda run: any(run.where.glob("*/.state.*.partial")), 0.01),
    "writing a checkpoint": (lambda run: any(run.where.glob("*/.checkpoint.*.partial")), 0.01),
    "in the last test": (lambda run: "Checkpoints saved" in run.text, 0.3),
}


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

    def kill(self, moment: str, chance: random.Random) -> None:
        seen, seconds = MOMENTS[moment]
        while not seen(self) and self.process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, seconds))
        self.process.send_signal(signal.SIGSTOP)
        text = self.text  # a dying worker may complain afterwards
        self.process.kill()
        self.process.wait()
        assert "Traceback" not in text and "WARNING" not in text, text


@pytest.mark.long
def test_twenty_kills_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab(tmp_path)
    whole = Command(lab, tmp_path / "whole")
    assert whole.process.wait(300) == 0, whole.text

    seed = random.SystemRandom().randrange(10**6)
    chance, texts = random.Random(seed), []
    moments = chance.choices(list(MOMENTS), (2, 7, 4, 5, 3, 1), k=KILLS)
    with capsys.disabled():
        print(f"\n{KILLS} kills (seed {seed}): {dict(Counter(moments))}")
    for moment in moments:
        run = Command(lab, tmp_path / "killed")
        run.kill(moment, chance)
        texts.append(run.text)
    last = Command(lab, tmp_path / "killed")
    assert last.process.wait(300) == 0, last.text

    one, other = run_folder(tmp_path / "whole"), run_folder(tmp_path / "killed")
    for name in ("checkpoint.safetensors", "checkpoint.json", "checkpoint"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert state_files(one)[0].read_bytes() == state_files(other)[0].read_bytes()
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, other)]
    assert metrics[0]["test"] == metrics[1]["test"]
    assert losses(*texts, last.text) == losses(whole.text)
    assert not list((tmp_path / "killed").rglob("*.partial"))
