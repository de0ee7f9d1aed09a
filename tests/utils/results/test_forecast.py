"""Forecasts by the command line: a run's numbers by hand, its files, and the history that --append keeps."""

import json
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import utils.run
from data_provider.batches import Batch
from layers.errors import InputError
from models.TimeLLM import Model
from tests import small_run
from utils.flags import parse_flags
from utils.forecaster import Forecaster
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbones) -> tuple[Path, Path, str]:
    """A folder with own.csv and a run trained on it: (folder, run, what it printed)."""
    folder = tmp_path_factory.mktemp("own")
    make_file(folder / "own.csv", 240, pd.date_range("2024-02-19", periods=240, freq="h"))  # ends on 2024-02-28 23:00
    words = small_run.command_line(
        folder, backbones["qwen2"], data_path="own.csv", seq_len=T, pred_len=H, train_epochs=2, max_iters=6, batch_size=8,
        do_predict=True, log_every=None,
    )  # fmt: skip
    with redirect_stdout(StringIO()) as out:
        utils.run.main(parse_flags(words))
    return folder, small_run.run_folder(words), out.getvalue()


def by_hand(folder: Path, run: Path, file: str, steps: int) -> np.ndarray:
    """The rows `[steps, N]` that follow a file: the scaler of the 168 training rows, the model on the last T rows,
    again on the last T with its own forecast behind them, and back."""
    training, known = (pd.read_csv(folder / name)[COLUMNS].to_numpy() for name in ("own.csv", file))
    mean, std = training[:168].mean(axis=0), training[:168].std(axis=0)
    model = Model(Namespace(**read_record(run)["flags"])).eval()
    model.load_state_dict(load_file(run / "checkpoint.safetensors"), strict=False)  # beside them, the intervals
    rows = torch.from_numpy(((known - mean) / std).astype(np.float32))
    with torch.inference_mode():
        while len(rows) < len(known) + steps:
            x = rows[-T:].t()  # (N, T)
            rows = torch.cat([rows, model(Batch(x, x[:, :0])).t()])
    return rows[len(known) : len(known) + steps].double().numpy() * std + mean


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
    error = own / values[:168].std(axis=0)
    expected = {"mse": np.mean(error**2), "mae": np.mean(np.abs(error))}
    assert metrics["test"] == pytest.approx(expected, rel=1e-4)
    rmse = metrics["own_units"]["channels"]["price €"]["rmse"]
    assert rmse == pytest.approx(np.sqrt(np.mean(own[..., 2] ** 2)), rel=1e-4)
    assert metrics["standardised"]["steps"]["mse"] == pytest.approx(list(np.mean(error**2, axis=(0, 2))), rel=1e-4)
    assert f"Test MSE: {metrics['test']['mse']:.7f}" in out
    rows, steps = pd.read_csv(run / "history.csv"), pd.read_csv(run / "steps.csv")
    np.testing.assert_allclose(steps.groupby("epoch")["loss"].mean(), rows["train_loss"], rtol=1e-5)


def test_forecast_of_another_file_rolls_on(trained, capsys):
    folder, run, _ = trained
    business = pd.bdate_range("2024-01-02", periods=T)  # T rows are enough
    make_file(folder / "newer.csv", T, business, [*COLUMNS[::-1], "extra"], seed=5)  # other order, one more
    words = ["--is_training", "0", "--do_predict", "--checkpoint", str(run), "--predict_path", str(folder / "newer.csv")]
    text = "\n".join(small_run.train([*words, "--predict_steps", "15", "--plots", "0"], capsys))
    assert "--predict_steps 15 is more than --pred_len 6: the forecast was continued from itself 2 times" in text
    assert "not forecast, for the training did not have them: extra" in text
    assert "WARNING: the rows are 1 business day apart, those of the training were 1 hour" in text
    found = pd.read_csv(run / "forecast.csv")
    assert list(found.columns)[:4] == ["date", *COLUMNS]
    assert (pd.to_datetime(found["date"]) == pd.bdate_range("2024-02-05", periods=15)).all()
    np.testing.assert_allclose(found[COLUMNS].to_numpy(), by_hand(folder, run, "newer.csv", 15), rtol=1e-7)


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
    words = ["--is_training", "0", "--do_predict", "--checkpoint", str(trained[1]), "--predict_path", tmp_path / "x.csv"]
    assert message in small_run.refusal(list(map(str, words)), capsys)


