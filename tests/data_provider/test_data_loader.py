"""Splits, scaling and windows, against values computed by hand."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from data_provider.data_loader import fingerprint, load_series, own_scale
from data_provider.synthetic import write_synthetic
from data_provider.table import read_table
from layers.errors import InputError
from tests.realdata import real_data


@pytest.fixture(scope="module")
def etth1(tmp_path_factory):
    """A file with ETTh1's rows and columns, made up."""
    return write_synthetic("ETTh1", tmp_path_factory.mktemp("data"))


def write_csv(folder, rows: int, columns=("a", "b", "OT"), freq="h"):
    """Values that tell where they come from: row r of column c is 1000 c + r."""
    values = np.arange(rows)[:, None] + 1000.0 * np.arange(len(columns))
    frame = pd.DataFrame(values, columns=list(columns))
    frame.insert(0, "date", pd.date_range("2020-01-01", periods=rows, freq=freq))
    frame.to_csv(folder / "own.csv", index=False)


def own(folder, **flags):
    flags = {"seq_len": 8, "label_len": 3, "pred_len": 4} | flags
    return load_series(data="custom", root_path=folder, data_path="own.csv", **flags)


def test_counts_of_etth1(etth1):
    series = load_series("ETTh1", etth1.parent, etth1.name, seq_len=512, pred_len=96)
    assert [len(series.windows(flag)) for flag in ("train", "val", "test")] == [8033, 2785, 2785]
    assert series.windows("train").dates[-1] + pd.Timedelta(hours=1) == series.windows("val").window_dates(0)[1]
    assert series.synthetic


def test_counts_of_the_real_files():
    for name, counts in (("ETTh1", [8033, 2785, 2785]), ("ETTm2", [33953, 11425, 11425])):
        path = real_data(name)
        series = load_series(name, path.parent, path.name, seq_len=512, pred_len=96)
        assert [len(series.windows(flag)) for flag in ("train", "val", "test")] == counts
        assert not series.synthetic


