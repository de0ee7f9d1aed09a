"""The closing table: figures of simple forecasts beside the run's, measured once, said without flattery."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_provider.synthetic import COLUMNS, SIGNATURE
from scripts.report import main
from tests.realdata import ROOT
from utils.results import report as module
from utils.results.report import report, verdict


def make_run(folder: Path, mse: float, first_row=None) -> Path:
    """A run's folder as training leaves it, with 600 hourly rows beside it."""
    random, hours = np.random.default_rng(0), np.arange(600)[:, None]
    values = np.sin(2 * np.pi * hours / 24 + np.arange(7)) + random.standard_normal((600, 7)) * 0.3
    if first_row:
        values[0] = first_row
    frame = pd.DataFrame(values, columns=COLUMNS)
    frame.insert(0, "date", pd.date_range("2020-01-01", periods=600, freq="h"))
    frame.to_csv(folder / "own.csv", index=False)
    run = folder / "run"
    run.mkdir()
    flags = {
        "data": "custom", "root_path": str(folder), "data_path": "own.csv", "features": "M", "target": "OT",
        "freq": "h", "embed": "timeF", "percent": 100, "seq_len": 48, "label_len": 0, "pred_len": 12,
    }  # fmt: skip
    (run / "checkpoint.json").write_text(json.dumps({"flags": flags}))
    (run / "metrics.json").write_text(json.dumps({"test": {"mse": mse, "mae": 0.3}, "data": {"rows": 600}}))
    return run


def test_table_and_metrics(tmp_path, monkeypatch):
    run = make_run(tmp_path, 0.3)
    text = report(run)
    titles = ["ridge regression", "repeat the last 24 h", "Time-LLM (this run)", "repeat the last value"]
    lines = text.splitlines()
    table = [line for line in lines if line.startswith(tuple(titles))]
    assert [line.split("  ")[0] for line in table] == titles and len(set(map(len, table))) == 1  # best first, aligned
    assert "Ridge regression, fitted and tested in 0 s, beats this run" in text
    assert "This run beats repeating the last value" in text and "SYNTHETIC" not in text
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"] == {"mse": 0.3, "mae": 0.3} and metrics["data"] == {"rows": 600}
    # Two errors by hand: the last value and the last day again, on the last 120 rows.
    frame = pd.read_csv(tmp_path / "own.csv").iloc[:, 1:].to_numpy()
    scaled = (frame - frame[:420].mean(0)) / frame[:420].std(0)
    last, season = [], []
    for start in range(480, 600 - 12 + 1):
        truth = scaled[start : start + 12]
        last.append((scaled[start - 1] - truth) ** 2)
        season.append((scaled[start - 24 : start - 12] - truth) ** 2)
    found = {row["name"]: row["mse"] for row in metrics["baselines"]["rows"]}
    assert found["last value"] == pytest.approx(np.mean(last), rel=1e-5)
    assert found["last season"] == pytest.approx(np.mean(season), rel=1e-5)
    # A second table takes the figures that are there.
    monkeypatch.setattr(module, "baselines", None)
    assert report(run) == text
    monkeypatch.undo()
    # Of other lengths they are measured anew.
    record = json.loads((run / "checkpoint.json").read_text())
    record["flags"]["pred_len"] = 6
    (run / "checkpoint.json").write_text(json.dumps(record))
    report(run)
    assert json.loads((run / "metrics.json").read_text())["baselines"]["of"]["pred_len"] == 6


def test_bands_stand_beside_the_errors(tmp_path):
    run = make_run(tmp_path, 0.3)
    held = json.loads((run / "metrics.json").read_text())
    held["intervals"] = {"levels": {"80": {"coverage": 0.8123, "width": 1.2346}}, "wql": 0.0567}
    (run / "metrics.json").write_text(json.dumps(held))
    lines = report(run).splitlines()
    own = next(line for line in lines if line.startswith("Time-LLM (this run)"))
    assert own.split()[-5:] == ["0.3000", "0.3000", "81.2%", "1.235", "0.0567"]
    found = {row["name"]: row for row in json.loads((run / "metrics.json").read_text())["baselines"]["rows"]}
    ridge = next(line for line in lines if line.startswith("ridge regression"))
    assert ridge.split()[-3] == f"{100 * found['ridge']['intervals']['levels']['80']['coverage']:.1f}%"


def test_verdict_covers_win_draw_and_loss():
    def row(name, title, mse):
        return {"name": name, "title": title, "mse": mse, "seconds": 12.4}

    lines = verdict(
        0.4,
        [row("ridge", "ridge regression", 0.36), row("last season", "repeat the last 24 h", 0.4001),
         row("last value", "repeat the last value", 0.8)],
    )  # fmt: skip
    assert lines[0] == (
        "Ridge regression, fitted and tested in 12 s, beats this run: its MSE is 10.0 % lower (0.3600 against 0.4000)."
    )
    assert lines[1] == "This run and repeating the last 24 h are level (MSE 0.4000 and 0.4001)."
    assert lines[2] == "This run beats repeating the last value: its MSE is 50.0 % lower (0.4000 against 0.8000)."
    assert "linear map" in lines[3]


def test_called_as_a_script(tmp_path, capsys):
    """From any folder, with a path that is relative to it; a test on other data has its run's record."""
    run = make_run(tmp_path, 0.3, SIGNATURE)
    (run / "on_far").mkdir()
    (run / "on_far" / "metrics.json").write_text((run / "metrics.json").read_text())
    for folder in ("run", "run/on_far"):
        command = [sys.executable, str(ROOT / "scripts" / "report.py"), folder]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "Time-LLM (this run)" in done.stdout and "*** SYNTHETIC DATA" in done.stdout and done.stderr == ""
    for content in ("{", "{}"):
        (run / "metrics.json").write_text(content)
        for words in ([str(tmp_path)], [str(run)], []):
            assert main(words) == 2
            assert re.fullmatch(r"report\.py: error: .*: got .*, expected .*\n", capsys.readouterr().err)