def test_files_of_other_formats_give_the_plain_files_forecasts(backbones, tmp_path: Path, capsys) -> None:
    """A file as a Chinese Excel has it, with text and an index, and the long format; and newer files, by the checkpoint."""
    names, dates = ["load", "温度"], pd.date_range("2024-01-01", periods=260, freq="h")
    for rows, stem in ((240, "old"), (260, "new")):
        frame = make_file(tmp_path / f"{stem}.csv", rows, dates[:rows], names)
        own = frame.rename(columns={"date": "时间"}).assign(备注="晴", half=[1.5, *[np.nan] * (rows - 1)])
        own.to_csv(tmp_path / f"{stem}.own.csv.gz", sep=";", decimal=",", encoding="gbk")
        frame.melt("date", var_name="id").to_csv(tmp_path / f"{stem}.long.csv", index=False)
    single = {"features": "S", "target": "温度"}
    runs = {  # what it is, its flags, and the plain run's
        "own.csv.gz": ({"date_column": "时间"} | single, single),
        "long.csv": ({"id_column": "id"}, {}),
    }
    for kind, flags in runs.items():
        found = []
        for file, own_flags in zip((kind, "csv"), flags, strict=True):
            words = small_run.command_line(
                tmp_path, backbones["qwen2"], model="Ridge", data_path=f"old.{file}", model_comment=f"{kind}_{file}",
                seq_len=T, pred_len=H, plots=0, torch_checkpoint=0, do_predict=True, **own_flags,
            )  # fmt: skip
            lines, run = small_run.train(words, capsys), small_run.run_folder(words)
            said = [line.partition(" was read as: ")[2] for line in lines if " was read as: " in line]
            here = "encoding gb18030, semicolon-separated, decimal commas, timestamps in column '时间'"
            here += ", without column 'Unnamed: 0'"
            assert said == ([here] if file == "own.csv.gz" else [])
            texts = [(run / "forecast.csv").read_text()]
            later = ["--is_training", "0", "--do_predict", "--plots", "0", "--checkpoint", str(run)]
            lines = small_run.train([*later, "--predict_path", str(tmp_path / f"new.{file}")], capsys)
            assert (f" was read as: {here}" in "".join(lines)) == (file == "own.csv.gz")
            found.append(
                [json.loads((run / "metrics.json").read_text())["test"], *texts, (run / "forecast.csv").read_text()]
            )
        assert found[0] == found[1] and len(set(found[0][1:])) == 2
    frames = [pd.read_csv(tmp_path / f"new.{name}") for name in ("long.csv", "csv")]
    forecaster = Forecaster.load(small_run.run_folder(words).with_name(small_run.run_folder(words).name[:-3] + "long.csv"))
    assert forecaster.predict(frames[0]).equals(forecaster.predict(frames[1]))


HOURS = pd.date_range("2024-02-28 22:00", periods=12, freq="h")  # a midnight among them, of a leap day