def test_scaler_is_fitted_on_the_training_rows(etth1):
    series = load_series("ETTh1", etth1.parent, etth1.name, seq_len=96, pred_len=24, percent=10)
    values = pd.read_csv(etth1).iloc[:, 1:].to_numpy()
    mean, deviation = values[:8640].mean(axis=0), values[:8640].std(axis=0)
    np.testing.assert_allclose(series.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(series.deviation, deviation, rtol=1e-12)
    scaler = StandardScaler().fit(values[:8640])
    np.testing.assert_array_equal(series.values, scaler.transform(values).astype(np.float32))


def test_own_units(tmp_path):
    write_csv(tmp_path, rows=101)
    for features, columns, first in (("M", ["a", "b", "OT"], 0), ("S", ["b"], 1), ("MS", ["b"], 1)):
        series = own(tmp_path, features=features, target="b")
        rows = np.arange(101)[:, None] + 1000.0 * np.arange(3)
        np.testing.assert_array_equal(series.own, rows[:, [1]] if features == "S" else rows)
        assert series.own.dtype == np.float64 and series.forecast_columns == columns
        forecast = rows[:, first : first + len(columns)]
        np.testing.assert_array_equal(series.own[:, series.forecast_slice], forecast)
        back = series.to_own_units(series.values[:, series.forecast_slice])
        assert back.dtype == np.float64
        np.testing.assert_allclose(back, forecast, atol=1e-4)
        windows = series.values[:6, series.forecast_slice].reshape(2, 3, -1)
        np.testing.assert_array_equal(series.to_own_units(windows).reshape(6, -1), back[:6])


def test_step_and_future(tmp_path):
    write_csv(tmp_path, rows=101, freq="15min")
    series = own(tmp_path)
    assert series.step == pd.Timedelta(minutes=15) and series.step_words == "15 minutes"
    assert list(series.future_dates(2)) == list(pd.date_range(series.dates[-1], periods=3, freq="15min")[1:])
    assert series.marks.shape == (101, 4)  # --freq h, as given
    assert own(tmp_path, freq=None).marks.shape == (101, 5)  # and as read off the rows: minutes, too


def test_fingerprint_of_the_training_rows(tmp_path):
    values = np.arange(6.0).reshape(3, 2)
    known = "84a6e8b7afdd286a48ab0aab2c72227fff91a935b0489e633018914bd01693cd"  # of struct.pack("<6d", 0, 1, ..., 5)
    assert fingerprint(values) == fingerprint(np.asfortranarray(values)) == known
    assert fingerprint(values.T) != known
    write_csv(tmp_path, rows=101)
    series = own(tmp_path)
    assert series.fingerprint == fingerprint(series.own[:70])
    known = "957997c4532cc5f03984a20b947413291730ae2d5e65d2cdaa3af0b7c3144445"  # of 1000, 1001, ..., 1069
    assert own(tmp_path, features="S", target="b").fingerprint == known


def test_a_file_that_no_training_saw_has_its_own_scale(tmp_path):
    write_csv(tmp_path, rows=50)
    frame = pd.read_csv(tmp_path / "own.csv")
    frame["a"] = 4.0
    frame.to_csv(tmp_path / "own.csv", index=False)
    table = read_table(tmp_path / "own.csv")
    whole, single = own_scale(table, "M", None), own_scale(table, "MS", None)
    assert whole.forecast_columns == ["a", "b", "OT"] and single.forecast_columns == single.columns == ["OT"]
    assert whole.mean.tolist() == [4, 1024.5, 2024.5] and whole.deviation[0] == 1
    np.testing.assert_allclose(single.deviation, np.arange(50).std(), rtol=1e-12)
    assert whole.values[:, 0].tolist() == [0] * 50 and abs(single.values.mean()) < 1e-6
    assert own_scale(table, "S", "b").columns == ["b"] and single.target == "OT"
    with pytest.raises(InputError, match="--target: got 'c', expected one of the columns of .*own.csv: a, b, OT"):
        own_scale(table, "S", "c")


def test_custom_windows_by_hand(tmp_path):
    write_csv(tmp_path, rows=101)  # 70 train, 20 test, 11 validation
    series = own(tmp_path)
    assert [len(series.windows(flag)) for flag in ("train", "val", "test")] == [70 - 11, 11 - 3, 20 - 3]
    rows = {"train": 0, "val": 62, "test": 73}  # first row of window 0
    for flag, first in rows.items():
        windows = series.windows(flag)
        for index in (0, len(windows) - 1):
            item = windows[index]
            raw = {key: series.to_own_units(item[key].numpy()) for key in ("x", "y")}
            start = first + index
            np.testing.assert_allclose(raw["x"][:, 0], np.arange(start, start + 8), atol=1e-3)
            np.testing.assert_allclose(raw["y"][:, 2], 2000 + np.arange(start + 5, start + 12), atol=1e-3)
            assert item["index"] == index and item["x"].dtype == torch.float32
            assert item["x_mark"].shape == (8, 4) and item["y_mark"].shape == (7, 4)
            assert windows.window_dates(index) == (series.dates[start], series.dates[start + 8])
    assert series.windows("test").window_dates(16)[1] + pd.Timedelta(hours=3) == series.dates[-1]


def test_index_outside(tmp_path):
    write_csv(tmp_path, rows=101)
    windows = own(tmp_path).windows("val")
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


def test_features(tmp_path):
    write_csv(tmp_path, rows=101)
    single, many = own(tmp_path, features="S", target="b"), own(tmp_path, features="MS", target="b")
    assert single.columns == ["b"] and single.windows("test").target_index is None
    assert many.columns == ["a", "b", "OT"] and many.windows("test").target_index == 1
    np.testing.assert_array_equal(single.windows("val")[0]["x"][:, 0], many.windows("val")[0]["x"][:, 1])
    assert own(tmp_path).target_index is None


def test_few_shot(etth1):
    series = load_series("ETTh1", etth1.parent, etth1.name, seq_len=512, pred_len=96, percent=5)
    assert len(series.windows("train")) == (8640 - 512) * 5 // 100 + 512 - 512 - 96 + 1
    assert len(series.windows("val")) == 2785


def test_items_share_memory_and_survive_pickling(tmp_path):
    write_csv(tmp_path, rows=101)
    series = own(tmp_path)
    windows = series.windows("train")
    assert windows[3]["x"].data_ptr() == windows.values[3:].ctypes.data
    assert np.shares_memory(windows.values, series.values)
    copy = pickle.loads(pickle.dumps(windows))
    assert torch.equal(copy[5]["y"], windows[5]["y"]) and copy.window_dates(5) == windows.window_dates(5)


def test_large_values_stay_finite(tmp_path):
    write_csv(tmp_path, rows=101)
    frame = pd.read_csv(tmp_path / "own.csv")
    frame["a"] *= 1e60  # beyond float32
    frame.to_csv(tmp_path / "own.csv", index=False)
    assert np.isfinite(own(tmp_path).values).all()
    frame.loc[40, "a"] = 1e300
    frame.to_csv(tmp_path / "own.csv", index=False)
    with pytest.raises(InputError, match=r"row 42, column 'a': got 1e\+300 .* too large .* expected at most 1e\+150"):
        own(tmp_path)


def test_too_short_names_lengths_that_fit(tmp_path):
    write_csv(tmp_path, rows=101)
    with pytest.raises(InputError) as caught:
        own(tmp_path, seq_len=60, pred_len=11)
    message = str(caught.value)
    assert "--seq_len 60 --pred_len 11: got 70 rows in the train split of " in message and "expected at least 71;" in message
    assert "--pred_len 10 with --seq_len 60 or --seq_len 59 with --pred_len 11" in message
    with pytest.raises(
        InputError,
        match="got 11 rows in the val split .* expected at least 12 beside the 8 .* --pred_len 11 with --seq_len 8",
    ):
        own(tmp_path, pred_len=12)
    with pytest.raises(InputError, match=r"\(--percent 10 of 70\)"):
        own(tmp_path, seq_len=40, pred_len=4, percent=10)
    for flags in (
        {"seq_len": 60, "pred_len": 10},
        {"seq_len": 59, "pred_len": 11},
        {"seq_len": 8, "pred_len": 11},
    ):
        assert len(own(tmp_path, **flags).windows("train")) >= 1


@pytest.mark.parametrize("percent", [1, 7, 30, 100])
def test_longest_lengths_are_the_longest(tmp_path, percent):
    write_csv(tmp_path, rows=301)

    def fits(seq_len, pred_len):
        try:
            return own(tmp_path, seq_len=seq_len, label_len=0, pred_len=pred_len, percent=percent)
        except InputError as error:
            return str(error)

    message = fits(209, 2)
    assert "longest" in message
    longest = int(message.rsplit("--seq_len ", 1)[1].split(" with")[0])
    assert not isinstance(fits(longest, 2), str) and isinstance(fits(longest + 1, 2), str)


def test_other_bad_input(tmp_path, monkeypatch):
    write_csv(tmp_path, rows=101)
    cases = [
        ({"target": "c", "features": "S"}, "--target: got 'c', expected one of the columns of .*: a, b, OT"),
        ({"features": "X"}, "--features: got 'X', expected one of M, S, MS"),
        ({"percent": 0}, "--percent: got 0, expected a whole number from 1 to 100"),
        ({"pred_len": 0}, "--pred_len: got 0, expected a whole number of at least 1"),
        ({"label_len": 9}, "--label_len: got 9, expected a whole number from 0 to --seq_len 8"),
        ({"freq": "z"}, "--freq: got 'z', expected one of s, t"),
    ]
    for flags, message in cases:
        with pytest.raises(InputError, match=message):
            own(tmp_path, **flags)
    with pytest.raises(InputError, match="--data ETTh1: got .* with 101 rows, expected at least 14400"):
        load_series("ETTh1", tmp_path, "own.csv")
    with pytest.raises(InputError, match="--data: got 'etth1', expected one of ETTh1, "):
        load_series("etth1", tmp_path, "own.csv")
    monkeypatch.delenv("TIMELLM_DATA", raising=False)
    with pytest.raises(InputError, match=r"none\.csv: got no such file, expected .*none\.csv.*python scripts/get_data\.py"):
        load_series("ETTh1", tmp_path, "none.csv")


@pytest.mark.parametrize("below", ["", "ETT-small"])
def test_file_found_in_the_data_folder(tmp_path, monkeypatch, below):
    (tmp_path / below).mkdir(exist_ok=True)
    write_csv(tmp_path / below, rows=101)
    monkeypatch.setenv("TIMELLM_DATA", str(tmp_path))
    assert own("./nowhere").path == tmp_path / below / "own.csv"
