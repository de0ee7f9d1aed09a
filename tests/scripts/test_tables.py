"""The zero-shot table, and the script for a user's own file where it is called wrongly."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_zero_shot_table_has_horizons_and_their_mean():
    rows = {
        96: {"zero-shot": (0.3, 0.35), "source": (0.4, 0.42), "last 24 h": (0.5, 0.5), "ridge": (0.28, 0.34)},
        720: {"zero-shot": (0.4, 0.45), "source": (0.5, 0.52), "last 24 h": (0.6, 0.6), "ridge": (0.38, 0.44)},
    }
    lines = load("zero_shot").table("ETTh1", "ETTh2", rows).splitlines()
    assert lines[1].startswith("Trained on ETTh1, tested on ETTh2")
    assert lines[3].split()[:2] == ["horizon", "ETTh1->ETTh2"]
    assert lines[4].split() == "96 0.300 0.350 0.400 0.420 0.500 0.500 0.280 0.340".split()
    assert lines[6].split() == "mean 0.350 0.400 0.450 0.470 0.550 0.550 0.330 0.390".split()


def test_zero_shot_always_asks_for_a_resumed_training(monkeypatch):
    script, asked = load("zero_shot"), []
    monkeypatch.setattr(script, "_run", lambda flags: asked.append(flags) or 1)
    assert script.measure("ETTh1", "ETTh2", 96, ["--llm_layers", "3"]) is None
    assert len(asked) == 1 and asked[0][-1] == "--resume" and "1" == asked[0][asked[0].index("--is_training") + 1]


def test_own_file_script_says_what_it_needs(tmp_path):
    script = ROOT / "scripts" / "TimeLLM_custom.sh"
    for words, message in (
        ([], "usage: "),
        (["--seq_len", "9"], "usage: "),
        (["none.csv"], "none.csv: got no such file, expected a CSV file"),
    ):
        done = subprocess.run(["bash", script, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_benchmark_says_what_part_of_a_step_waits_for_the_loader(backbones) -> None:
    words = f"--backbone {backbones['qwen2']} --layers 1 --channels 3 --windows 2 --rounds 2 --workers 1 --device cpu"
    command = [sys.executable, "scripts/benchmark.py", *words.split(), "--max_sequences", "3", "--child", "loader"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["workers"] == 1 and 0 < found["batch_s"] < 1 and 0 <= found["waits"] < 1


@pytest.mark.parametrize("name", ["flops", "measure"])
@pytest.mark.parametrize("words", [[], ["--help"]])
def test_a_part_that_is_started_says_whose_it_is(tmp_path: Path, name: str, words: list[str]) -> None:
    script = ROOT / "scripts" / f"{name}.py"
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"scripts/{name}.py is a part of scripts/benchmark.py")
