"""Forecasts from a trained run, its results and its record, by the command line."""

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from data_provider.timestamps import future_dates, infer_step
from layers.errors import InputError
from models.TimeLLM import Model
from tests.realdata import ROOT
from utils.flags import parse_flags
from utils.results.forecast import read_history, roll
from utils.saving.checkpoint import Checkpoint
from utils.saving.files import read_record

COLUMNS = ["load", "OT", "price €"]
T, H = 24, 6


def make_file(path: Path, rows: int, dates: pd.DatetimeIndex, columns=COLUMNS, seed=0) -> pd.DataFrame:
    random, row = np.random.default_rng(seed), np.arange(rows)[:, None]
    values = np.sin(2 * np.pi * row / 12 + np.arange(len(columns))) + 0.1 * random.standard_normal((rows, len(columns)))
    frame = pd.DataFrame(values * np.logspace(0, 3, len(columns)) + 50, columns=columns)
    frame.insert(0, "date", dates)
    frame.to_csv(path, index=False)
    return frame


def run_main(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "run_main.py"), *map(str, flags)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, str]:
    """A folder with own.csv and a run trained on it: (folder, run, what it printed)."""
    folder = tmp_path_factory.mktemp("own")
    make_file(folder / "own.csv", 240, pd.date_range("2024-02-19", periods=240, freq="h"))  # ends on 2024-02-28 23:00
    make = [sys.executable, str(ROOT / "scripts" / "make_backbone.py"), "--preset", "tiny", "--out", str(folder / "llm")]
    subprocess.run(make, check=True, capture_output=True)
    done = run_main(
        folder, "--task_name", "long_term_forecast", "--is_training", 1, "--model", "TimeLLM", "--model_id", "own",
        "--model_comment", "t", "--data", "custom", "--root_path", ".", "--data_path", "own.csv", "--seq_len", T,
        "--pred_len", H, "--d_model", 8, "--d_ff", 8, "--llm_model_path", "llm", "--llm_layers", 1,
        "--train_epochs", 2, "--max_iters", 6, "--batch_size", 8, "--num_workers", 0, "--learning_rate", "1e-3",
        "--do_predict",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "checkpoints").iterdir()
    return folder, run, done.stdout


def by_hand(folder: Path, run: Path, file: str, steps: int) -> np.ndarray:
    """The rows `[steps, N]` that follow a file: the scaler of the 168 training rows, the model on the last T rows,
    again on the last T with its own forecast behind them, and back."""
    training = pd.read_csv(folder / "own.csv")[COLUMNS].to_numpy()[:168]
    mean, deviation = training.mean(axis=0), training.std(axis=0)
    flags = Namespace(**read_record(run)["flags"])
    flags.llm_model_path = str(folder / "llm")
    model = Model(flags).eval()
    model.load_state_dict(load_file(run / "checkpoint.safetensors"), strict=False)  # beside them, the intervals
    rows = torch.from_numpy(((pd.read_csv(folder / file)[COLUMNS].to_numpy() - mean) / deviation).astype(np.float32))
    known = len(rows)
    with torch.inference_mode():
        while len(rows) < known + steps:
            rows = torch.cat([rows, model(rows[None, -T:])[0]])
    return rows[known : known + steps].double().numpy() * deviation + mean


def test_what_was_read_off_the_file_is_printed(trained):
    _, run, out = trained
    assert "240 rows from 2024-02-19 00:00:00 to 2024-02-28 23:00:00, step: 1 hour" in out
    assert "3 channels: load, OT, price €; all columns are forecast (target: OT)" in out
    assert "rows: train 168, val 24, test 48 (70 %, 10 %, 20 %)" in out
    assert "prompt: The data hold 3 series, measured every hour" in out
    record = read_record(run)
    assert record["flags"]["prompt_text"].startswith("The data hold") and record["target"] == "OT"


def test_forecast_is_prediction_times_deviation_plus_mean(trained):
    folder, run, _ = trained
    found = pd.read_csv(run / "forecast.csv")
    # 24 validation rows make 19 windows, of which 80 % asks 9 and 95 % would ask 39
    assert list(found.columns) == ["date", *COLUMNS, *(f"{name}_{end}80" for name in COLUMNS for end in ("lo", "hi"))]
    expected = pd.date_range("2024-02-29 00:00", periods=H, freq="h")  # a leap day
    assert (pd.to_datetime(found["date"]) == expected).all()
    np.testing.assert_allclose(found[COLUMNS].to_numpy(), by_hand(folder, run, "own.csv", H), rtol=1e-7)  # of 8 digits


def test_results_agree_with_each_other(trained):
    folder, run, out = trained
    metrics = json.loads((run / "metrics.json").read_text())
    held = np.load(run / "predictions.npz")
    values = pd.read_csv(folder / "own.csv")[COLUMNS].to_numpy()
    windows = 48 - H + 1
    assert held["pred"].shape == (windows, H, 3) and metrics["windows"] == windows
    for window in (0, windows - 1):  # the truth of window w are rows 192 + w on
        np.testing.assert_allclose(held["true"][window], values[192 + window : 198 + window], rtol=1e-5)
    assert pd.Timestamp(held["start"][0]) == pd.Timestamp("2024-02-27 00:00")
    error = (held["pred"].astype(float) - held["true"]) / held["deviation"]
    assert metrics["test"]["mse"] == pytest.approx(np.mean(error**2), rel=1e-4)
    assert metrics["standardised"]["all"]["mae"] == pytest.approx(metrics["test"]["mae"], rel=1e-6)
    price = held["pred"][..., 2].astype(float) - held["true"][..., 2]
    assert metrics["own_units"]["channels"]["price €"]["rmse"] == pytest.approx(np.sqrt(np.mean(price**2)), rel=1e-4)
    assert metrics["standardised"]["steps"]["mse"][3] == pytest.approx(np.mean(error[:, 3] ** 2), rel=1e-4)
    assert [row["name"] for row in metrics["baselines"]["rows"]] == ["last value", "last season", "ridge"]
    assert f"Test MSE: {metrics['test']['mse']:.7f}" in out


