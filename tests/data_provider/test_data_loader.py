"""Splits, scaling, windows and descriptions of a file, against values computed by hand."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import StandardScaler

from data_provider.data_loader import load_series, own_scale
from data_provider.description import DEFAULT_DESCRIPTION, bank_file, dataset_description
from data_provider.splits import DATASETS, DataSet, Splits, find_csv, split_rows
from data_provider.synthetic import write_synthetic
from data_provider.table import read_table
from layers.errors import InputError
from tests.realdata import ROOT, real_data
from utils.flags import parse_flags

FILE = Path("some.csv")


@pytest.fixture(scope="module")
def etth1(tmp_path_factory):
    """A file with ETTh1's rows and columns, made up."""
    return write_synthetic("ETTh1", tmp_path_factory.mktemp("data"))


@pytest.fixture
def own(tmp_path):
    """`own(rows, step, change, **flags)`: a file's series, whose values tell where they come from: 1000 x column + row."""

    def load(rows: int = 101, step: str = "h", change=lambda frame: frame, **flags):
        dates = pd.date_range("2020-01-01", periods=rows, freq=step, name="date")
        frame = pd.DataFrame(np.arange(rows)[:, None] + 1000.0 * np.arange(3), dates, ["a", "b", "OT"])
        change(frame).to_csv(tmp_path / "own.csv")
        flags = {"seq_len": 8, "label_len": 3, "pred_len": 4, "data": "custom"} | flags
        return load_series(root_path=tmp_path, data_path="own.csv", **flags)

    return load


