"""Forecasts from Python: the command line's numbers, many series at once, bands, and frames that will not do."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import utils.run
from layers.errors import InputError
from tests.small_run import COLUMNS, PRED_LEN, SEQ_LEN, command_line, run_folder, write_csv
from utils.flags import parse_flags
from utils.forecaster import Forecaster
from utils.saving.checkpoint import Checkpoint

ROWS = 600  # 420 train, 60 validation: enough for 95 %
MODELS = {
    "DLinear": {"model": "DLinear"},
    "Autoformer": {"model": "Autoformer"},
    "TimeLLM": {"model": "TimeLLM"},
    "target alone": {"model": "Ridge", "features": "MS", "target": "flow"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_csv(folder / "series.csv", ROWS)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, backbones):
    """`trained(name)`: the words of that model's run, trained once."""

    @cache
    def of(name: str) -> list[str]:
        off = {"plots": 0, "torch_checkpoint": 0, "save_predictions": 0}
        flags = MODELS[name] | off | {"model_comment": name.replace(" ", "_"), "max_iters": 2, "eval_batch_size": 64}
        words = command_line(folder, backbones["qwen2"], **flags)
        utils.run.main(parse_flags(words))
        return words

    return of


@pytest.fixture(scope="module")
def loaded(trained):
    """`loaded(name)`: its Forecaster, loaded once."""
    return cache(lambda name: Forecaster.load(run_folder(trained(name)), device="cpu"))


@pytest.fixture
def frame(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "series.csv")


def values(forecast: pd.DataFrame) -> np.ndarray:
    return forecast.drop(columns=["date", "id"], errors="ignore").to_numpy(np.float64)


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_the_command_lines(trained, loaded, frame, capsys, name: str) -> None:
    words, steps = trained(name), 2 * PRED_LEN + 3
    flags = ["--is_training", "0", "--do_predict", "--predict_steps", str(steps)]
    utils.run.main(parse_flags([*words, *flags]))
    capsys.readouterr()
    found = loaded(name).predict(frame, steps=steps)
    assert capsys.readouterr() == ("", "")
    text = (run_folder(words) / "forecast.csv").read_text()
    assert found.to_csv(index=False, float_format="%.8g", lineterminator="\n") == text


@pytest.mark.parametrize("name", MODELS)
def test_many_series_are_forecast_as_each_alone(loaded, frame, name: str) -> None:
    forecaster, rng = loaded(name), np.random.default_rng(1)
    alone = {}
    for number, label in enumerate(["north", "south", "east", "west"]):
        own = frame.iloc[number : ROWS - 9 * number].copy()
        own[list(COLUMNS)] = own[list(COLUMNS)] * (1 + number) + rng.standard_normal((len(own), 3))
        alone[label] = own
    # row by row, as they come in from several places
    mixed = pd.concat([own.assign(id=label) for label, own in alone.items()]).sort_values("date", kind="stable")
    # Time-LLM reads printed digits of what it has forecast itself, in which the last bit may turn one.
    steps = PRED_LEN if name == "TimeLLM" else 2 * PRED_LEN + 3
    together = forecaster.predict(mixed, steps=steps, id_column="id")
    assert list(together.columns[:2]) == ["date", "id"] and list(together["id"].unique()) == list(alone)
    for label, own in alone.items():
        found = together[together["id"] == label].drop(columns="id").reset_index(drop=True)
        expected = forecaster.predict(own, steps=steps)
        assert list(found.columns) == list(expected.columns) and found["date"].equals(expected["date"])
        away = np.abs(values(found) - values(expected)).max(axis=0)
        assert (away <= 1e-6 * np.abs(values(expected)).max(axis=0)).all()


def test_bands_are_forecast_plus_deviation_times_offset(trained, loaded, frame) -> None:
    """By hand: the checkpoint's offsets, the deviation of the last window, squares that add up beyond pred_len."""
    intervals = Checkpoint.open(run_folder(trained("DLinear"))).intervals
    training = frame[list(COLUMNS)].to_numpy()[:420]
    scale = training.std(axis=0)
    window = frame[list(COLUMNS)].to_numpy()[-SEQ_LEN:] / scale
    unit = np.sqrt(window.var(axis=0) + 1e-5)
    found = loaded("DLinear").predict(frame, steps=2 * PRED_LEN + 1)
    ends = [f"_{side}{level}" for level in (80, 95) for side in ("lo", "hi")]
    assert list(found.columns) == ["date", *COLUMNS, *(name + end for name in COLUMNS for end in ends)]
    for n, name in enumerate(COLUMNS):
        for end, probability in zip(ends, (0.1, 0.9, 0.025, 0.975), strict=True):
            offsets = intervals.offsets[intervals.probabilities.index(probability), n]
            away = (found[name + end] - found[name]).to_numpy() / scale[n] / unit[n]
            np.testing.assert_allclose(away[:PRED_LEN], offsets, rtol=1e-4, atol=1e-5)
            whole, sign = offsets[-1], np.sign(offsets[-1])
            second = sign * np.sqrt(whole**2 + offsets**2)
            np.testing.assert_allclose(away[PRED_LEN : 2 * PRED_LEN], second, rtol=1e-4, atol=1e-5)
            assert away[-1] == pytest.approx(sign * np.sqrt(2 * whole**2 + offsets[0] ** 2), rel=1e-4)


