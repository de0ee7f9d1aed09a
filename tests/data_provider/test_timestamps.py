"""Timestamps: written forms, the step of the rows, how they go on, and time marks."""

import pandas as pd
import pytest

from data_provider.timestamps import (
    frequency,
    frequency_key,
    future_dates,
    gaps_in,
    infer_step,
    read_timestamps,
    step_words,
    time_marks,
)
from layers.errors import InputError

FORMS = {
    "iso": (["2020-01-01T00:00:00", "2020-01-13T06:00:00"], "2020-01-13 06:00"),
    "date and time mixed": (["2020-01-01", "2020-01-13 06:00:00"], "2020-01-13 06:00"),
    "spreadsheet": (["2020/1/1 0:00", "2020/1/13 6:00"], "2020-01-13 06:00"),
    "compact": (["20200101", "20200113"], "2020-01-13"),
    "month": (["2020-01", "2020-02"], "2020-02-01"),
    "month first": (["01/01/2020", "01/13/2020"], "2020-01-13"),
    "day first": (["01/01/2020", "13/01/2020"], "2020-01-13"),
    "day first, told by an end of month": (["31/01/2020 23:00", "01/02/2020 00:00"], "2020-02-01"),
    "day first, told by order": (["10/11/2019", "11/11/2019", "12/11/2019", "01/12/2019"], "2019-12-01"),
    "german": (["01.01.2020 00:00", "13.01.2020 06:00"], "2020-01-13 06:00"),
    "chinese": (["2020年01月01日", "2020年01月13日"], "2020-01-13"),
    "afternoon": (["01/13/2020 11:00 AM", "01/13/2020 3:00 PM"], "2020-01-13 15:00"),
    "change of clocks": (["2020-10-25 02:00:00+02:00", "2020-10-25 02:00:00+01:00"], "2020-10-25 01:00Z"),
}
# Of pandas' name of a range: the step in words, its --freq.
STEPS = {
    "h": ("1 hour", "h"), "15min": ("15 minutes", "t"), "10min": ("10 minutes", "t"), "30s": ("30 seconds", "s"),
    "500ms": ("0.5 seconds", "s"), "6h": ("6 hours", "h"), "D": ("1 day", "d"), "B": ("1 business day", "b"),
    "7D": ("1 week", "w"), "W-WED": ("1 week", "w"), "4W": ("4 weeks", "w"), "MS": ("1 month", "m"), "ME": ("1 month", "m"),
    "BME": ("1 month", "m"), "BMS": ("1 month", "m"), "QE": ("3 months", "m"), "QS": ("3 months", "m"),
    "YS": ("1 year", "m"),
}  # fmt: skip


@pytest.mark.parametrize(("cells", "last"), FORMS.values(), ids=FORMS)
def test_written_forms(cells, last) -> None:
    assert read_timestamps(pd.Series(cells, dtype=str), "f", 2)[0][-1] == pd.Timestamp(last)


@pytest.mark.parametrize("freq", STEPS)
def test_the_step_is_named_and_continues_the_range(freq) -> None:
    whole = pd.date_range("2019-11-01", periods=70, freq=freq)
    rows = whole[:60].delete([7, 8, 31])  # a few gaps
    step = infer_step(rows)
    assert list(future_dates(rows, 10, step)) == list(whole[60:])
    assert (step_words(step), frequency(step)) == STEPS[freq]
    gaps = [] if freq == "B" else [(whole[6], whole[9]), (whole[30], whole[32])]  # those of business days are holidays
    assert gaps_in(rows, step) == gaps and gaps_in(whole, step) == []


@pytest.mark.parametrize(
    ("rows", "following"),
    [
        (["2019-12-31", "2020-01-31"], ["2020-02-29"]),
        (["2018-12-30", "2019-01-30", "2019-02-28"], ["2019-03-30", "2019-04-30"]),
        (["2020-02-27", "2020-02-28"], ["2020-02-29", "2020-03-01"]),
        (["2020-01-09", "2020-01-10", "2020-01-13", "2020-01-14", "2020-01-15", "2020-01-16", "2020-01-17"], ["2020-01-20"]),
        ([f"2020-01-{day:02}" for day in (6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 18)], ["2020-01-19"]),
        (["2020-01-01", "2020-01-02"], []),
    ],
    ids=["end of a leap February", "the 30th, clipped", "days", "over a weekend", "open on Saturdays", "no rows asked for"],
)
def test_what_follows(rows, following) -> None:
    dates = pd.DatetimeIndex(rows)
    assert [str(date.date()) for date in future_dates(dates, len(following), infer_step(dates))] == following


def test_no_common_step() -> None:
    rows = pd.DatetimeIndex(["2020-01-01", "2020-01-02", "2020-01-09", "2020-02-20", "2021-01-01"])
    assert infer_step(rows) is None and infer_step(rows[:1]) is None
    assert (step_words(None), frequency(None), gaps_in(rows, None)) == ("irregular", "h", [])
    with pytest.raises(InputError, match="column 'date': got timestamps with no common step .2020-01-09 .*, expected"):
        future_dates(rows, 1, None)


def test_marks_by_hand() -> None:
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
def test_frequency_names(freq, key) -> None:
    assert frequency_key(freq) == key
