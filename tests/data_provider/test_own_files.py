"""A user's own file: what is read off it, and its empty cells."""

from argparse import Namespace

import numpy as np
import pandas as pd
import pytest

from data_provider.data_loader import load_series
from data_provider.description import (
    DEFAULT_DESCRIPTION,
    PROMPT_BANK,
    bank_file,
    dataset_description,
    make_description,
)
from data_provider.table import read_table
from data_provider.timestamps import frequency, infer_step, step_words
from layers.errors import InputError
from tests.realdata import real_data

NAN = np.nan


@pytest.mark.parametrize(
    ("freq", "words", "key"),
    [
        ("h", "1 hour", "h"), ("15min", "15 minutes", "t"), ("10min", "10 minutes", "t"), ("D", "1 day", "d"),
        ("B", "1 business day", "b"), ("W", "1 week", "w"), ("MS", "1 month", "m"), ("ME", "1 month", "m"),
        ("QS", "3 months", "m"), ("YS", "1 year", "m"), ("6h", "6 hours", "h"), ("30s", "30 seconds", "s"),
    ],
)  # fmt: skip
def test_step_and_frequency(freq, words, key):
    dates = pd.date_range("2019-01-01", periods=60, freq=freq)
    assert step_words(infer_step(dates)) == words and frequency(infer_step(dates)) == key


def test_irregular_rows_have_no_step():
    dates = pd.DatetimeIndex(["2020-01-01", "2020-01-02", "2020-01-07", "2020-02-01"])
    assert step_words(infer_step(dates)) == "irregular" and frequency(None) == "h"


def test_description_says_names_ranges_step_and_length():
    text = make_description(
        pd.date_range("2020-01-01", periods=90, freq="D"), ["sales", "price"], np.array([0, 1.5]), np.array([20, 3])
    )
    assert "2 series, measured every day, 90 rows from 2020-01-01" in text
    assert "sales from 0 to 20, price from 1.5 to 3." in text
    many = make_description(pd.date_range("2020", periods=9, freq="h"), [f"c{i}" for i in range(30)], *np.zeros((2, 30)))
    assert "c7 from 0 to 0 and 22 more." in many and "c8" not in many


def test_whose_description_a_run_takes():
    args = Namespace(data="custom", data_path="mine.csv", prompt_domain=0)
    assert dataset_description(args) == DEFAULT_DESCRIPTION and bank_file(args) is None
    args.data = "ETTm2"
    assert bank_file(args) == PROMPT_BANK / "ETT.txt" and dataset_description(args) == DEFAULT_DESCRIPTION
    args.prompt_domain = 1
    assert dataset_description(args).startswith("The Electricity Transformer Temperature")
    assert "\n" not in dataset_description(args)
    args.data, args.data_path, args.prompt_domain = "custom", "folder/ETT.csv", 0
    assert dataset_description(args).startswith("The Electricity")  # a custom file's own text needs no asking for
    args.prompt_text = "in  my\nwords"
    assert dataset_description(args) == "in my words"


def test_a_description_that_is_not_in_the_bank():
    args = Namespace(data="custom", data_path="mine.csv", prompt_domain=1, prompt_text=None)
    with pytest.raises(InputError, match="--prompt_domain: got 1, expected a file mine.txt in .*prompt_bank; write it or"):
        dataset_description(args)
    args.checkpoint = "runs/other"  # then the flag was inherited, and told of the training's data
    assert dataset_description(args) == DEFAULT_DESCRIPTION


def write(path, text):
    path.write_text(text)
    return path


def test_empty_cells_are_named_and_filled(tmp_path):
    file = write(tmp_path / "a.csv", "date,x,y\n2020-01-01,1,5\n2020-01-02,,5\n2020-01-03,3,\n")
    with pytest.raises(InputError, match="row 3, column 'x': got an empty cell.*; --fill_missing linear or ffill"):
        read_table(file)
    table = read_table(file, "linear")
    assert table.filled == 2 and table.values.tolist() == [[1, 5], [2, 5], [3, 5]]
    assert read_table(file, "ffill").values.tolist() == [[1, 5], [1, 5], [3, 5]]


def test_what_filling_cannot_mend_stays_an_error(tmp_path):
    with pytest.raises(InputError, match="row 2.*ffill has no value"):
        read_table(write(tmp_path / "a.csv", "date,x\n2020-01-01,\n2020-01-02,2\n"), "ffill")
    with pytest.raises(InputError, match="got 'bad' .*, expected a number$") as error:
        read_table(write(tmp_path / "b.csv", "date,x\n2020-01-01,1\n2020-01-02,bad\n2020-01-03,\n"), "linear")
    assert "fill_missing" not in str(error.value)
    with pytest.raises(InputError, match="got an empty cell"):
        read_table(write(tmp_path / "c.csv", "date,x,y\n2020-01-01,1,\n2020-01-02,1,\n"), "linear")


@pytest.mark.parametrize(("columns", "target"), [(["OT", "b"], "OT"), (["a", "b"], "b")])
def test_target_is_ot_or_the_last(tmp_path, columns, target):
    frame = pd.DataFrame(np.random.default_rng(0).standard_normal((100, 2)), columns=columns)
    frame.insert(0, "date", pd.date_range("2020-01-01", periods=100, freq="D"))
    frame.to_csv(tmp_path / "own.csv", index=False)
    lengths = {"seq_len": 10, "label_len": 0, "pred_len": 4}
    series = load_series("custom", tmp_path, "own.csv", features="S", target=None, freq=None, **lengths)
    assert series.target == target and series.columns == [target]


@pytest.mark.parametrize(("freq", "rows"), [("h", 300), ("15min", 300), ("D", 200), ("W", 160), ("MS", 120)])
def test_short_files_say_the_longest_lengths(tmp_path, freq, rows):
    frame = pd.DataFrame({"date": pd.date_range("2000-01-01", periods=rows, freq=freq), "x": np.arange(rows) % 7.0})
    frame.to_csv(tmp_path / "own.csv", index=False)
    with pytest.raises(InputError, match="the longest that fit: ") as error:
        load_series("custom", tmp_path, "own.csv", target=None, freq=None, seq_len=512, pred_len=96)
    words = str(error.value).split("the longest that fit: ")[1].replace(" with", "").split(" or ")[0].split()
    lengths = {name.removeprefix("--"): int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    assert len(load_series("custom", tmp_path, "own.csv", target=None, freq=None, label_len=0, **lengths).windows("val"))


def test_weather_is_read_whole():
    series = load_series("custom", real_data("weather").parent, "weather.csv", target=None, freq=None)
    assert len(series.columns) == 21 and series.target == "OT" and series.step_words == "10 minutes"
