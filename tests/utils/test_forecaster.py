"""Forecasts from Python: the command line's numbers, many series at once, bands, and frames that will not do."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import utils.run
from layers.errors import InputError
from tests.small_run import COLUMNS, PRED_LEN, SEQ_LEN, command_line, run_folder, write_csv
from utils.flags import parse_flags
from utils.forecaster import Forecaster
from utils.results.bands import probabilities
from utils.saving.checkpoint import Checkpoint

ROWS = 600  # 420 train, 60 validation: enough for 95 %
MODELS = {
    "DLinear": {"model": "DLinear"},
    "Autoformer": {"model": "Autoformer"},
    "TimeLLM": {"model": "TimeLLM"},
    "stack": {"model": "LinearStack", "stack_windows": 48},
    "target alone": {"model": "Ridge", "features": "MS", "target": "flow"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbones):
    folder = tmp_path_factory.mktemp("runs")
    write_csv(folder / "series.csv", ROWS)

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
    return cache(lambda name: Forecaster.load(run_folder(trained(name)), device="cpu"))


@pytest.fixture
def frame(trained) -> pd.DataFrame:
    words = trained("DLinear")
    return pd.read_csv(Path(words[words.index("--root_path") + 1]) / "series.csv")


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
    for number, label in enumerate(["north", "south", "east"]):
        own = frame.iloc[number : ROWS - 9 * number].copy()
        own[list(COLUMNS)] = own[list(COLUMNS)] * (1 + number) + rng.standard_normal((len(own), 3))
        alone[label] = own
    # row by row, as they come in from several places
    mixed = pd.concat([own.assign(id=label) for label, own in alone.items()]).sort_values("date", kind="stable")
    # Time-LLM reads printed digits of what it has forecast itself, in which the last bit may turn one.
    steps = PRED_LEN if name == "TimeLLM" else 2 * PRED_LEN + 3
    together = forecaster.predict(mixed, steps=steps, id_column="id")
    expected = pd.concat([forecaster.predict(own, steps=steps).assign(id=label) for label, own in alone.items()])
    pd.testing.assert_frame_equal(together, expected[list(together)].reset_index(drop=True), rtol=1e-5, atol=1e-4)


def test_bands_are_forecast_plus_deviation_times_offset(trained, loaded, frame) -> None:
    """By hand: the checkpoint's offsets, the deviation of the last window, squares that add up beyond pred_len."""
    intervals = Checkpoint.open(run_folder(trained("DLinear"))).intervals.newest
    training = frame[list(COLUMNS)].to_numpy()[:420]
    scale = training.std(axis=0)
    window = frame[list(COLUMNS)].to_numpy()[-SEQ_LEN:] / scale
    unit = np.sqrt(window.var(axis=0) + 1e-5)
    found = loaded("DLinear").predict(frame, steps=2 * PRED_LEN + 1)
    ends = [f"_{side}{level}" for level in (80, 95) for side in ("lo", "hi")]
    assert list(found.columns) == ["date", *COLUMNS, *(name + end for name in COLUMNS for end in ends)]
    for n, name in enumerate(COLUMNS):
        for end, probability in zip(ends, (0.1, 0.9, 0.025, 0.975), strict=True):
            offsets = intervals.offsets[probabilities(intervals.levels).index(probability), n]
            away = (found[name + end] - found[name]).to_numpy() / scale[n] / unit[n]
            np.testing.assert_allclose(away[:PRED_LEN], offsets, rtol=1e-4, atol=1e-5)
            whole, sign = offsets[-1], np.sign(offsets[-1])
            second = sign * np.sqrt(whole**2 + offsets**2)
            np.testing.assert_allclose(away[PRED_LEN : 2 * PRED_LEN], second, rtol=1e-4, atol=1e-5)
            assert away[-1] == pytest.approx(sign * np.sqrt(2 * whole**2 + offsets[0] ** 2), rel=1e-4)