def write(folder: Path, origin: int, append=True, seed=0, steps=4, levels=(80,), columns=("load", "OT")) -> list[str]:
    values = np.random.default_rng(seed).standard_normal((steps, len(columns)))
    ends = [values[:, n] + way * level for n in range(len(columns)) for level in levels for way in (-1, 1)]
    table = [*values.T, *ends]
    names = [*columns, *band_columns(columns, levels)]
    frame = pd.DataFrame({"date": HOURS[origin + 1 : origin + 1 + steps]} | dict(zip(names, table, strict=True)))
    return write_forecast(folder, frame, HOURS[origin], append)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_history_has_the_rows_of_each_origin_once(tmp_path: Path) -> None:
    for origin in (0, 1, 2):
        assert write(tmp_path, origin, seed=origin) == [f"History of forecasts: {tmp_path / 'forecasts.csv'}"]
    assert set(files(tmp_path)) == {"forecast.csv", "forecasts.csv"}  # the history has what forecast.csv had
    held = pd.read_csv(tmp_path / "forecasts.csv", parse_dates=["origin"], date_format="ISO8601")
    assert list(held.columns) == ["origin", "date", "load", "OT", "load_lo80", "load_hi80", "OT_lo80", "OT_hi80"]
    assert held["origin"].tolist() == [HOURS[origin] for origin in (0, 1, 2) for _ in range(4)]
    last = held[held["origin"] == HOURS[2]].drop(columns="origin").reset_index(drop=True)
    assert last.equals(pd.read_csv(tmp_path / "forecast.csv"))
    before = files(tmp_path)
    write(tmp_path, 2, seed=2)
    assert files(tmp_path) == before
    write(tmp_path, 0)  # an earlier one, which the history has
    assert (tmp_path / "forecasts.csv").read_bytes() == before["forecasts.csv"]
    # what it cannot take is refused, and nothing is written
    another = "got another forecast from 2024-02-28 22:00:00 than the one to append"
    columns, before = "got the columns origin,date,load,OT,load_lo80,load_hi80,OT_lo80,OT_hi80, expected ", files(tmp_path)
    for changes, message in (
        ({"seed": 1}, rf"{another} \(4 and 4 rows\)"), ({"steps": 6}, rf"{another} \(4 and 6 rows\)"),
        ({"levels": (80, 95)}, columns), ({"columns": ("load", "wind")}, columns),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"forecasts\.csv: {message}"):
            write(tmp_path, 0, **changes)
        assert files(tmp_path) == before
    for damage, message in (
        (b"origin,date,load\n", "got the columns origin,date,load, "),
        (b"\xff\xfe", "got the columns \ufffd\ufffd, "),
    ):
        (tmp_path / "forecasts.csv").write_bytes(damage)
        with pytest.raises(InputError, match=rf"forecasts\.csv: {message}"):
            write(tmp_path, 0)


def test_without_a_history_an_earlier_forecast_is_moved_aside(tmp_path: Path) -> None:
    assert write(tmp_path, 0, append=False) == [] == write(tmp_path, 0, append=False)  # the same: nothing to say
    kept = [files(tmp_path)["forecast.csv"]]
    # another one from the first origin, as after a new training; somebody else's
    for number, (origin, seed, text) in enumerate(((3, 0, None), (0, 5, None), (1, 0, None), (1, 0, "mine\n")), 1):
        if text:
            (tmp_path / "forecast.csv").write_text(text)
            kept[-1] = text.encode()
        aside = tmp_path / f"forecast.{number}.csv"
        assert write(tmp_path, origin, append=False, seed=seed) == [f"An earlier forecast is now in: {aside}"]
        assert aside.read_bytes() == kept[-1]
        kept.append(files(tmp_path)["forecast.csv"])


def test_a_file_that_grows_is_forecast_hour_by_hour(tmp_path: Path, capsys) -> None:
    H, rows = small_run.PRED_LEN, small_run.write_csv(tmp_path / "whole.csv", 400).read_text().splitlines(keepends=True)
    (tmp_path / "series.csv").write_text("".join(rows[:360]))
    words = small_run.command_line(tmp_path, tmp_path, model="Ridge", llm_model_path=None, plots=0)
    small_run.train(words, capsys)
    run = small_run.run_folder(words)
    alone = ["--is_training", "0", "--do_predict", "--plots", "0", "--device", "cpu", "--checkpoint", str(run)]
    for last in (360, 361, 365):
        (tmp_path / "series.csv").write_text("".join(rows[:last]))
        assert not any("now in" in line for line in small_run.train([*alone, "--append"], capsys))
    origins = [rows[last - 1].split(",")[0] for last in (360, 361, 365)]
    assert pd.read_csv(run / "forecasts.csv")["origin"].tolist() == [origin for origin in origins for _ in range(H)]
    first = pd.Timestamp(origins[-1]) + pd.Timedelta(hours=H + 1)
    rolled = small_run.train([*alone, "--predict_steps", str(H + 2)], capsys)
    assert f"Prediction intervals: from row {H + 1}, {first}, on they are not calibrated, only widened" in rolled