def test_record_of_the_run(trained):
    _, run, out = trained
    rows = list(csv.DictReader((run / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert f"Vali Loss: {float(rows[1]['vali_loss']):.4f}" in out and float(rows[0]["seconds"]) > 0
    steps = list(csv.DictReader((run / "steps.csv").open()))
    assert len(steps) == 12
    losses = [float(row["loss"]) for row in steps if row["epoch"] == "1"]
    assert np.mean(losses) == pytest.approx(float(rows[0]["train_loss"]), rel=1e-5)
    pictures = {path.name for path in (run / "plots").iterdir()}
    assert pictures == {"error_by_step.png", "forecast.png", "loss_by_epoch.png", "test_windows.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "plots").iterdir())


def test_forecast_of_another_file_rolls_on(trained):
    folder, run, _ = trained
    business = pd.bdate_range("2024-01-02", periods=T)  # T rows are enough
    make_file(folder / "newer.csv", T, business, [*COLUMNS[::-1], "extra"], seed=5)  # other order, one more
    done = run_main(
        folder, "--is_training", 0, "--do_predict", "--checkpoint", run, "--predict_path", "newer.csv",
        "--predict_steps", 15, "--plots", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--predict_steps 15 is more than --pred_len 6: the forecast was continued from itself 2 times" in done.stdout
    assert "not forecast, for the training did not have them: extra" in done.stdout
    assert "WARNING: the rows are 1 business day apart, those of the training were 1 hour" in done.stdout
    found = pd.read_csv(run / "forecast.csv")
    assert list(found.columns)[:4] == ["date", *COLUMNS]
    assert (pd.to_datetime(found["date"]) == pd.bdate_range("2024-02-05", periods=15)).all()
    np.testing.assert_allclose(found[COLUMNS].to_numpy(), by_hand(folder, run, "newer.csv", 15), rtol=1e-7)


def test_zero_shot_leaves_the_trainings_results_alone(trained):
    folder, run, _ = trained
    make_file(folder / "far.csv", 160, pd.date_range("2010-01-31", periods=160, freq="ME"), ["a", "b"], seed=7)
    before = (run / "metrics.json").read_bytes()
    common = ("--is_training", 0, "--checkpoint", run, "--data", "custom", "--root_path", ".", "--data_path", "far.csv")
    done = run_main(folder, *common, "--plots", 0, "--save_predictions", 0)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((run / "on_far" / "metrics.json").read_text())
    assert list(metrics["own_units"]["channels"]) == ["a", "b"] and metrics["data"]["file"] == "far.csv"
    assert not (run / "on_far" / "predictions.npz").exists() and not (run / "on_far" / "plots").exists()
    done = run_main(folder, *common, "--do_predict", "--plots", 0)
    assert done.returncode == 0, done.stderr
    assert "zero-shot: far.csv is not the data of the checkpoint" in done.stdout
    found = pd.to_datetime(pd.read_csv(run / "on_far" / "forecast.csv")["date"])
    assert (found == pd.date_range("2023-05-31", periods=H, freq="ME")).all()  # ends of months, a leap year's too
    assert str(found.iloc[-1].date()) == "2023-10-31"
    assert (run / "metrics.json").read_bytes() == before


def test_summary_has_a_row_a_run(trained):
    folder, run, _ = trained
    command = [sys.executable, str(ROOT / "scripts" / "summary.py"), "checkpoints", "--csv", "runs.csv"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert run.name in done.stdout and "best_epoch" in done.stdout
    row = next(row for row in csv.DictReader((folder / "runs.csv").open()) if row["run"] == run.name)
    assert float(row["mse"]) == json.loads((run / "metrics.json").read_text())["test"]["mse"]
    assert row["epochs"] == "2"


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (T - 1, COLUMNS, "x.csv: got 23 rows, expected at least --seq_len 24"),
        (T, COLUMNS[:2], "x.csv: got no column 'price €', expected the columns of the training: load, OT, price €"),
    ],
)
def test_files_that_do_not_fit_are_named(trained, tmp_path, rows, columns, message):
    _, run, _ = trained
    make_file(tmp_path / "x.csv", rows, pd.date_range("2020", periods=rows, freq="h"), columns)
    args = parse_flags(
        ["--is_training", "0", "--do_predict", "--checkpoint", str(run), "--predict_path", str(tmp_path / "x.csv")]
    )
    with pytest.raises(InputError, match=message):
        read_history(args, Checkpoint.open(run))


def test_rolling_goes_on_from_the_forecast():
    seen = []

    def forecast(x):
        seen.append(x.clone())
        return x[-1] + torch.arange(1.0, 4.0)[:, None]  # counts on

    found = roll(forecast, torch.arange(5.0)[:, None], 7)
    assert found[:, 0].tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert [x[:, 0].tolist() for x in seen] == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [6, 7, 8, 9, 10]]


@pytest.mark.parametrize(
    ("freq", "last"), [("ME", "2024-01-31"), ("D", "2024-02-28"), ("B", "2024-02-23"), ("15min", "2024-02-28 23:45")]
)
def test_dates_across_month_ends_leap_days_and_weekends(freq, last):
    dates = pd.date_range(end=last, periods=40, freq=freq)
    assert (future_dates(dates, 12, infer_step(dates)) == pd.date_range(last, periods=13, freq=freq)[1:]).all()
