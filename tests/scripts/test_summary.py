"""The table of all runs: which columns it has, what it leaves out, how it is sorted."""

import json
from pathlib import Path

import pandas as pd
import pytest

from scripts.summary import main

LLM = {"model": "TimeLLM", "llm_layers": 6, "dropout": 0.1, "num_workers": 1, "data": "custom", "fill_missing": None}
HISTORY = ["epoch,train_loss,vali_loss,seconds,evaluation_seconds,peak_memory_gib",
           "1,1,nan,60,6,1.5", "2,1,0.5,60,6,2.5", "3,1,0.7,60,,2.0"]  # fmt: skip


def write(folder: Path, flags: dict, mse: float | None, history: list[str], **record: object) -> None:
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(json.dumps({"flags": flags, "epoch": 2} | record))
    (folder / "history.csv").write_text("\n".join(history) + "\n")
    if mse is not None:
        (folder / "metrics.json").write_text(json.dumps({"test": {"mse": mse, "mae": mse}, "peak_memory_gib": 9.0}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write(tmp_path / "a", LLM, 0.4, HISTORY)
    write(tmp_path / "b", LLM | {"num_workers": 2, "fill_missing": "ffill", "seasonal_patterns": "Daily"}, 0.3, HISTORY[:2])
    write(tmp_path / "c", LLM | {"model": "DLinear", "llm_layers": 3, "dropout": 0.2}, None, HISTORY[:1], backbone={})
    (tmp_path / "a" / "on_far").mkdir()
    tested = {"test": {"mse": 0.9, "mae": 0.8}, "flags": {"data": "ETTh1", "fill_missing": None}}
    (tmp_path / "a" / "on_far" / "metrics.json").write_text(json.dumps(tested))
    return tmp_path


def test_a_row_a_run(runs: Path, capsys) -> None:
    assert main([str(runs), "--csv", str(runs / "runs.csv")]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.endswith(f"Written: {runs / 'runs.csv'}\n")
    table = pd.read_csv(runs / "runs.csv")
    # The flags that differ and say what was tried: not the workers, nor the layers of a language model that there is not.
    figures = ["epochs", "best_epoch", "vali", "mse", "mae", "ridge", "in_80", "minutes", "memory_gib", "run"]
    assert list(table.columns) == ["model", "dropout", "data", "fill_missing", *figures]
    assert table["run"].tolist() == ["b", "a", "a/on_far", "c"]  # by mse; what has none comes last
    b, a, far, c = (row for _, row in table.iterrows())
    assert (a["epochs"], a["best_epoch"], a["vali"], a["memory_gib"]) == (3, 2, 0.5, 2.5)
    assert a["minutes"] == pytest.approx((3 * 60 + 2 * 6) / 60) and b["fill_missing"] == "ffill"
    assert pd.isna([b["best_epoch"], b["vali"], c["mse"], far["epochs"]]).all() and b["epochs"] == 1
    assert (far["data"], far["mse"], c["model"]) == ("ETTh1", 0.9, "DLinear")
    lines = out.splitlines()
    assert lines[0].split() == [name for name in table if name not in ("epochs", "best_epoch", "vali", "memory_gib")]
    assert lines[4].split()[-1] == "c" and "-" in lines[4].split()


def test_sorting_and_damage(runs: Path, capsys) -> None:
    for words, order in (
        ("--sort mae --reverse", ["a/on_far", "a", "b", "c"]),
        ("--sort model", ["c", "a", "a/on_far", "b"]),
    ):
        assert main([str(runs), *words.split()]) == 0
        assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == order
    assert main([str(runs), "--columns", "vali", "run"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[:2]] == [["vali", "run"], ["-", "b"]]
    for words in ([str(runs), "--sort", "speed"], [str(runs / "gone")], [str(runs / "a" / "on_far")]):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("summary.py: error: ") and err.count("\n") == 1
    (runs / "b" / "metrics.json").write_text("{")
    assert main([str(runs)]) == 0
    out, err = capsys.readouterr()
    assert "metrics.json: got a damaged file" in err and "run" in out
