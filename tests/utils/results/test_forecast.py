"""Forecasts by the command line: a run's numbers by hand, its files, and the history that --append keeps."""

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

from data_provider.batches import Batch
from layers.errors import InputError
from models.TimeLLM import Model
from tests import small_run
from tests.realdata import ROOT
from utils.results.forecast import band_columns, write_forecast
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
            x = rows[-T:].t()  # (N, T)
            rows = torch.cat([rows, model(Batch(x, x[:, :0])).t()])
    return rows[known : known + steps].double().numpy() * deviation + mean


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
    metrics, held = json.loads((run / "metrics.json").read_text()), np.load(run / "predictions.npz")
    values = pd.read_csv(folder / "own.csv")[COLUMNS].to_numpy()
    truth = np.lib.stride_tricks.sliding_window_view(values[192:], H, axis=0).swapaxes(1, 2)  # the test's rows are 192 on
    assert held["pred"].shape == truth.shape and metrics["windows"] == len(truth)
    np.testing.assert_allclose(held["true"], truth, rtol=1e-5)
    assert pd.Timestamp(held["start"][0]) == pd.Timestamp("2024-02-27 00:00")
    own = held["pred"] - truth
    error = own / held["deviation"]
    assert metrics["test"]["mse"] == pytest.approx(np.mean(error**2), rel=1e-4)
    assert metrics["standardised"]["all"]["mae"] == pytest.approx(metrics["test"]["mae"], rel=1e-6)
    rmse = metrics["own_units"]["channels"]["price €"]["rmse"]
    assert rmse == pytest.approx(np.sqrt(np.mean(own[..., 2] ** 2)), rel=1e-4)
    assert metrics["standardised"]["steps"]["mse"][3] == pytest.approx(np.mean(error[:, 3] ** 2), rel=1e-4)
    assert f"Test MSE: {metrics['test']['mse']:.7f}" in out


def test_what_a_run_says_and_leaves(trained):
    folder, run, out = trained
    for line in (
        "240 rows from 2024-02-19 00:00:00 to 2024-02-28 23:00:00, step: 1 hour",
        "3 channels: load, OT, price €; all columns are forecast (target: OT)",
        "rows: train 168, val 24, test 48 (70 %, 10 %, 20 %)",
        "prompt: The data hold 3 series, measured every hour",
    ):
        assert line in out
    rows, steps = (list(csv.DictReader((run / name).open())) for name in ("history.csv", "steps.csv"))
    assert [row["epoch"] for row in rows] == ["1", "2"] and len(steps) == 12
    assert f"Vali Loss: {float(rows[1]['vali_loss']):.4f}" in out and float(rows[0]["seconds"]) > 0
    losses = [float(row["loss"]) for row in steps if row["epoch"] == "1"]
    assert np.mean(losses) == pytest.approx(float(rows[0]["train_loss"]), rel=1e-5)
    pictures = {path.name: path.read_bytes()[:4] for path in (run / "plots").iterdir()}
    names = ("error_by_step", "forecast", "loss_by_epoch", "test_windows")
    assert pictures == {f"{name}.png": b"\x89PNG" for name in names}


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


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (T - 1, COLUMNS, "x.csv: got 23 rows, expected at least --seq_len 24"),
        (T, COLUMNS[:2], "x.csv: got no column 'price €', expected the columns of the training: load, OT, price €"),
        (0, COLUMNS, "--predict_path: got no file "),
    ],
)
def test_files_that_do_not_fit_are_named(trained, tmp_path, capsys, rows, columns, message):
    if rows:
        make_file(tmp_path / "x.csv", rows, pd.date_range("2020", periods=rows, freq="h"), columns)
    words = [
        "--is_training",
        "0",
        "--do_predict",
        "--checkpoint",
        str(trained[1]),
        "--predict_path",
        str(tmp_path / "x.csv"),
    ]
    assert message in small_run.refusal(words, capsys)


HOURS = pd.date_range("2024-02-28 22:00", periods=12, freq="h")  # a midnight among them, of a leap day


def write(folder: Path, origin: int, append=True, seed=0, steps=4, levels=(80,), columns=("load", "OT")) -> list[str]:
    """Write a made-up forecast from row `origin` of HOURS."""
    values = np.random.default_rng(seed).standard_normal((steps, len(columns)))
    ends = [values[:, n] + way * level for n in range(len(columns)) for level in levels for way in (-1, 1)]
    table = [*values.T, *ends]
    names = [*columns, *band_columns(columns, levels)]
    frame = pd.DataFrame({"date": HOURS[origin + 1 : origin + 1 + steps]} | dict(zip(names, table, strict=True)))
    return write_forecast(folder, frame, HOURS[origin], append)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_two_columns_have_one_name() -> None:
    found = band_columns(["load", "OT"], [80, 99.5])
    assert found == ["load_lo80", "load_hi80", "load_lo99.5", "load_hi99.5", "OT_lo80", "OT_hi80", "OT_lo99.5", "OT_hi99.5"]
    columns = ["a", "a_lo80", "a_lo80_", "b"]
    names = band_columns(columns, [80])
    assert names[:2] == ["a_lo80__", "a_hi80"] and len({*columns, *names}) == 4 + 8


