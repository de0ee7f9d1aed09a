"""The closing table: figures of simple forecasts beside the run's, measured once, said without flattery."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from data_provider.synthetic import COLUMNS, SIGNATURE
from scripts.report import main, report, verdict
from tests.realdata import ROOT
from tests.small_run import command_line, run_folder, train, write_csv


def test_the_table_is_that_of_the_figures_best_first(backbones, capsys, tmp_path: Path) -> None:
    frame = pd.read_csv(write_csv(tmp_path / "series.csv", columns=tuple(COLUMNS)))
    frame.iloc[0, 1:] = SIGNATURE  # generated data say so
    frame.to_csv(tmp_path / "series.csv", index=False)
    words = command_line(tmp_path, backbones["qwen2"], model="DLinear", max_iters=2, intervals="80", plots=0)
    train(words, capsys)
    run = run_folder(words)
    text, metrics = report(run), json.loads((run / "metrics.json").read_text())
    assert "*** SYNTHETIC DATA" in text
    own = metrics["test"] | {"title": "DLinear (this run)", "intervals": metrics["intervals"]}
    rows = sorted([own, *metrics["baselines"]["rows"]], key=lambda row: row["mse"])
    assert len(rows) == 4 and all(line in text for line in verdict(own, metrics["baselines"]["rows"]))
    lines = [line for row in rows for line in text.splitlines() if line.startswith(row["title"] + " ")]
    assert len(set(map(len, lines))) == 1 and lines == [line for line in text.splitlines() if line in lines]
    for line, row in zip(lines, rows, strict=True):
        band, wql = row["intervals"]["levels"]["80"], row["intervals"]["wql"]
        figures = [f"{row['mse']:.4f}", f"{row['mae']:.4f}", f"{100 * band['coverage']:.1f}%", f"{band['width']:.3f}"]
        assert line.removeprefix(row["title"]).split() == [*figures, f"{wql:.4f}"]
    # as a script from any folder, with a path that is relative to it; a test on other data has its run's record
    (run / "on_far").mkdir()
    (run / "on_far" / "metrics.json").write_text(json.dumps(metrics))
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), "on_far"]
    done = subprocess.run(command, cwd=run, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (text + "\n", "")
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert capsys.readouterr().err == "report.py: error: the following arguments are required: checkpoints/RUN\n"
    for content in ("{", "{}"):
        (run / "metrics.json").write_text(content)
        for given in ([str(tmp_path)], [str(run)]):
            assert main(given) == 2
            assert re.fullmatch(r"report\.py: error: .*: got .*, expected .*\n", capsys.readouterr().err)


def test_verdict_covers_win_draw_loss_and_what_cannot_be_told():
    def row(name: str, title: str, **figures: tuple[float, float, float] | None) -> dict:
        return {"name": name, "title": title, "mse": 0.5, "mae": 0.2, "intervals": {"wql": 0.1}, "difference": figures}

    lines = verdict({"mse": 0.4}, [
        row("ridge", "ridge regression", mse=(0.05, 0.01, 0.09), mae=(0.0, -0.1, 0.1), wql=(0.01, 0.005, 0.02)),
        row("last season", "repeat the last 24 h", mse=(-0.01, -0.2, 0.2), mae=(0.0, -0.1, 0.1)),
        row("last value", "repeat the last value", mse=(-0.1, -0.2, -0.05), mae=(0.02, 0.01, 0.03)),
        row("linear stack", "linear stack", mse=None, mae=None, wql=None),
    ])  # fmt: skip
    assert lines[1:5] == [
        "- Ridge regression beats this run: MSE +10.0 % (+2.0 to +18.0), MAE +0.0 % (-50.0 to +50.0), "
        "WQL +10.0 % (+5.0 to +20.0).",
        "- This run and repeating the last 24 h are level: MSE -2.0 % (-40.0 to +40.0), MAE +0.0 % (-50.0 to +50.0).",
        "- Neither this run nor repeating the last value is better in all: MSE -20.0 % (-40.0 to -10.0), "
        "MAE +10.0 % (+5.0 to +15.0).",
        "- No interval of the difference from linear stack (too few windows, or an older test): MSE 0.4000 and 0.5000.",
    ]
    assert "linear map" in lines[5]


def test_one_page_has_all_of_it(backbones, capsys, tmp_path: Path) -> None:
    words = command_line(tmp_path, backbones["qwen2"], skip="ridge", max_iters=2, do_predict=True, intervals="80")
    train(words, capsys)
    text, page = report(run_folder(words), tmp_path / "report.html"), (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Time-LLM on a ridge map (this run)" in text and "The language model has read nothing" in text
    for said in (
        "Time-LLM on a ridge map (this run): series.csv",
        "By column",
        "--skip ridge",
        "--do_predict True --intervals 80.0",
        "<td>0.",
        "in 80 %",
        "How far this run",
    ):
        assert said in page, said
    pictures = re.findall(r'<h2>([^<]+)</h2><img alt="[^"]+" src="data:image/png;base64,([A-Za-z0-9+/=]+)">', page)
    names = ["Forecast", "Test windows", "Coverage by step", "Error by step", "Loss by epoch"]
    assert [name for name, _ in pictures] == names
    assert "http" not in page and "prefers-color-scheme" not in page and "color-scheme: light dark" in page