def test_levels_that_are_asked_for(loaded, frame, tmp_path: Path) -> None:
    forecaster = loaded("DLinear")
    plain = forecaster.predict(frame, intervals=None)
    assert list(plain.columns) == ["date", *COLUMNS] and plain.equals(forecaster.predict(frame, intervals=()))
    both = forecaster.predict(frame, intervals=(80, 95))
    assert both.equals(forecaster.predict(frame)) and both[plain.columns].equals(plain)
    assert list(forecaster.predict(frame, intervals=[80]).columns)[-2:] == ["OT_lo80", "OT_hi80"]
    deciles = forecaster.predict(frame, intervals=(60,))  # of which the deciles are the ends
    assert ((deciles["OT_lo60"] >= both["OT_lo80"]) & (deciles["OT_hi60"] <= both["OT_hi80"])).all()
    with pytest.raises(
        InputError, match=r"^intervals: got 90 of .*, expected those that it has, 80 95; calibrate them with"
    ):
        forecaster.predict(frame, intervals=(80, 90))
    for wrong in ("all", 80, ("a",), (None,)):
        with pytest.raises(InputError, match="^intervals: got .*, expected levels such as"):
            forecaster.predict(frame, intervals=wrong)


def test_a_checkpoint_without_intervals_forecasts_without_them(trained, folder, backbones, frame, capsys) -> None:
    words = [*trained("DLinear"), "--intervals", "none", "--checkpoints", str(folder / "none")]
    utils.run.main(parse_flags(words))
    forecaster = Forecaster.load(run_folder(words), device="cpu")
    assert list(forecaster.predict(frame).columns) == ["date", *COLUMNS]
    assert len(forecaster.notes) == 1 and forecaster.notes[0].startswith("No prediction intervals")
    with pytest.raises(
        InputError, match=r"^intervals: got 80 of .*, expected none, for it has none; calibrate them without"
    ):
        forecaster.predict(frame, intervals=(80, 95))


def test_loaded_once_it_forecasts_many_times(trained, frame, capsys, monkeypatch) -> None:
    run = run_folder(trained("TimeLLM"))
    capsys.readouterr()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    forecaster = Forecaster.load(run, device="cpu")
    assert torch.equal(torch.rand(2), expected)  # the caller's own draws go on
    made = []
    shared = forecaster.job.model.prototype_kv
    monkeypatch.setattr(forecaster.job.model, "prototype_kv", lambda: made.append(1) or shared())
    first, later = forecaster.predict(frame.iloc[:-1]), forecaster.predict(frame)
    assert len(made) == 1 and forecaster.predict(frame.iloc[:-1]).equals(first) and not later.equals(first)
    forecaster.evaluate(frame.iloc[-60:])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["DLinear", "Autoformer", "target alone"])
def test_windows_of_a_frame_are_scored_as_those_of_a_test(trained, loaded, frame, name: str) -> None:
    held = json.loads((run_folder(trained(name)) / "metrics.json").read_text())
    found = loaded(name).evaluate(frame.iloc[ROWS - 120 - SEQ_LEN :])
    assert found == {key: held[key] for key in found}
    assert {"test", "windows", "standardised", "own_units", "intervals", "first_forecast_row"} == set(found)


def test_windows_do_not_cross_from_one_series_to_another(loaded, frame) -> None:
    forecaster = loaded("DLinear")
    parts = [frame.iloc[:100], frame.iloc[200:290]]
    alone = [forecaster.evaluate(part) for part in parts]
    both = forecaster.evaluate(pd.concat([part.assign(id=n) for n, part in enumerate(parts)]), id_column="id")
    counts = [61, 51]
    assert [one["windows"] for one in alone] == counts and both["windows"] == sum(counts)
    expected = np.average([one["test"]["mse"] for one in alone], weights=counts)
    assert both["test"]["mse"] == pytest.approx(expected, rel=1e-6)
    assert "intervals" not in forecaster.evaluate(parts[0], intervals=None)
    with pytest.raises(InputError, match="^frame: got 39 rows, expected at least 40, a window of history and horizon"):
        forecaster.evaluate(frame.iloc[:39])


