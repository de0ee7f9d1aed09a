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
    assert len(rows) == 4 and all(line in text for line in verdict(own["mse"], metrics["baselines"]["rows"]))
    lines = [line for row in rows for line in text.splitlines() if line.startswith(row["title"] + " ")]
    assert len(set(map(len, lines))) == 1 and lines == [line for line in text.splitlines() if line in lines]
    for line, row in zip(lines, rows, strict=True):
        band, wql = row["intervals"]["levels"]["80"], row["intervals"]["wql"]
        figures = [f"{row['mse']:.4f}", f"{row['mae']:.4f}", f"{100 * band['coverage']:.1f}%", f"{band['width']:.3f}"]
        assert line.removeprefix(row["title"]).split() == [*figures, f"{wql:.4f}"]
    # without the baselines' figures, as an earlier run left them, they are measured anew
    (run / "metrics.json").write_text(json.dumps({name: held for name, held in metrics.items() if name != "baselines"}))
    assert re.sub(r"in \d+ s", "", report(run)) == re.sub(r"in \d+ s", "", text)

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


def test_verdict_covers_win_draw_and_loss():
    titles = (
        ("ridge", "ridge regression", 0.36),
        ("last season", "repeat the last 24 h", 0.4001),
        ("last value", "repeat the last value", 0.8),
    )
    lines = verdict(0.4, [{"name": name, "title": title, "mse": mse, "seconds": 12.4} for name, title, mse in titles])
    assert lines[:3] == [
        "Ridge regression, fitted and tested in 12 s, beats this run: its MSE is 10.0 % lower (0.3600 against 0.4000).",
        "This run and repeating the last 24 h are level (MSE 0.4000 and 0.4001).",
        "This run beats repeating the last value: its MSE is 50.0 % lower (0.4000 against 0.8000).",
    ]
    assert "linear map" in lines[3]
