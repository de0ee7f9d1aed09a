"""What a run would take, measured by check_gpu.py; and what setup_env.sh says of a GPU that torch cannot use."""

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
        "float32, frozen weights float32", "not measured", "--prototypes direct",
    ]  # fmt: skip
    assert not [words for words in said if words not in report]

    figures = json.loads(file.read_text())
    assert list(figures["peaks_gib"]) == ["loading", "steps", "save", "evaluation"]
    assert all(0.05 < gib < figures["limit_gib"] for peak in figures["peaks_gib"].values() for gib in peak)
    # 23 steps an epoch, whatever was tried here, and 25 + 57 windows.
    counted = 40 * (23 * figures["s_per_step"] + 82 * figures["s_per_window"])
    assert figures["s_run"] == pytest.approx(counted)
    would, peak = figures["would_take_gib"], figures["peaks_gib"]["steps"][0]
    assert would["--llm_layers"] == 2  # all that the backbone has
    assert all(gib < peak for flags, gib in would.items() if not flags.endswith("--llm_layers"))


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_about_this_program(capsys, flag: str) -> None:
    assert main(["--features", "X", flag]) == 0
    said = capsys.readouterr().out
    assert "scripts/check_gpu.py --json FILE" in said and "run_main.py --help" in said and "--pct_start" not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"features": "X"}, "check_gpu.py: error: --features: got 'X', expected one of M, S, MS"),
        ({"llm_layers": 9}, "check_gpu.py: error: --llm_layers: got 9, expected at most 2"),
        ({"json": None}, "check_gpu.py: error: --json: got no value right after it, expected a file name"),
    ],
)
def test_a_bad_flag_is_one_line(backbones, tmp_path: Path, capsys, flags, said) -> None:
    words = ["--json"] if "json" in flags else command_line(tmp_path, backbones["qwen2"], **flags)
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1


def test_the_scripts_pass_their_flags_on(tmp_path: Path) -> None:
    """TIMELLM_PROGRAM stands in for run_main.py, for every script that runs one."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 2.13.0 || echo "called $*"\n')
    fake.chmod(0o755)
    env = os.environ | {"PYTHON": str(fake), "TIMELLM_PROGRAM": "scripts/check_gpu.py"}
    script = ["bash", str(ROOT / "scripts" / "TimeLLM_ETTh1_2.sh"), "--root_path", "x"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "called scripts/check_gpu.py --data ETTh1" in done.stdout


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
