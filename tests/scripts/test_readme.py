"""The commands of "Forecast your own CSV", run as they stand in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("data_provider", "layers", "models", "utils", "scripts", "run_main.py")


def commands(text: str) -> str:
    """All marked command blocks of a guide, as one script."""
    return "\n".join(re.findall(r"<!-- commands -->\n```bash\n(.*?)```", text, re.DOTALL))


def write_days(path: Path, columns: list[str], rows: int, start: str) -> None:
    random, day = np.random.default_rng(rows), np.arange(rows)[:, None]
    values = 100 + 20 * np.sin(2 * np.pi * day / 7 + np.arange(len(columns))) + random.standard_normal((rows, len(columns)))
    frame = pd.DataFrame(values.round(2), columns=columns)
    frame.insert(0, "date", pd.date_range(start, periods=rows, freq="D").strftime("%Y-%m-%d"))
    frame.to_csv(path, index=False)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy with three files of a newcomer, and `python` on the PATH."""
    copy = tmp_path_factory.mktemp("clone") / "time llm"
    copy.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    shutil.copytree(ROOT / "dataset" / "prompt_bank", copy / "dataset" / "prompt_bank")
    write_days(copy / "my.csv", ["sales", "visitors"], 630, "2022-05-12")
    write_days(copy / "newer.csv", ["sales", "visitors"], 130, "2023-10-23")  # ends on a leap day, 29 rows after my.csv
    write_days(copy / "other.csv", ["a", "b", "c"], 250, "2022-01-01")
    (copy / "bin").mkdir()
    python = copy / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return copy


def test_own_csv_section_runs_as_it_stands(repository):
    script = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "TimeLLM_custom.sh" in script and "--predict_path" in script
    env = os.environ | {
        "PATH": f"{repository / 'bin'}:{os.environ['PATH']}", "PYTHON": str(repository / "bin" / "python"),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=repository, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (repository / "checkpoints").iterdir()
    assert "630 rows from 2022-05-12 00:00:00 to 2024-01-31 00:00:00, step: 1 day" in done.stdout
    ends = [f"{name}_{end}" for name in ("sales", "visitors") for end in ("lo80", "hi80", "lo95", "hi95")]
    header = ",".join(["date", "sales", "visitors", *ends])
    assert f"{header}\n2024-02-01," in done.stdout
    assert "Time-LLM on a ridge map (this run)" in done.stdout and "ridge regression" in done.stdout
    assert "Prediction intervals: from row 25, 2024-02-25 00:00:00, on they are not calibrated" in done.stdout
    history = pd.read_csv(run / "forecasts.csv", parse_dates=["origin", "date"])
    assert list(history.columns) == ["origin", "date", "sales", "visitors", *ends]
    assert [(str(day.date()), len(rows)) for day, rows in history.groupby("origin")] == [
        ("2024-01-31", 24),
        ("2024-02-29", 24),
    ]
    assert str(history["date"][24]) == "2024-03-01 00:00:00"
    forecast = pd.read_csv(run / "forecast.csv", parse_dates=["date"])  # the last one
    assert list(forecast.columns) == ["date", "sales", "visitors", *ends] and len(forecast) == 60
    assert 50 < forecast["sales"].mean() < 150  # own units
    assert {path.name for path in (run / "plots").iterdir()} == {
        "coverage_by_step.png", "error_by_step.png", "forecast.png", "loss_by_epoch.png", "test_windows.png",
    }  # fmt: skip
    assert (run / "on_other" / "metrics.json").is_file() and (run / "predictions.npz").is_file()

    # From Python, the same in both languages, with a frame of the reader's
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    blocks = [re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0] for page in pages]
    codes = {re.sub(r"checkpoints/<[^>]*>", str(run), re.sub(r" *#.*", "", block)) for block in blocks}
    (code,) = codes
    assert str(run) in code and "predict(frame)" in code
    code = f'import pandas as pd\nframe = pd.read_csv("my.csv")\n{code}'
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and (repository / "forecast.png").is_file(), done.stderr[-2000:]


def test_both_guides_have_the_same_commands_flags_that_exist_and_pages_that_are_there():
    from utils.flags import build_parser

    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    lines = [[line for line in commands(text).splitlines() if not line.startswith("#")] for text in texts]
    assert lines[0] == lines[1] and any("run_main.py" in line for line in lines[0])
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/*.md")]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for file in re.findall(r"`((?:utils|layers|models|data_provider|scripts|tests)/[\w/.]+\.\w+)`", text):
            assert (ROOT / file).exists(), f"{page.name}: {file}"

    known = {option for action in build_parser()._actions for option in action.option_strings}
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        runs = re.findall(r"(?:run_main\.py|TimeLLM_\w+\.sh)((?:[^\n`]|\\\n)*)", text)
        flags = {flag for run in runs for flag in re.findall(r"(?<!\S)--\w+", run)}
        assert flags <= known, flags - known