def test_a_history_has_the_rows_of_each_origin_once(tmp_path: Path) -> None:
    for origin in (0, 1, 2):
        assert write(tmp_path, origin, seed=origin) == [f"History of forecasts: {tmp_path / 'forecasts.csv'}"]
    assert set(files(tmp_path)) == {"forecast.csv", "forecasts.csv"}  # the history has what forecast.csv had
    held = pd.read_csv(tmp_path / "forecasts.csv", parse_dates=["origin"], date_format="ISO8601")
    assert list(held.columns) == ["origin", "date", "load", "OT", "load_lo80", "load_hi80", "OT_lo80", "OT_hi80"]
    assert held["origin"].tolist() == [HOURS[origin] for origin in (0, 1, 2) for _ in range(4)]
    last = held[held["origin"] == HOURS[2]].drop(columns="origin").reset_index(drop=True)
    assert last.equals(pd.read_csv(tmp_path / "forecast.csv"))
    np.testing.assert_allclose(held["OT_lo80"], held["OT"] - 80, rtol=1e-6)
    before = files(tmp_path)
    write(tmp_path, 2, seed=2)
    assert files(tmp_path) == before
    write(tmp_path, 0)  # an earlier one, which the history has
    assert (tmp_path / "forecasts.csv").read_bytes() == before["forecasts.csv"]


@pytest.mark.parametrize(
    ("changes", "damage", "message"),
    [
        ({"seed": 1}, None, r"got another forecast from 2024-02-28 22:00:00 than the one to append \(4 and 4 rows\)"),
        ({"steps": 6}, None, r"got another forecast from 2024-02-28 22:00:00 than the one to append \(4 and 6 rows\)"),
        ({"levels": (80, 95)}, None, "got the columns origin,date,load,OT,load_lo80,load_hi80,OT_lo80,OT_hi80, expected "),
        ({"columns": ("load", "wind")}, None, "got the columns origin,date,load,OT,"),
        ({}, b"origin,date,load\n", "got the columns origin,date,load, expected those"),
        ({}, b"\xff\xfe", "got a file that cannot be read"),
    ],
)  # fmt: skip
def test_what_a_history_cannot_take_is_refused_and_nothing_is_written(tmp_path, changes, damage, message) -> None:
    write(tmp_path, 0)
    if damage:
        (tmp_path / "forecasts.csv").write_bytes(damage)
    before = files(tmp_path)
    with pytest.raises(InputError, match=rf"forecasts\.csv: {message}") as caught:
        write(tmp_path, 0, **changes)
    assert "\n" not in str(caught.value) and files(tmp_path) == before


def test_without_a_history_an_earlier_forecast_is_moved_aside(tmp_path: Path) -> None:
    assert write(tmp_path, 0, append=False) == [] == write(tmp_path, 0, append=False)  # the same: nothing to say
    first = (tmp_path / "forecast.csv").read_bytes()
    aside = tmp_path / "forecast.2024-02-28T23-00-00.csv"  # after its first date
    assert write(tmp_path, 3, append=False) == [f"An earlier forecast is now in: {aside}"]
    assert aside.read_bytes() == first
    second = (tmp_path / "forecast.csv").read_bytes()
    write(tmp_path, 0, append=False, seed=5)  # another one from the first origin, as after a new training
    other = (tmp_path / "forecast.csv").read_bytes()
    (line,) = write(tmp_path, 1, append=False)
    assert line.endswith("forecast.2024-02-28T23-00-00.1.csv")
    kept = files(tmp_path)
    assert kept.pop("forecast.csv") != other and sorted(kept.values()) == sorted([first, second, other])
    for text in ("mine\n", "date,x\nsoon,1\n"):  # somebody else's
        (tmp_path / "forecast.csv").write_text(text)
        assert write(tmp_path, 0, append=False)[0].split("forecast.")[-1] in ("earlier.csv", "earlier.1.csv")
        assert any(held == text.encode() for held in files(tmp_path).values())


def test_a_file_that_grows_is_forecast_hour_by_hour(tmp_path: Path, backbones, capsys) -> None:
    small_run.write_csv(tmp_path / "series.csv", 400)
    rows = (tmp_path / "series.csv").read_text().splitlines(keepends=True)
    (tmp_path / "series.csv").write_text("".join(rows[:360]))
    off = {"plots": 0, "torch_checkpoint": 0, "save_predictions": 0}
    words = small_run.command_line(tmp_path, backbones["qwen2"], model="Ridge", **off)
    small_run.train(words, capsys)
    run, H = small_run.run_folder(words), small_run.PRED_LEN
    alone = ["--is_training", "0", "--do_predict", "--plots", "0", "--device", "cpu", "--checkpoint", str(run)]
    for last in (360, 361, 365):
        (tmp_path / "series.csv").write_text("".join(rows[:last]))
        lines = small_run.train([*alone, "--append"], capsys)
        assert not any("Epoch" in line or "now in" in line for line in lines)
    origins = [rows[last - 1].split(",")[0] for last in (360, 361, 365)]
    assert pd.read_csv(run / "forecasts.csv")["origin"].tolist() == [origin for origin in origins for _ in range(H)]
    rolled = small_run.train([*alone, "--predict_steps", str(H + 2)], capsys)
    first = pd.Timestamp(origins[-1]) + pd.Timedelta(hours=H + 1)
    assert f"Prediction intervals: from row {H + 1}, {first}, on they are not calibrated, only widened" in rolled