def test_frames_with_an_index_of_dates_and_columns_of_their_own(loaded, frame) -> None:
    forecaster = loaded("DLinear")
    expected = forecaster.predict(frame)
    indexed = frame.assign(date=pd.to_datetime(frame["date"])).set_index("date")
    assert forecaster.predict(indexed).equals(expected.assign(date=expected["date"].astype(indexed.index.dtype)))
    other = frame[["OT", "date", "flow", "load"]].assign(remark="dry", wind=np.nan)
    assert forecaster.predict(other.iloc[-SEQ_LEN:]).equals(expected)  # seq_len rows are enough
    assert forecaster.predict(frame, steps=3).equals(expected.iloc[:3])


def test_pictures(loaded, frame, tmp_path: Path) -> None:
    forecaster = loaded("DLinear")
    many = pd.concat([frame.assign(shop=name) for name in "abc"])
    made = forecaster.predict(many, steps=2 * PRED_LEN, id_column="shop")
    drawn = forecaster.plot(many, steps=2 * PRED_LEN, id_column="shop")
    assert isinstance(drawn, Figure)
    assert [axes.get_ylabel() for axes in drawn.axes] == [f"{s}: {c}" for s in "abc" for c in COLUMNS][:7]
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert labels == ["history", "95 %", "80 %", "bands calibrated up to here", "forecast"]
    again = forecaster.plot(many, forecast=made, id_column="shop")
    alone = forecaster.plot(forecast=made[made["shop"] == "b"])
    for n, name in enumerate(COLUMNS, start=3):  # those of shop b
        lines = [next(line for line in figure.axes[place].get_lines() if line.get_label() == "forecast").get_ydata()
                 for figure, place in ((drawn, n), (again, n), (alone, n - 3))]  # fmt: skip
        assert all(len(figure.axes[n].collections) == 4 for figure in (drawn, again))  # beyond pred_len each goes on lighter
        assert np.array_equal(lines[0][1:], made[made["shop"] == "b"][name])
        assert np.array_equal(lines[0], lines[1]) and np.array_equal(lines[0][1:], lines[2])
    assert not forecaster.plot(frame, intervals=None).axes[0].collections
    for wrong in ({}, {"forecast": made.drop(columns="OT")}, {"forecast": made["OT"]}, {"forecast": made.iloc[:0]}):
        with pytest.raises(InputError, match="^(plot|forecast): got "):
            forecaster.plot(**wrong)
    path = forecaster.plot(frame, path=tmp_path / "new" / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def dated(frame: pd.DataFrame, row: int, date: object) -> pd.DataFrame:
    return frame.assign(date=[date if n == row else day for n, day in enumerate(frame["date"])])


def worth(frame: pd.DataFrame, value: object) -> pd.DataFrame:
    flow = frame["flow"].astype(object)
    flow.iloc[5] = value
    return frame.assign(flow=flow)


BAD_FRAMES = {
    "no frame": (lambda f: f["OT"], "frame: got a Series, expected a pandas.DataFrame"),
    "empty": (lambda f: f.iloc[:0], "frame: got 0 rows of 4 columns, expected rows with a date and numbers"),
    "no dates": (lambda f: f.drop(columns="date"), "frame: got the columns .*, expected a column 'date' or a DatetimeIndex"),
    "numbers for dates": (lambda f: f.assign(date=range(len(f))), "frame: column 'date': got numbers such as 0"),
    "no date": (lambda f: dated(f, 7, None), "frame: row 7, column 'date': got an empty cell"),
    "NaT": (lambda f: f.assign(date=pd.to_datetime(dated(f, 7, None)["date"])), "frame: row 7, column 'date': got an empty"),
    "no timestamp": (lambda f: dated(f, 7, "soon"), "frame: row 7, column 'date': got 'soon', expected a timestamp"),
    "twice": (lambda f: pd.concat([f, f.iloc[-1:].assign(OT=0)]), "frame: row 2020-01-25 23:00:00, column 'date': got "
              "'2020-01-25 23:00:00', which repeats, with other values, the row"),
    "back": (lambda f: f.iloc[::-1], "frame: row .*, column 'date': got '2020-01-25 22:00:00', which is earlier than"),
    "gap": (lambda f: f.drop(index=ROWS - 4), "frame: got no row between 2020-01-25 19:00:00 and 2020-01-25 21:00:00, "
            "expected a row every hour; fill the gap"),
    "column": (lambda f: f.drop(columns="flow"), "frame: got no column 'flow', expected the columns 'load', 'flow', 'OT'"),
    "columns": (lambda f: f.assign(b=f["OT"]).rename(columns={"b": "OT"}), "frame: got 2 columns 'OT', expected the "),
    "NaN": (lambda f: worth(f, np.nan), r"frame: row 2020-01-01 05:00:00, column 'flow': got an empty cell .*; "
            r".*fill_missing='linear'"),
    "infinite": (lambda f: worth(f, np.inf), "frame: row 2020-01-01 05:00:00, column 'flow': got 'inf' .*, expected"),
    "too large": (lambda f: worth(f, 1e100), "frame: row .*, column 'flow': got .* in deviations of the training"),
    "text": (lambda f: worth(f, "low"), "frame: row 2020-01-01 05:00:00, column 'flow': got 'low' .*, expected a number"),
    "short": (lambda f: f.iloc[-31:], "frame: got 31 rows, expected at least 32, the seq_len of the training"),
    "step": (lambda f: f.iloc[::2], "frame: got rows that are 2 hours apart, expected 1 hour, the step of the training"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_frame_that_will_not_do_is_named(loaded, frame, name: str) -> None:
    change, message = BAD_FRAMES[name]
    with pytest.raises(InputError, match=f"^{message}") as caught:
        loaded("DLinear").predict(change(frame))
    assert "\n" not in str(caught.value)


BAD_SERIES = {
    "no id": (lambda f: pd.concat([f.assign(id="a"), f.assign(id="b")]), None, "frame: row .*, column 'date': got '2020-01"
              ".* name the column of their names as id_column"),
    "short": (lambda f: pd.concat([f.assign(id="a"), f.iloc[:9].assign(id="b")]), "id", "frame, series 'b': got 9 rows, "
              "expected at least 32"),
    "twice": (lambda f: pd.concat([f, f.iloc[-1:].assign(OT=0)]).assign(id="b"), "id", "frame, series 'b': row .*, column "
              "'date': got '2020-01-25 23:00:00', which repeats"),
    "no name": (lambda f: pd.concat([f.assign(id="a"), f.assign(id=None)]), "id", "frame: row 600, column 'id': got no"),
    "channel": (lambda f: f, "OT", "id_column: got 'OT', expected a column that is not forecast"),
    "no column": (lambda f: f, "shop", "frame: got no column 'shop'"),
    "band": (lambda f: f.assign(OT_lo80="a"), "OT_lo80", "id_column: got 'OT_lo80', expected a name that no column"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SERIES)
def test_the_series_of_a_frame_are_named(loaded, frame, name: str) -> None:
    change, id_column, message = BAD_SERIES[name]
    with pytest.raises(InputError, match=f"^{message}"):
        loaded("DLinear").predict(change(frame), id_column=id_column)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "8", True])
def test_steps_are_a_number_of_rows(loaded, frame, steps) -> None:
    with pytest.raises(InputError, match=f"^steps: got {steps!r}, expected a whole number of at least 1"):
        loaded("DLinear").predict(frame, steps=steps)


def test_empty_cells_are_filled_where_that_is_asked_for(trained, loaded, frame) -> None:
    forecaster = Forecaster.load(run_folder(trained("DLinear")), device="cpu", fill_missing="linear")
    holes = frame.astype({"flow": float})
    holes.loc[ROWS - 3, "flow"] = np.nan
    line = holes.assign(flow=holes["flow"].fillna((frame["flow"][ROWS - 4] + frame["flow"][ROWS - 2]) / 2))
    assert forecaster.predict(holes).equals(forecaster.predict(line))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"device": "tpu"}, "--device: got 'tpu', expected one of auto, cpu, cuda"),
        ({"fill_missing": "zero"}, "--fill_missing: got 'zero', expected one of linear, ffill"),
        ({"sequences": 3}, "--sequences: got an unknown flag"),
        ({"seq_len": 64}, "--checkpoint .*, expected .* for these flags"),
        ({"max_sequences": -1}, "--max_sequences: got '-1', expected a whole number of at least 0"),
    ],
)
def test_flags_are_checked_as_those_of_a_command_line(trained, capsys, flags: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Forecaster.load(run_folder(trained("DLinear")), **{"device": "cpu"} | flags)
    capsys.readouterr()


def test_what_holds_no_run_is_named(tmp_path: Path, trained, capsys) -> None:
    with pytest.raises(InputError, match="^--checkpoint .*none: got no such file or folder"):
        Forecaster.load(tmp_path / "none")
    with pytest.raises(InputError, match="^--checkpoint .*: got no record of a training in it"):
        Forecaster.load(tmp_path)
    with pytest.raises(InputError, match="^--llm_model_path"):
        Forecaster.load(run_folder(trained("TimeLLM")), device="cpu", llm_model_path=tmp_path / "gone")
    capsys.readouterr()
