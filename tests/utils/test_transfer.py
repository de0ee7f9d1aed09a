"""Transfer: a run that trains on one file, and validates, tests and forecasts another."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import run_main
import utils.run
from data_provider.data_factory import series_from_args
from tests.small_run import PRED_LEN, SEQ_LEN, figures, refusal, run_folder, train, write_csv
from tests.utils.test_models_in_the_loop import StopAt, same
from utils.flags import parse_flags
from utils.results.baselines import fit_ridge
from utils.results.comparison import report
from utils.saving.checkpoint import Checkpoint
from utils.saving.interrupt import Interrupted

ROWS = 260  # of the target: 182 train, 26 validation, 52 test
ON_SOURCE = {"data_path": "source.csv"}


@pytest.fixture
def transfer(small, tmp_path: Path):
    """`transfer(**flags)`: the command line of a run that trains on source.csv (a, b), for series.csv (load, flow, OT)."""
    write_csv(tmp_path / "series.csv", ROWS)
    write_csv(tmp_path / "source.csv", 300, ("a", "b"), seed=7)
    flags = {"data_pretrain": "custom", "data_path_pretrain": "source.csv", "save_predictions": 1, "prompt_text": "Two."}
    return lambda **more: small(**flags | more)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("model", ["TimeLLM", "PatchTST"])
def test_it_is_a_training_on_the_one_and_a_zero_shot_test_on_the_other(transfer, capsys, tmp_path: Path, model: str) -> None:
    words = transfer(model=model)
    lines, folder = train(words, capsys), run_folder(words)
    # 70, 10 and 20 % of 300 and of 260 rows, in windows
    assert [line for line in lines if line.split()[0] in ("train", "val", "test")] == [
        f"train {210 - SEQ_LEN - PRED_LEN + 1}", f"val {26 - PRED_LEN + 1}", f"test {52 - PRED_LEN + 1}"
    ]  # fmt: skip
    alone = transfer(model=model, data_pretrain=None, data_path_pretrain=None, model_id="alone", **ON_SOURCE)
    train(alone, capsys)
    there = ["--is_training", "0", "--checkpoint", str(run_folder(alone)), "--data_path", "series.csv"]
    tested = train([*alone, *there], capsys)
    assert same(folder / "checkpoint.safetensors", run_folder(alone) / "checkpoint.safetensors")
    assert figures(tested) == figures(lines)
    zero_shot = run_folder(alone) / "on_series"
    one, other = (dict(np.load(place / "predictions.npz")) for place in (folder, zero_shot))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    for found in (metrics(folder), metrics(zero_shot)):
        assert (found["data"]["file"], found["trained_on"]["file"]) == ("series.csv", "source.csv")
    assert metrics(folder)["baselines"]["of"] == metrics(zero_shot)["baselines"]["of"]
    assert metrics(folder)["intervals"] == metrics(zero_shot)["intervals"]  # of the target's validation windows, both
    assert "trained_on" not in metrics(run_folder(alone))
    assert "Test windows of series.csv after training on source.csv, 32 rows" in report(folder)


def test_on_the_same_file_it_is_a_plain_run(small, capsys, tmp_path: Path) -> None:
    plain = small()
    both = small(data_pretrain="custom", data_path_pretrain="series.csv", checkpoints=tmp_path / "both")
    assert figures(train(plain, capsys)) == figures(train(both, capsys))
    assert same(*(run_folder(words) / "checkpoint.safetensors" for words in (plain, both)))


def test_the_record_says_both_and_a_forecast_follows_the_target(transfer, capsys, tmp_path: Path) -> None:
    words = transfer(do_predict=True)
    lines, folder = train(words, capsys), run_folder(words)
    record = Checkpoint.open(folder).record
    own, source = (pd.read_csv(tmp_path / name).iloc[:, 1:] for name in ("series.csv", "source.csv"))
    for held, table, rows in ((record, own, 182), (record["pretrain"], source, 210)):
        assert held["columns"] == list(table.columns) and held["data"]["rows"] == len(table)
        np.testing.assert_allclose(held["scaler"]["mean"], table.iloc[:rows].mean(), rtol=1e-12)
        np.testing.assert_allclose(held["scaler"]["deviation"], table.iloc[:rows].std(ddof=0), rtol=1e-12)
    forecast = pd.read_csv(folder / "forecast.csv")
    last = pd.read_csv(tmp_path / "series.csv")["date"].iloc[-1]
    assert forecast["date"].iloc[0] == str(pd.Timestamp(last) + pd.Timedelta(hours=1)) and "load" in forecast

    # once more from the checkpoint alone, and without the file that it was trained on
    (tmp_path / "source.csv").unlink()
    before = (folder / "forecast.csv").read_bytes(), metrics(folder)["test"]
    (folder / "forecast.csv").unlink()
    again = ["--is_training", "0", "--checkpoint", str(folder), "--device", "cpu"]
    assert figures(train([*again, "--checkpoints", str(tmp_path / "checkpoints")], capsys)) == figures(lines)
    train([*again, "--do_predict"], capsys)
    assert ((folder / "forecast.csv").read_bytes(), metrics(folder)["test"]) == before
    assert metrics(folder)["trained_on"]["file"] == "source.csv"


def test_it_resumes_to_the_last_bit_and_not_with_other_rows(transfer, capsys, tmp_path: Path) -> None:
    words, stopped = transfer(), transfer(checkpoints=tmp_path / "stopped")
    lines = train(words, capsys)
    with pytest.raises(Interrupted):
        utils.run.main(parse_flags(stopped), StopAt(3))
    kept = (tmp_path / "source.csv").read_text()
    write_csv(tmp_path / "source.csv", 300, ("a", "b"), seed=8)
    assert refusal([*stopped, "--resume"], capsys).startswith("--resume: got the pretraining data's values (SHA-256) ")
    plain = refusal(
        [*transfer(checkpoints=tmp_path / "stopped", data_pretrain=None, data_path_pretrain=None), "--resume"], capsys
    )
    assert "--data_pretrain None" in plain and "the pretraining data's columns" in plain
    (tmp_path / "source.csv").write_text(kept)
    resumed = train([*stopped, "--resume"], capsys)
    assert any(line.startswith("Resuming from") for line in resumed) and figures(resumed) == figures(lines)
    one, other = run_folder(words), run_folder(stopped)
    assert same(one / "checkpoint.safetensors", other / "checkpoint.safetensors")
    assert same(*(sorted(place.glob("state.*"))[-1] for place in (one, other)))


def test_a_map_in_closed_form_is_of_the_sources_windows(transfer, capsys, tmp_path: Path) -> None:
    words = transfer(model="Ridge")
    train(words, capsys)
    target = series_from_args(parse_flags(words))
    source = series_from_args(parse_flags(transfer(**ON_SOURCE, data_pretrain=None, data_path_pretrain=None)))
    expected = torch.from_numpy(fit_ridge(source.windows("train"), target.windows("val"))[0]).float()
    held = Checkpoint.open(run_folder(words))
    assert held.shapes is not None
    (found,) = held.tensors(held.shapes).values()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_with_its_columns_another_model_transfers_too(transfer, capsys, tmp_path: Path) -> None:
    line = refusal(transfer(model="Autoformer"), capsys)
    assert line.startswith("--data_pretrain: got the columns a, b of ") and "load, flow, OT" in line
    write_csv(tmp_path / "source.csv", 300, seed=7)
    assert "Test MSE" in "\n".join(train(transfer(model="Autoformer"), capsys))


def test_one_column_of_both_and_gaps_are_told(transfer, capsys, tmp_path: Path) -> None:
    table = pd.read_csv(write_csv(tmp_path / "source.csv", 300, ("OT", "more"), seed=7))
    table.drop(index=[40, 41]).to_csv(tmp_path / "source.csv", index=False)
    lines = train(transfer(features="MS", target="OT"), capsys)
    assert any(line.startswith("Transfer: 208 rows of ") and "source.csv train (step: 1 hour); " in line for line in lines)
    assert any(line.startswith("WARNING: rows are missing in ") and "source.csv: 1 gap between" in line for line in lines)
    assert metrics(run_folder(transfer(features="MS", target="OT")))["baselines"]["of"]["target"] == "OT"


def test_what_contradicts_is_one_line(transfer, small, capsys, tmp_path: Path) -> None:
    assert refusal(small(data_path_pretrain="x.csv"), capsys).startswith("--data_path_pretrain: got x.csv, expected --")
    assert refusal(transfer(data_path_pretrain=None), capsys).startswith("--data_path_pretrain: got nothing, expected the")
    missing = refusal(transfer(data_path_pretrain="gone.csv"), capsys)
    assert "gone.csv: got no such file" in missing
    write_csv(tmp_path / "short.csv", 100, ("a", "b"))
    line = refusal(transfer(data_path_pretrain="short.csv", batch_size=40), capsys)
    assert line == "--batch_size: got 40, expected at most 31, for 31 training windows"
    write_csv(tmp_path / "short.csv", 50, ("a", "b"))
    assert "got 35 rows in the train split of " in refusal(transfer(data_path_pretrain="short.csv"), capsys)
    words = transfer()
    train(words, capsys)
    other = [*words, "--is_training", "0", "--data_path_pretrain", "series.csv"]
    line = refusal(other, capsys)
    assert line.startswith("--data_pretrain: got custom, file series.csv, expected source.csv, on which ")


def test_the_published_entry_asks_for_the_set_and_has_its_defaults(small, transfer, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main.main(small(), "run_pretrain.py")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("run_pretrain.py: error: --data_pretrain: got nothing, expected a value")
    assert parse_flags(transfer(), "run_pretrain.py").patience == 5 and parse_flags(transfer()).patience == 10
    named = parse_flags(transfer(data_pretrain="ETTh1", data_path_pretrain=None), "run_pretrain.py")
    assert named.data_path_pretrain == "ETTh1.csv"
    assert run_main.main(transfer(max_iters=2), "run_pretrain.py") == 0
    lines = capsys.readouterr().out
    assert "EarlyStopping counter: 0 out of 5" in lines
    # a test reads no pretraining data, and the checkpoint may be any
    assert (
        run_main.main([*transfer(data_pretrain=None, data_path_pretrain=None), "--is_training", "0"], "run_pretrain.py") == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == lines.splitlines()[-1]