def test_levels_that_are_asked_for(trained, loaded, frame, tmp_path: Path, capsys) -> None:
    words = [*trained("DLinear"), "--intervals", "none", "--checkpoints", str(tmp_path)]
    utils.run.main(parse_flags(words))
    forecaster, without = loaded("DLinear"), Forecaster.load(run_folder(words), device="cpu")
    plain, both, deciles = (forecaster.predict(frame, intervals=asked) for asked in (None, (80, 95), (60,)))
    assert list(plain.columns) == ["date", *COLUMNS] and plain.equals(without.predict(frame))
    assert both.equals(forecaster.predict(frame)) and both[plain.columns].equals(plain)
    assert ((deciles["OT_lo60"] >= both["OT_lo80"]) & (deciles["OT_hi60"] <= both["OT_hi80"])).all()
    assert without.notes[0].startswith("No prediction intervals")
    for one, asked, message in (
        (forecaster, (80, 90), "got 90 of .*, expected those that it has, 80 95; calibrate them with"),
        (without, (80, 95), "got 80 of .*, expected none, for it has none; calibrate them without"),
        *((forecaster, wrong, "got .*, expected levels such as") for wrong in ("all", 80, (None,))),
    ):
        with pytest.raises(InputError, match=f"^intervals: {message}"):
            one.predict(frame, intervals=asked)


def test_loaded_once_it_forecasts_many_times(trained, frame, capsys, monkeypatch) -> None:
    run, made = run_folder(trained("TimeLLM")), []
    capsys.readouterr()
    before = torch.get_rng_state()
    forecaster = Forecaster.load(run, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)  # the caller's own draws go on
    made_once = forecaster.context.model.prototype_kv
    monkeypatch.setattr(forecaster.context.model, "prototype_kv", lambda: made.append(1) or made_once())
    first, later = forecaster.predict(frame.iloc[:-1]), forecaster.predict(frame)
    assert len(made) == 1 and forecaster.predict(frame.iloc[:-1]).equals(first) and not later.equals(first)
    assert capsys.readouterr() == ("", "")


def test_threads_get_what_one_thread_gets(trained, loaded, frame, capsys) -> None:
    """Two Forecasters, loaded at once and called by four threads from the first call on, while one of them scores."""
    run, frames, scored = run_folder(trained("TimeLLM")), [frame.iloc[: ROWS - cut] for cut in range(24)], frame.iloc[-60:]
    expected, scores = [loaded("TimeLLM").predict(rows) for rows in frames], loaded("TimeLLM").evaluate(scored)
    capsys.readouterr()
    with ThreadPoolExecutor(4) as pool:
        both = list(pool.map(lambda _: Forecaster.load(run, device="cpu"), range(2)))
        found = [pool.submit(both[number % 2].predict, rows) for number, rows in enumerate(frames)]
        found.insert(3, pool.submit(both[0].evaluate, scored))
    assert found.pop(3).result() == scores
    assert [forecast.result().equals(alone) for forecast, alone in zip(found, expected, strict=True)] == [True] * 24
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["Autoformer", "DLinear", "target alone"])
def test_windows_of_a_frame_are_scored_as_those_of_a_test(trained, loaded, frame, name: str) -> None:
    held = json.loads((run_folder(trained(name)) / "metrics.json").read_text())
    found = loaded(name).evaluate(frame.iloc[ROWS - 120 - SEQ_LEN :])
    simple = {row["name"]: row for row in held["baselines"]["rows"]}
    assert (scored := found.pop("baselines")).keys() == {"last value", "last season"}
    for row, scores in [("last value", scored["last value"])]:  # its season is a day, that of the file may be a week
        assert (scores["mse"], scores["mae"]) == pytest.approx((simple[row]["mse"], simple[row]["mae"]), rel=1e-6)
    assert found.pop("learned_until") == held["data"]["learned_until"] and found.pop("windows_after") == held["windows"]
    assert found == {key: held[key] for key in found}
    assert {"test", "windows", "standardised", "own_units", "intervals", "first_forecast_row"} == set(found)
    early = loaded(name).evaluate(frame.iloc[: ROWS - 100])  # of which most rows trained
    assert 0 < early["windows_after"] < early["windows"]
    # in two parts they do not cross from one series to the other
    parts = pd.concat([frame.iloc[: ROWS - 50].assign(id="a"), frame.iloc[ROWS - 50 :].assign(id="b")])
    scores = [loaded(name).evaluate(part, id_column="id") for part in (parts, *(part for _, part in parts.groupby("id")))]
    both, counts = scores[0], [ROWS - 50 - 39, 50 - 39]
    assert both["windows"] == sum(counts)
    mse = np.average([one["test"]["mse"] for one in scores[1:]], weights=counts)
    assert both["test"]["mse"] == pytest.approx(mse, rel=1e-6)
    with pytest.raises(InputError, match="^frame: got 39 rows, expected at least 40, a window of history and horizon"):
        loaded(name).evaluate(frame.iloc[:39])


