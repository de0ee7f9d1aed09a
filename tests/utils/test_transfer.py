"""Transfer: a run that trains on one file, and validates, tests and forecasts another."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import run_main
import utils.run
from data_provider.data_factory import series_from_args
from scripts.report import report
from tests.small_run import PRED_LEN, SEQ_LEN, figures, refusal, run_folder, train, write_csv
from tests.utils.test_models_in_the_loop import StopAt, same
from utils.flags import parse_flags
from utils.results.baselines import SOURCE, fit_ridge
from utils.saving.checkpoint import Checkpoint
from utils.saving.interrupt import Interrupted

ROWS = 260  # of the target: 182 train, 26 validation, 52 test
NOTHING = {"data_pretrain": None, "data_path_pretrain": None}


@pytest.fixture
def transfer(small, tmp_path: Path):
    """`transfer(**flags)`: the command line of a run that trains on source.csv (a, b), for series.csv (load, flow, OT)."""
    write_csv(tmp_path / "series.csv", ROWS)
    write_csv(tmp_path / "source.csv", 300, ("a", "b"), seed=7)
    flags = {"data_pretrain": "custom", "data_path_pretrain": "source.csv", "save_predictions": 1, "prompt_text": "Two."}
    return lambda **more: small(**flags | more)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def source_rows(folder: Path) -> list[dict]:
    rows = metrics(folder)["baselines"]["rows"]
    return [{key: row[key] for key in ("title", "mse", "mae", "intervals")} for row in rows if row["name"] == SOURCE]


@pytest.mark.parametrize("model", ["TimeLLM", "PatchTST", "Ridge"])
def test_it_is_a_training_on_the_one_and_a_zero_shot_test_on_the_other(transfer, capsys, tmp_path: Path, model: str) -> None:
    words = transfer(model=model)
    lines, folder = train(words, capsys), run_folder(words)
    # 70, 10 and 20 % of 300 and of 260 rows, in windows
    assert [line for line in lines if line.split()[0] in ("train", "val", "test")] == [
        f"train {210 - SEQ_LEN - PRED_LEN + 1}", f"val {26 - PRED_LEN + 1}", f"test {52 - PRED_LEN + 1}"
    ]  # fmt: skip
    if model == "Ridge":  # whose penalty is chosen on the target's validation windows
        target, source = (series_from_args(parse_flags(transfer(**NOTHING, data_path=f"{name}.csv")))
                          for name in ("series", "source"))  # fmt: skip
        expected = torch.from_numpy(fit_ridge(source.windows("train"), target.windows("val"))[0]).float()
        assert torch.equal(load_file(folder / "checkpoint.safetensors")["linear_map"], expected)
        return
    alone = transfer(model=model, **NOTHING, model_id="alone", data_path="source.csv")
    train(alone, capsys)
    there = ["--is_training", "0", "--checkpoint", str(run_folder(alone)), "--data_path", "series.csv"]
    assert figures(train([*alone, *there], capsys)) == figures(lines)
    assert same(folder / "checkpoint.safetensors", run_folder(alone) / "checkpoint.safetensors")
    zero_shot = run_folder(alone) / "on_series"
    one, other = (dict(np.load(place / "predictions.npz")) for place in (folder, zero_shot))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    found, there = metrics(folder), metrics(zero_shot)
    for key in ("data", "trained_on", "intervals"):  # bands of the target's validation windows, both
        assert found[key] == there[key]
    assert source_rows(folder) == source_rows(zero_shot) and len(source_rows(folder)) == 1
    assert (found["data"]["file"], found["trained_on"]["file"]) == ("series.csv", "source.csv")
    assert "trained_on" not in metrics(run_folder(alone))
    assert "Test windows of series.csv after training on source.csv, 32 rows" in report(folder)


def test_the_record_says_both_and_a_forecast_follows_the_target(transfer, capsys, tmp_path: Path) -> None:
    words = transfer(do_predict=True)
    lines, folder = train(words, capsys), run_folder(words)
    record = Checkpoint.open(folder).record
    own, source = (pd.read_csv(tmp_path / name, index_col="date") for name in ("series.csv", "source.csv"))
    for held, table, rows in ((record, own, 182), (record["pretrain"], source, 210)):
        assert held["columns"] == list(table.columns) and held["data"]["rows"] == len(table)
        np.testing.assert_allclose(held["scaler"]["mean"], table.iloc[:rows].mean(), rtol=1e-12)
        np.testing.assert_allclose(held["scaler"]["deviation"], table.iloc[:rows].std(ddof=0), rtol=1e-12)
    before, forecast = metrics(folder)["test"], pd.read_csv(folder / "forecast.csv")
    assert pd.Timestamp(forecast["date"][0]) == pd.Timestamp(own.index[-1]) + pd.Timedelta(hours=1) and "load" in forecast

    # once more from the checkpoint alone; then without the file that it was trained on, or with another of that name
    rows, again = source_rows(folder), ["--is_training", "0", "--checkpoint", str(folder), "--device", "cpu"]
    test = [*again, "--checkpoints", str(tmp_path / "checkpoints")]
    assert figures(train(test, capsys)) == figures(lines)
    assert source_rows(folder) == rows and rows[0]["title"] == "ridge regression fitted to source.csv"
    kept = (tmp_path / "source.csv").read_bytes()
    write_csv(tmp_path / "source.csv", 300, ("a", "b"), seed=8)
    for why in ("has other values now", "got no such file"):
        (said,) = [line for line in train(test, capsys) if line.startswith("No ridge of the source, which is source.csv")]
        assert why in said and said in report(folder) and not source_rows(folder)
        (tmp_path / "source.csv").unlink(missing_ok=True)
    # on the source itself its own ridge regression says it all
    (tmp_path / "source.csv").write_bytes(kept)
    train([*test, "--data", "custom", "--root_path", str(tmp_path), "--data_path", "source.csv"], capsys)
    assert not source_rows(folder / "on_source") and not metrics(folder / "on_source")["remarks"]
    train([*again, "--do_predict"], capsys)
    assert pd.read_csv(folder / "forecast.csv").equals(forecast) and metrics(folder)["test"] == before


def test_it_resumes_to_the_last_bit_and_not_with_other_rows(transfer, capsys, tmp_path: Path) -> None:
    words, stopped = transfer(), transfer(checkpoints=tmp_path / "stopped")
    lines = train(words, capsys)
    with pytest.raises(Interrupted):
        utils.run.main(parse_flags(stopped), StopAt(3))
    kept = (tmp_path / "source.csv").read_text()
    write_csv(tmp_path / "source.csv", 300, ("a", "b"), seed=8)
    assert refusal([*stopped, "--resume"], capsys).startswith("--resume: got the pretraining data's values (SHA-256) ")
    plain = refusal([*transfer(checkpoints=tmp_path / "stopped", **NOTHING), "--resume"], capsys)
    assert "--data_pretrain None" in plain and "the pretraining data's columns" in plain
    (tmp_path / "source.csv").write_text(kept)
    assert figures(train([*stopped, "--resume"], capsys)) == figures(lines)
    for file in ("checkpoint.safetensors", "state.*"):
        assert same(*(sorted(run_folder(argv).glob(file))[-1] for argv in (words, stopped)))


def test_what_contradicts_is_one_line(transfer, small, capsys, tmp_path: Path) -> None:
    write_csv(tmp_path / "short.csv", 100, ("a", "b"))
    write_csv(tmp_path / "shorter.csv", 50, ("a", "b"))
    words = transfer(model="DLinear")
    train(words, capsys)
    for wrong, message in (
        (small(data_path_pretrain="x.csv"), "--data_path_pretrain: got x.csv, expected --"),
        (transfer(data_path_pretrain=None), "--data_path_pretrain: got nothing, expected the"),
        (transfer(data_path_pretrain="gone.csv"), "gone.csv: got no such file"),
        (transfer(data_path_pretrain="short.csv", batch_size=40), "--batch_size: got 40, expected at most 31, for 31 "),
        (transfer(data_path_pretrain="shorter.csv"), "got 35 rows in the train split of "),
        (transfer(model="Autoformer"), "--data_pretrain: got the columns a, b of "),
        ([*words, "--is_training", "0", "--data_path_pretrain", "series.csv"],
         "--data_pretrain: got custom, file series.csv, expected source.csv, on which "),
    ):  # fmt: skip
        assert message in refusal(wrong, capsys)


def test_the_published_entry_asks_for_the_set_and_has_its_defaults(small, transfer, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_main.main(small(), "run_pretrain.py")
    err = capsys.readouterr().err
    assert err.startswith("run_pretrain.py: error: --data_pretrain: got nothing, expected a value")
    named = parse_flags(transfer(data_pretrain="ETTh1", data_path_pretrain=None), "run_pretrain.py")
    assert (named.data_path_pretrain, named.patience, parse_flags(transfer()).patience) == ("ETTh1.csv", 5, 10)
    # a test reads no pretraining data, and the checkpoint may be any
    last = []
    for words in (transfer(model="DLinear"), [*transfer(model="DLinear", **NOTHING), "--is_training", "0"]):
        assert run_main.main(words, "run_pretrain.py") == 0
        last.append(capsys.readouterr().out.splitlines()[-1])
    assert last[0] == last[1]
