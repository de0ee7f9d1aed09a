"""kill -9 at 20 random moments of one run. Its own command, `bash scripts/test_kill.sh`: it takes minutes."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.live import Lab, losses, results, run_folder
from utils.saving.state import state_files

KILLS = 20
FLAGS = ("--train_epochs", 9, "--save_steps", 3, "--resume")
# What is waited for, and the most seconds that pass then before the kill.
MOMENTS = {
    "in the start": (lambda run: True, 3),
    "in training": (lambda run: "iters: " in run.text, 1.5),
    "at an epoch's end": (lambda run: "cost time" in run.text, 0.5),
    "writing a state": (lambda run: any(run.where.glob("*/.state.*.partial")), 0.01),
    "writing a checkpoint": (lambda run: any(run.where.glob("*/.checkpoint.*.partial")), 0.01),
    "in the last test": (lambda run: "Checkpoints saved" in run.text, 0.3),
}


@pytest.mark.long
def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    whole = lab.start(tmp_path / "whole", *FLAGS)
    assert whole.end() == 0, whole.text

    seed = random.SystemRandom().randrange(10**6)
    chance, texts = random.Random(seed), []
    moments = chance.choices(list(MOMENTS), (2, 7, 4, 5, 3, 1), k=KILLS)
    print(f"{KILLS} kills, seed {seed}: {moments}")
    for moment in moments:
        seen, seconds = MOMENTS[moment]
        run = lab.start(tmp_path / "killed", *FLAGS)
        run.until(lambda seen=seen, run=run: seen(run))
        time.sleep(chance.uniform(0, seconds))
        run.send(signal.SIGSTOP)
        texts.append(run.text)  # a dying worker may complain afterwards
        run.kill()
        assert "Traceback" not in texts[-1] and "WARNING" not in texts[-1], texts[-1]
    last = lab.start(tmp_path / "killed", *FLAGS)
    assert last.end() == 0, last.text

    assert results(tmp_path / "whole") == results(tmp_path / "killed")
    one, other = (state_files(run_folder(tmp_path / name))[0].read_bytes() for name in ("whole", "killed"))
    assert one == other and losses(*texts, last.text) == losses(whole.text)
    assert not list((tmp_path / "killed").rglob("*.partial"))