def test_frames_with_gaps_an_index_of_dates_and_columns_of_their_own(trained, loaded, frame) -> None:
    forecaster = loaded("DLinear")
    expected = forecaster.predict(frame)
    indexed = frame.assign(date=pd.to_datetime(frame["date"])).set_index("date")
    assert forecaster.predict(indexed).equals(expected.assign(date=expected["date"].astype(indexed.index.dtype)))
    other = frame[["OT", "date", "flow", "load"]].assign(remark="dry", wind=np.nan)
    assert forecaster.predict(other.iloc[-SEQ_LEN:], steps=3).equals(expected.iloc[:3])  # seq_len rows are enough
    # empty cells are filled where that is asked for
    filling = Forecaster.load(run_folder(trained("DLinear")), device="cpu", fill_missing="linear")
    middle = (frame["flow"][ROWS - 4] + frame["flow"][ROWS - 2]) / 2
    line, holes = (worth(frame, value, row=ROWS - 3).astype({"flow": float}) for value in (middle, np.nan))
    assert filling.predict(holes).equals(filling.predict(line))


def test_dates_are_read_in_the_order_of_the_training(backbones, tmp_path: Path, capsys) -> None:
    days = write_csv(tmp_path / "series.csv", 335)  # to the 12th of a month
    table = pd.read_csv(days).assign(date=pd.date_range("2019-01-12", periods=335).strftime("%d/%m/%y"))
    table.to_csv(days, index=False)
    off = {"plots": 0, "torch_checkpoint": 0, "save_predictions": 0, "model": "Ridge", "patch_len": 4, "seq_len": 8}
    words = command_line(tmp_path, backbones["qwen2"], **off, dayfirst=True, do_predict=True)
    utils.run.main(parse_flags(words))
    printed = capsys.readouterr().out
    assert (
        "dates are read day first (12/12/19 is 2019-12-12 00:00:00), --dayfirst False" not in printed
    )  # no other can be read
    expected = list(pd.date_range("2019-12-13", periods=PRED_LEN))
    assert list(pd.read_csv(run_folder(words) / "forecast.csv", parse_dates=["date"])["date"]) == expected
    forecaster, frame = Forecaster.load(run_folder(words), device="cpu"), table.tail(12)  # days of December, or months
    assert list(forecaster.predict(frame)["date"]) == expected
    assert forecaster.notes[-1].startswith("frame: dates are read day first (12/12/19 is 2019-12-12")
    other = Forecaster.load(run_folder(words), device="cpu", dayfirst=False)
    with pytest.raises(
        InputError, match="rows that are 1 month apart, expected 1 day, .*; frame: dates are read month first"
    ):
        other.predict(frame)


def test_days_without_a_midnight_are_forecast_and_drawn(backbones, tmp_path: Path) -> None:
    days = write_csv(tmp_path / "series.csv", 200)
    table = pd.read_csv(days).assign(date=pd.date_range("2018-01-01", periods=200))
    table.to_csv(days, index=False)
    words = command_line(tmp_path, backbones["qwen2"], model="Ridge", plots=0, torch_checkpoint=0, save_predictions=0)
    utils.run.main(parse_flags(words))
    forecaster = Forecaster.load(run_folder(words), device="cpu")
    whole = pd.date_range("2018-10-01", periods=50).tz_localize("America/Sao_Paulo", nonexistent="shift_forward")
    assert whole[34].hour == 1  # the 4th of November has no midnight
    for rows in (34, 35, 40):
        frame = table.iloc[:rows].drop(columns="date").set_index(whole[:rows])
        assert list(forecaster.predict(frame)["date"]) == list(whole[rows : rows + PRED_LEN])
        assert forecaster.plot(frame).axes


