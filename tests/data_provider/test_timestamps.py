"""Timestamps: written forms, the step of the rows, how they go on, and time marks."""

import numpy as np
import pandas as pd
import pytest

from data_provider.timestamps import (
    frequency,
    frequency_key,
    future_dates,
    gaps_in,
    infer_step,
    open_times,
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
    "two-digit years": (["31/12/19", "01/01/20"], "2020-01-01"),
    "two-digit years first": (["19/12/31", "20/01/01"], "2020-01-01"),
    "two-digit years, month named": (["13-Jan-20", "14-Jan-20"], "2020-01-14"),
    "UTC": (["2020-01-01 05:00:00 UTC", "2020-01-01 06:00:00 UTC"], "2020-01-01 06:00Z"),
    "UTC, day first": (["31/12/2019 23:00 UTC", "01/01/2020 00:00 UTC"], "2020-01-01 00:00Z"),
    "offset": (["01/13/2020 05:00-05:00", "01/13/2020 06:00-05:00"], "2020-01-13 11:00Z"),
    "afternoon, year first": (["2020-01-13 11:00 AM", "2020-01-13 3:00 PM"], "2020-01-13 15:00"),
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


ORDERS = {  # what pandas makes of a range, and the form in which it is written
    "months, day first": ("MS", 168, "%d/%m/%Y"),
    "months, dashes of the US": ("MS", 168, "%m-%d-%Y"),
    "months, two-digit years": ("MS", 40, "%d/%m/%y"),
    "quarters": ("QS", 40, "%d-%m-%y"),
    "the 5th of each month": (pd.DateOffset(months=1), 40, "%d/%m/%Y"),
    "hours of twelve days": ("h", 288, "%d/%m/%Y %H:%M"),
    "hours of the US": ("h", 288, "%m/%d/%Y %I:%M %p"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_is_the_one_with_even_steps(name) -> None:
    freq, rows, form = ORDERS[name]
    dates = pd.date_range("2008-01-05" if "5th" in name else "2008-01-01", periods=rows, freq=freq)
    dates = dates.delete([rows - 9, rows - 8])  # months are missing here and there
    day, month = ("day", "month") if form.startswith("%d") else ("month", "day")
    # One after the other, two series of a frame.
    for several in (1, 2):
        found, note = read_timestamps(pd.Series(list(dates.strftime(form)) * several), "f", 2)
        assert list(found) == list(dates) * several
        assert note.startswith(f"f: dates are read {day} first (") and f"reads them {month} first" in note


def test_the_flag_decides_between_orders_that_are_both_even() -> None:
    cells = pd.Series([f"{day:02}/03/2020" for day in range(1, 13)])  # days of March, or the third of each month
    days, months = (
        pd.date_range("2020-03-01", periods=12),
        pd.date_range("2020-01-03", periods=12, freq=pd.DateOffset(months=1)),
    )
    found, note = read_timestamps(cells, "f", 2)
    assert list(found) == list(months) and note.startswith(
        "f: WARNING: both orders of the dates fit; they are read month fi"
    )
    for dayfirst, dates in ((True, days), (False, months)):
        found, note = read_timestamps(cells, "f", 2, dayfirst)
        assert list(found) == list(dates) and note.startswith("f: dates are read")
    for text in (["01/13/2020", "01/14/2020"], ["2020-01-02", "2020-01-03"], ["01/01/2019", "01/01/2020"]):
        for dayfirst in (None, True, False):  # which decides nothing
            found, note = read_timestamps(pd.Series(text), "f", 2, dayfirst)
            assert list(found) == list(map(pd.Timestamp, text)) and note == ""


@pytest.mark.parametrize(("rate", "unit"), [(30, "ms"), (60, "ms"), (44100, "us")])
def test_timestamps_that_are_rounded_share_a_step(rate, unit) -> None:
    grid = np.arange(400) / rate
    whole = pd.DatetimeIndex(pd.Timestamp("2020-01-01") + pd.to_timedelta(grid, unit="s")).round(unit)
    rows = whole[:390].delete([50, 51, 120])
    step = infer_step(rows)
    assert step_words(step) == step_words(infer_step(rows[-60:]))  # as the rows of a forecast, too
    assert gaps_in(rows, step) == [(whole[49], whole[52]), (whole[119], whole[121])]
    assert gaps_in(rows, step, 260) == [] and frequency(step) == "s"
    late = future_dates(rows, 10, step) - whole[390:]
    assert np.abs(late.total_seconds()).max() < 0.2 / rate


@pytest.mark.parametrize(("freq", "jitter"), [("33333us", 3e-3), ("1s", 0.02), ("10min", 3), ("D", 400)])
def test_timestamps_of_a_clock_that_jitters_share_a_step(freq, jitter) -> None:
    exact, noise = pd.date_range("2020-01-01 08:00", periods=400, freq=freq), np.random.default_rng(3).standard_normal(400)
    rows = (exact + pd.to_timedelta(jitter * noise.clip(-2, 2), unit="s")).round("ms")
    step = infer_step(rows)
    assert step_words(step) == step_words(infer_step(exact)) and gaps_in(rows, step) == []
    assert step_words(infer_step(rows[-96:])) == step_words(step)


HOURS = pd.date_range("2020-01-01", periods=24 * 87, freq="h")  # to a Friday
QUARTERS = pd.date_range("2020-01-01", periods=96 * 87, freq="15min")
CALENDARS = {
    "trading": HOURS[(HOURS.hour >= 9) & (HOURS.hour <= 16) & (HOURS.day_of_week < 5)],
    "quarters of an hour": QUARTERS[(QUARTERS.hour * 4 + QUARTERS.minute // 15 >= 38) & (QUARTERS.hour < 16)],
    "a break of an hour": HOURS[(HOURS.hour != 17) & (HOURS.day_of_week != 5)],
    "a short Saturday": HOURS[
        (HOURS.hour >= 8) & (HOURS.hour < 20 - 8 * (HOURS.day_of_week == 5)) & (HOURS.day_of_week < 6)
    ],
    "closed on Sundays": (days := pd.date_range("2020-01-01", periods=87))[days.day_of_week < 6],
}


@pytest.mark.parametrize(
    ("name", "zone"),
    [*((name, None) for name in CALENDARS), ("trading", "America/New_York"), ("a short Saturday", "America/New_York")],
)  # whose clocks change on the 8th of March
def test_rows_go_on_at_the_times_of_the_last_weeks(name, zone) -> None:
    whole = CALENDARS[name].tz_localize(zone)
    rows, step = whole[:-30], infer_step(whole)
    assert list(future_dates(rows, 30, step)) == list(whole[-30:])
    assert gaps_in(rows, step) == [] and f", at {len(open_times(rows, step))} times of the week" in step_words(step, rows)
    if name != "closed on Sundays":  # a holiday is no gap, a row that is missing in the day is one
        holiday = rows[rows.normalize() != rows[-100].normalize()]
        assert gaps_in(holiday, step) == []
        place = int(np.flatnonzero(np.diff(rows[:-5]) == pd.Timedelta(step))[-2])  # the times before and after are open
        assert gaps_in(rows.delete(place + 1), step) == [(rows[place], rows[place + 2])]


def test_no_calendar_where_rows_are_missing_at_random() -> None:
    """Neither where a time of the week lacks rows twice by chance, nor where all rows of some weeks are missing."""
    rng = np.random.default_rng(0)
    few = [HOURS[: 24 * 18].delete([30, 200]), *(QUARTERS[rng.random(len(QUARTERS)) > 0.05] for _ in range(10))]
    outages = [
        HOURS[(HOURS < start) | (HOURS > end)] for start, end in (("2020-03-05", "2020-03-17"), ("2020-03-03", "2020-03-25"))
    ]
    for rows in (HOURS[rng.random(len(HOURS)) > 0.3], *few, *outages, HOURS[:300:2]):
        step = infer_step(rows)
        assert open_times(rows, step) is None and list(future_dates(rows, 2, step)) == [rows[-1] + step, rows[-1] + 2 * step]


def test_days_go_by_the_clock_on_the_wall() -> None:
    """At 02:30 of the 29th of March there is no such time in Berlin, on the 25th of October it comes twice."""
    for start in ("2020-03-01 02:30", "2020-10-01 02:30", "2020-10-01"):
        wall = pd.date_range(start, periods=60)
        whole = wall.tz_localize("Europe/Berlin", nonexistent="shift_forward", ambiguous=np.zeros(60, dtype=bool))
        for rows in (20, 25, 26, 29, 40):
            step = infer_step(whole[:rows])
            assert step_words(step) == "1 day" and gaps_in(whole[:rows], step) == []
            assert list(future_dates(whole[:rows], 20, step)) == list(whole[rows : rows + 20])
    utc, _ = read_timestamps(pd.Series([str(date) for date in whole]), "f", 2)  # a file's offsets change, too
    assert step_words(infer_step(utc)) == "1 day" and gaps_in(utc, infer_step(utc)) == []


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