def test_etth1_is_split_by_its_borders_and_scaled_by_its_training_rows(etth1) -> None:
    series = load_series("ETTh1", etth1.parent, etth1.name, seq_len=512, pred_len=96, percent=5)
    windows = [series.windows(flag) for flag in ("train", "val", "test")]
    assert [len(part) for part in windows] == [(8640 - 512) * 5 // 100 - 96 + 1, 2785, 2785]
    assert windows[1].dates[512] == series.dates[8640] and windows[2].dates[512] == series.dates[8640 + 2880]
    values = pd.read_csv(etth1).iloc[:, 1:].to_numpy()
    scaler = StandardScaler().fit(values[:8640])  # of all training rows, also with --percent
    np.testing.assert_array_equal(series.mean, scaler.mean_)
    np.testing.assert_array_equal(series.std, scaler.scale_)
    np.testing.assert_array_equal(series.values, scaler.transform(values).astype(np.float32))
    assert series.synthetic


def test_the_measured_files() -> None:
    for name, counts in (("ETTh1", [8033, 2785, 2785]), ("ETTm2", [33953, 11425, 11425]), ("Weather", [36280, 5175, 10444])):
        path = real_data(name.replace("W", "w"))
        series = load_series(name, path.parent, path.name, target=None, freq=None, seq_len=512, pred_len=96)
        assert [len(series.windows(flag)) for flag in ("train", "val", "test")] == counts and not series.synthetic
    assert series.splits == Splits(36887, 5270, 10539, few_shot=36887) and series.step_words == "10 minutes"


@pytest.mark.parametrize(
    ("features", "columns", "forecast"),
    [("M", ["a", "b", "OT"], ["a", "b", "OT"]), ("S", ["b"], ["b"]), ("MS", ["a", "b", "OT"], ["b"])],
)
def test_windows_by_hand(own, features, columns, forecast) -> None:
    series = own(features=features, target="b")  # 70 rows train, 11 validate, 20 test
    assert series.columns == columns and series.forecast_columns == forecast and series.own.dtype == np.float64
    of = 1000.0 * np.array([["a", "b", "OT"].index(name) for name in columns])
    first = {"train": 0, "val": 62, "test": 73}  # the first row of window 0
    for flag, count in (("train", 70 - 11), ("val", 11 - 3), ("test", 20 - 3)):
        windows = series.windows(flag)
        assert len(windows) == count and windows.sequence_count == count * len(forecast)
        for index in (0, count - 1):
            item, start = windows[index], first[flag] + index
            for name, rows in (("x", np.arange(start, start + 8)), ("y", np.arange(start + 5, start + 12))):
                raw = item[name].numpy().astype(np.float64) * series.std + series.mean
                np.testing.assert_allclose(raw, rows[:, None] + of, atol=1e-3)
            assert item["index"] == index and item["x_mark"].shape == (8, 4) and item["y_mark"].shape == (7, 4)
            assert windows.dates[index] == series.dates[start]
            assert item["x"].data_ptr() == series.values[start:].ctypes.data  # nothing is copied
        for index in (-1, count):
            with pytest.raises(IndexError):
                windows[index]
    back = series.to_own_units(series.values[:6, series.forecast_slice].reshape(2, 3, -1))
    np.testing.assert_allclose(back.reshape(6, -1), series.own[:6, series.forecast_slice], atol=1e-4)
    assert back.dtype == np.float64


def test_a_file_that_no_training_saw_has_its_own_scale(own) -> None:
    table = read_table(own(50, change=lambda frame: frame.assign(a=4.0)).path)
    whole, single = own_scale(table, "M", None), own_scale(table, "MS", None)
    assert whole.forecast_columns == ["a", "b", "OT"] and single.forecast_columns == single.columns == ["OT"]
    assert whole.mean.tolist() == [4, 1024.5, 2024.5] and whole.values[:, 0].tolist() == [0] * 50
    np.testing.assert_allclose(single.std, np.arange(50).std(), rtol=1e-12)
    without = own(50, change=lambda frame: frame.drop(columns="OT"), target=None)
    assert own_scale(read_table(without.path), "S", None).columns == ["b"] == [without.target]  # without OT the last one


@pytest.mark.parametrize(
    ("rows", "seq_len", "pred_len", "percent", "message"),
    [
        (101, 60, 11, 100, "70 rows in the train split of .* at least 71; a shorter --seq_len or --pred_len"),
        (101, 8, 12, 100, "11 rows in the val split of .* at least 12 beside the 8 "),
        (101, 40, 4, 10, r"43 rows \(--percent 10 of 70\) in the train split"),
        (4, 8, 4, 100, "2 rows in the train split"),
    ],
)
def test_too_short_a_file_is_one_line(own, rows, seq_len, pred_len, percent, message) -> None:
    with pytest.raises(InputError, match=f"^--seq_len {seq_len} --pred_len {pred_len}: got {message}"):
        own(rows, seq_len=seq_len, pred_len=pred_len, percent=percent)


def test_a_data_set_is_a_row_of_the_table(monkeypatch) -> None:
    monkeypatch.setitem(DATASETS, "Mine", DataSet(borders=(60, 20, 10)))
    assert split_rows("Mine", 95, 8, 4, 100, FILE) == Splits(60, 20, 10, few_shot=60)
    with pytest.raises(InputError, match=r"--data Mine: got some.csv with 89 rows, expected at least 90 \(60 \+ 20 \+ 10\)"):
        split_rows("Mine", 89, 8, 4, 100, FILE)
    assert split_rows("ETTh2", 17420, 96, 96, 100, FILE) == Splits(8640, 2880, 2880, few_shot=8640)
    assert split_rows("ETTm1", 69680, 96, 96, 100, FILE) == Splits(34560, 11520, 11520, few_shot=34560)
    for name in ("custom", "ECL", "Traffic", "Weather"):
        assert split_rows(name, 101, 8, 4, 100, FILE) == Splits(70, 11, 20, few_shot=70)


@pytest.mark.parametrize(
    ("name", "file"), [("ECL", "electricity.csv"), ("Traffic", "traffic.csv"), ("Weather", "weather.csv")]
)
def test_a_name_stands_for_the_familys_file_folder_and_text(tmp_path, monkeypatch, name: str, file: str) -> None:
    monkeypatch.delenv("TIMELLM_DATA", raising=False)
    words = "--task_name long_term_forecast --is_training 1 --model_id a --model_comment b --model DLinear --data"
    args = parse_flags([*words.split(), name, "--root_path", str(tmp_path)])
    assert (args.data, args.data_path, args.target, args.freq) == (name, file, None, None)
    places = tmp_path / file, tmp_path / Path(file).stem / file
    with pytest.raises(InputError, match=f"got no such file, expected one of {places[0]}, {places[1]}; public collections"):
        find_csv(args.root_path, args.data_path)
    places[1].parent.mkdir()
    places[1].touch()
    assert find_csv(args.root_path, args.data_path) == places[1]
    places[1].rename(packed := places[1].with_name(f"{file}.gz"))
    assert find_csv(args.root_path, args.data_path) == find_csv(args.root_path, f"{args.data_path}.gz") == packed
    text = dataset_description(Namespace(**vars(args) | {"prompt_domain": 1}))
    assert 60 < len(text.split()) < 120 and text == (ROOT / f"dataset/prompt_bank/{name}.txt").read_text().strip()


def test_whose_description_a_run_takes() -> None:
    args = Namespace(data="custom", data_path="mine.csv", prompt_domain=0)
    assert dataset_description(args) == DEFAULT_DESCRIPTION and bank_file(args) is None
    args.prompt_domain = 1
    with pytest.raises(InputError, match="--prompt_domain: got 1, expected a file mine.txt in .*prompt_bank; write it or"):
        dataset_description(args)
    args.checkpoint = "runs/other"  # then the flag was inherited, and told of the training's data
    assert dataset_description(args) == DEFAULT_DESCRIPTION
    args.checkpoint = None
    args.data, args.data_path, args.prompt_domain = "custom", "folder/ETT.csv.gz", 0
    assert dataset_description(args).startswith("The Electricity")  # a custom file's own text needs no asking for
    args.prompt_text = "in  my\nwords"
    assert dataset_description(args) == "in my words"