def test_pictures(loaded, frame, tmp_path: Path) -> None:
    forecaster, many = loaded("DLinear"), pd.concat([frame.assign(shop=name) for name in "abc"])
    made = forecaster.predict(many, steps=2 * PRED_LEN, id_column="shop")
    drawn = forecaster.plot(many, steps=2 * PRED_LEN, id_column="shop")
    assert [axes.get_ylabel() for axes in drawn.axes] == [f"{s}: {c}" for s in "abc" for c in COLUMNS][:7]
    assert len(drawn.axes[3].collections) == 4  # two bands, each lighter beyond pred_len
    alone = forecaster.plot(forecast=made[made["shop"] == "b"])
    for axes, name in zip([*drawn.axes[3:6], *alone.axes], [*COLUMNS, *COLUMNS], strict=True):
        (line,) = (line for line in axes.get_lines() if line.get_label() == "forecast")
        assert np.array_equal(line.get_ydata()[-2 * PRED_LEN :], made[made["shop"] == "b"][name])
    with pytest.raises(InputError, match="^forecast: got "):
        forecaster.plot(forecast=made.drop(columns="OT"))
    assert forecaster.plot(frame, path=tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")


def worth(frame: pd.DataFrame, value: object, row: int = 5, column: str = "flow") -> pd.DataFrame:
    cells = frame[column].astype(object)
    cells.iloc[row] = value
    return frame.assign(**{column: cells})


BAD_FRAMES = {
    "no frame": (lambda f: f["OT"], "frame: got a Series, expected a pandas.DataFrame"),
    "empty": (lambda f: f.iloc[:0], "frame: got 0 rows of 4 columns, expected rows with a date and numbers"),
    "no dates": (lambda f: f.drop(columns="date"), "frame: got the columns .*, expected a column 'date' or a DatetimeIndex"),
    "numbers for dates": (lambda f: f.assign(date=range(len(f))), "frame: column 'date': got numbers such as 0"),
    "no date": (lambda f: worth(f, None, 7, "date"), "frame: row 7, column 'date': got an empty cell"),
    "NaT": (lambda f: f.assign(date=pd.to_datetime(worth(f, None, 7, "date")["date"])), "frame: row 7, column"),
    "no timestamp": (lambda f: worth(f, "soon", 7, "date"), "frame: row 7, column 'date': got 'soon', expected a timestamp"),
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
    "short": (lambda f: f.iloc[-31:], "frame: got 31 rows, expected at least 32, which the trained model reads"),
    "step": (lambda f: f.iloc[::2], "frame: got rows that are 2 hours apart, expected 1 hour, the step of the training"),
    "two series": (lambda f: pd.concat([f.assign(id="a"), f.assign(id="b")]), "frame: row .*, column 'date': got '2020-01"
                   ".* where a column names the series of each row, give it as id_column"),
    "short series": (lambda f: pd.concat([f.assign(id="a"), f.iloc[:9].assign(id="b")]), "frame, series 'b': got 9 rows, "
                     "expected at least 32", {"id_column": "id"}),
    "no name": (lambda f: pd.concat([f.assign(id="a"), f.assign(id=None)]), "frame: row 600, column 'id': got no",
                {"id_column": "id"}),
    "channel": (lambda f: f, "id_column: got 'OT', expected a column that is not forecast", {"id_column": "OT"}),
    "no column": (lambda f: f, "frame: got no column 'shop'", {"id_column": "shop"}),
    "band": (lambda f: f.assign(OT_lo80="a"), "id_column: got 'OT_lo80', expected a name that no column",
             {"id_column": "OT_lo80"}),
    **{f"{steps!r} steps": (lambda f: f, f"steps: got {steps!r}, expected a whole number of at least 1", {"steps": steps})
       for steps in (0, 2.5, "8", True)},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_frame_that_will_not_do_is_named(loaded, frame, name: str) -> None:
    change, message, *more = BAD_FRAMES[name]
    with pytest.raises(InputError, match=f"^{message}") as caught:
        loaded("DLinear").predict(change(frame), **(more[0] if more else {}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"device": "tpu"}, "--device: got 'tpu', expected one of auto, cpu, cuda"),
        ({"fill_missing": "zero"}, "--fill_missing: got 'zero', expected one of linear, ffill"),
        ({"sequences": 3}, "--sequences: got an unknown flag"),
        ({"seq_len": 64}, "--checkpoint .*, expected .* for these flags"),
        ({"llm_model_path": "gone"}, "--llm_model_path"),
        ({"run": "none"}, "--checkpoint .*none: got no such file or folder"),
        ({"run": "."}, "--checkpoint .*: got no record of a training in it"),
    ],
)
def test_flags_are_checked_as_those_of_a_command_line(trained, tmp_path: Path, capsys, flags: dict, message: str) -> None:
    run = tmp_path / flags["run"] if "run" in flags else run_folder(trained("TimeLLM"))
    with pytest.raises(InputError, match=f"^{message}"):
        Forecaster.load(run, **{"device": "cpu"} | {name: value for name, value in flags.items() if name != "run"})
    capsys.readouterr()
