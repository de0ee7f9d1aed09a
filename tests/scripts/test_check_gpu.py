"""What a run would take: check_gpu.py and benchmark.py; what setup_env.sh says of a GPU that torch cannot use."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.check_gpu import main
from tests.realdata import ROOT
from tests.small_run import command_line


def test_a_report_to_paste_and_nothing_left(backbones, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    words = command_line(tmp_path, backbones["qwen2"], train_epochs=40, batch_size=8, max_sequences=12, eval_batch_size=5)
    before = {path.name for path in tmp_path.iterdir()}
    file = tmp_path / "figures.json"
    assert main(["--json", str(file), *words]) == 0
    assert {path.name for path in tmp_path.iterdir()} == before | {"figures.json"}

    report = capsys.readouterr().out.split("```")[1]
    said = [
        f"torch {torch.__version__}", "transformers ", "bitsandbytes ", "expandable_segments:True", "--max_sequences 12",
        "24 sequences, 12 at once", "0 of 8 steps skipped", "epoch with its evaluations; 40 epochs", "fast path",
        "float32, frozen weights float32", "not measured", "--prototypes direct (saves about",
    ]  # fmt: skip
    assert not [words for words in said if words not in report]

    figures = json.loads(file.read_text())
    assert list(figures["peaks_gib"]) == ["loading", "steps", "save", "evaluation"]
    assert all(0.05 < gib < figures["limit_gib"] for peak in figures["peaks_gib"].values() for gib in peak)
    # 23 steps an epoch, and 25 + 57 windows.
    counted = 40 * (23 * figures["s_per_step"] + 82 * figures["s_per_window"])
    assert figures["s_run"] == pytest.approx(counted)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "scripts/check_gpu.py --json FILE"),
        ({"features": "X"}, 2, "check_gpu.py: error: --features: got 'X', expected one of M, S, MS"),
        ({"llm_layers": 9}, 2, "check_gpu.py: error: --llm_layers: got 9, expected at most 2"),
        ({"model": "DLinear", "llm_model_path": None}, 2, "check_gpu.py: error: --model: got DLinear, expected TimeLLM"),
        (["--json"], 2, "check_gpu.py: error: argument --json: expected one argument"),
    ],
)
def test_help_and_a_bad_flag(backbones, tmp_path: Path, capsys, words, code: int, said: str) -> None:
    try:
        found = main(words if isinstance(words, list) else command_line(tmp_path, backbones["qwen2"], **words))
    except SystemExit as end:
        found = end.code
    printed = capsys.readouterr()
    assert found == code and said in printed.out + printed.err and printed.err.count("\n") == (code == 2)


def test_the_benchmark_compares_the_paths_on_the_same_run(backbones, tmp_path: Path) -> None:
    words = f"--backbone {backbones['qwen2']} --layers 1 --channels 3 --windows 2 --rounds 1 --num_workers 1 --device cpu"
    words += f" --seq_len 64 --pred_len 16 --variants plain fast --json {tmp_path / 'found.json'}"
    command = [sys.executable, "scripts/benchmark.py", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    plain, fast = found["plain"], found["fast"]
    assert f"{plain['s_per_step'] / fast['s_per_step']:.2f}" in done.stdout.split("over fast:")[1]
    for variant in (plain, fast):
        assert variant["sequences"] == 6 and variant["s_per_window"] > 0
    assert (plain["opening"], plain["statistics"]) == (fast["opening"], fast["statistics"]) and fast["opening"] > 50


@pytest.mark.skipif(torch.cuda.is_available(), reason="this GPU can be used")
def test_set_up_says_that_torch_cannot_use_the_gpu(tmp_path: Path) -> None:
    """One line with the driver and what to do, and exit code 0: the CPU can be used all the same."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for room in ("layers", "models", "data_provider", "utils"):
        (tmp_path / room).symlink_to(ROOT / room)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("requirements.txt", ".venv/requirements.txt.installed"):
        shutil.copy(ROOT / "requirements.txt", tmp_path / name)
    for program, text in (
        (programs / "python", f'exec "{sys.executable}" "$@"'),
        (tmp_path / "nvidia-smi", "echo 535.104.05"),
    ):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "TORCH_INDEX_URL")}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    script = ["bash", str(tmp_path / "scripts" / "setup_env.sh")]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    warning, ready = done.stdout.splitlines()
    assert warning.startswith("environment: WARNING: ") and "driver 535.104.05" in warning
    assert ready.startswith("environment: .venv ready")
