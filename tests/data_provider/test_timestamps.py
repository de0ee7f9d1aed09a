"""Timestamps: written forms, the step of the rows, and how they go on."""

import pandas as pd
import pytest

from data_provider.timestamps import frequency_key, future_dates, gaps_in, infer_step, read_timestamps, time_marks
from layers.errors import InputError

FORMS = {
    "iso": (["2020-01-01T00:00:00", "2020-01-13T06:00:00"], "2020-01-13 06:00"),
    "date and time mixed": (["2020-01-01", "2020-01-13 06:00:00"], "2020-01-13 06:00"),
    "spreadsheet": (["2020/1/1 0:00", "2020/1/13 6:00"], "2020-01-13 06:00"),
    "compact": (["20200101", "20200113"], "2020-01-13"),
    "month": (["2020-01", "2020-02"], "2020-02-01"),
    "month first": (["01/01/2020", "01/13/2020"], "2020-01-13"),
    "day first": (["01/01/2020", "13/01/2020"], "2020-01-13"),
    "day first, told by order": (["31/01/2020 23:00", "01/02/2020 00:00"], "2020-02-01"),
    "german": (["01.01.2020 00:00", "13.01.2020 06:00"], "2020-01-13 06:00"),
    "chinese": (["2020年01月01日", "2020年01月13日"], "2020-01-13"),
}


@pytest.mark.parametrize(("cells", "last"), FORMS.values(), ids=FORMS)
def test_written_forms(cells, last):
    assert read_timestamps(pd.Series(cells, dtype=str), "f", 2)[-1] == pd.Timestamp(last)


def test_offsets_that_change_become_utc():
    dates = read_timestamps(pd.Series(["2020-10-25 02:00:00+02:00", "2020-10-25 02:00:00+01:00"], dtype=str), "f", 2)
    assert dates[1] - dates[0] == pd.Timedelta(hours=1)


@pytest.mark.parametrize(
    "freq",
    ["h", "15min", "10min", "30s", "D", "B", "7D", "W-WED", "MS", "ME", "BME", "BMS", "QE", "YS", "2h", "4W"],
)
def test_step_continues_the_range(freq):
    whole = pd.date_range("2019-11-01", periods=70, freq=freq)
    rows = whole[:60].delete([7, 8, 31])  # a few gaps
    assert list(future_dates(rows, 10, infer_step(rows))) == list(whole[60:])


def test_month_end_leap_day_and_clipped_day():
    assert str(future_dates(pd.DatetimeIndex(["2019-12-31", "2020-01-31"]), 1, infer_step(pd.DatetimeIndex(["2019-12-31", "2020-01-31"])))[0].date()) == "2020-02-29"
    rows = pd.DatetimeIndex(["2018-12-30", "2019-01-30", "2019-02-28"])
    assert [str(date.date()) for date in future_dates(rows, 2, infer_step(rows))] == ["2019-03-30", "2019-04-30"]
    assert str(future_dates(pd.date_range("2020-02-20", "2020-02-28"), 1, infer_step(pd.date_range("2020-02-20", "2020-02-28")))[0].date()) == "2020-02-29"


def test_business_days_go_over_the_weekend():
    friday = pd.bdate_range("2020-01-06", "2020-01-17")
    assert [str(date.date()) for date in future_dates(friday, 2, infer_step(friday))] == ["2020-01-20", "2020-01-21"]


def test_no_common_step():
    rows = pd.DatetimeIndex(["2020-01-01", "2020-01-02", "2020-01-09", "2020-02-20", "2021-01-01"])
    assert infer_step(rows) is None and infer_step(rows[:1]) is None
    with pytest.raises(InputError, match="column 'date': got timestamps with no common step, expected"):
        future_dates(rows, 1, infer_step(rows))


def test_no_future_rows():
    assert len(future_dates(pd.date_range("2020", periods=5, freq="h"), 0, infer_step(pd.date_range("2020", periods=5, freq="h")))) == 0


def test_marks_by_hand():
    dates = pd.DatetimeIndex(["2020-01-01 00:00", "2020-12-31 23:30"])  # a Wednesday; a Thursday, day 366
    scaled = time_marks(dates, "h", "timeF")
    assert scaled.dtype == "float32"
    assert scaled.tolist()[0] == pytest.approx([-0.5, 2 / 6 - 0.5, -0.5, -0.5])
    assert scaled.tolist()[1] == pytest.approx([0.5, 0.0, 0.5, 0.5])
    assert time_marks(dates, "h", "fixed").tolist() == [[1, 1, 2, 0], [12, 31, 3, 23]]
    assert time_marks(dates, "15min", "fixed")[1].tolist() == [12, 31, 3, 23, 30]


@pytest.mark.parametrize(
    ("freq", "key"),
    [("h", "h"), ("H", "h"), ("15min", "t"), ("t", "t"), ("W-SUN", "w"), ("ME", "m"), ("b", "b"),
     ("BMS", "m"), ("BME", "m"), ("SMS", "m"), ("MS", "m"), ("me", "m"), ("M", "m"), ("m", "m"), ("WOM-1MON", "m"),
     ("C", "b"), ("us", "s"), ("ns", "s"), ("ms", "s"), ("L", "s"), ("s", "s"), ("90s", "s"), ("1h30min", "t"),
     ("min", "t"), ("bh", "h"), ("36h", "h"), ("D", "d"), ("2D", "d"), ("w", "w"), ("QS-OCT", "q"), ("qs", "q"),
     ("QE", "q"), ("YE-MAR", "a"), ("YS", "a"), ("ye", "a"), ("A", "a"), ("y", "a")],
)  # fmt: skip
def test_frequency_names(freq, key):
    assert frequency_key(freq) == key


def test_unknown_frequency():
    with pytest.raises(InputError, match="--freq: got 'fortnight', expected one of s, t"):
        frequency_key("fortnight")


def test_gaps_are_where_rows_are_missing() -> None:
    hours = pd.date_range("2024-01-01", periods=10, freq="h")
    assert gaps_in(hours, infer_step(hours)) == []
    cut = hours.delete([3, 4, 8])
    assert gaps_in(cut, infer_step(hours)) == [(hours[2], hours[5]), (hours[7], hours[9])]
    months = pd.date_range("2023-11-30", periods=6, freq="ME")
    assert gaps_in(months, infer_step(months)) == []
    assert gaps_in(months.delete(3), infer_step(months)) == [(months[2], months[4])]
    days = pd.bdate_range("2024-01-01", periods=30)
    assert gaps_in(days.delete(7), infer_step(days)) == [] == gaps_in(hours[:1], infer_step(hours[:1]))
