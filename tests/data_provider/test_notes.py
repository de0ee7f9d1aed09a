"""Which notes a forecast may know, worked by hand; and what is refused as a file of notes."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_provider.notes import Notes, notes_from_args, row_step, wall_clock
from data_provider.table import FRAME
from layers.errors import InputError

HOUR = 3_600_000_000_000
HOURS = pd.date_range("2024-03-01", periods=10 * 24, freq="h")
FLAGS = {"text_path": None, "text_column": None, "holidays": None, "root_path": ".", "encoding": None, "dayfirst": None,
         "date_column": None}  # fmt: skip


def of_frame(**columns: list) -> Notes:
    found = notes_from_args(Namespace(**FLAGS), FRAME, HOURS, pd.DataFrame(columns))
    assert found is not None
    return found


def about(notes: Notes, now: str, rows: int = 6) -> list[tuple[str, int, int, int]]:
    """The notes that the `rows` hours after `now` may know: text, first row, last row, the row with which each begins."""
    last, *ahead = wall_clock(pd.date_range(now, periods=rows + 1, freq="h"))
    return [(notes.texts[text], *rest) for text, *rest in notes.about(last, np.array(ahead), HOUR).tolist()]


def test_a_note_is_there_from_when_it_is_known_and_holds_from_date_to_until() -> None:
    notes = of_frame(
        date=["2024-03-02 03:00", "2024-03-02 01:00", "2024-03-02"],
        until=["2024-03-02 04:00", "2024-03-02 02:00", "2024-03-02"],
        known=["2024-03-01 22:00", "2024-03-02 01:00", "2024-03-01 12:00"],
        text=["planned", "sudden", "all day"],
    )
    # rows 0 to 5 are 00:00 to 05:00; the sudden one begins in row 1 and nobody knows of it before
    assert about(notes, "2024-03-01 23:00") == [("all day", 0, 5, 0), ("planned", 3, 4, 3)]
    assert about(notes, "2024-03-01 21:00") == [("all day", 2, 5, 2)]  # planned is known an hour later
    assert about(notes, "2024-03-02 01:00", 2) == [("all day", 0, 1, -2), ("sudden", 0, 0, -1), ("planned", 1, 1, 1)]
    assert about(notes, "2024-03-02 21:00", 4) == [("all day", 0, 1, -22)]  # to the end of its day
    assert about(notes, "2024-03-03 00:00") == []


def test_without_an_end_a_note_holds_until_the_next_one_that_is_known() -> None:
    notes = of_frame(
        date=["2024-03-02 00:00", "2024-03-02 03:00", "2024-03-02 02:00"],
        known=["2024-03-02 00:00", "2024-03-01 12:00", "2024-03-02 02:00"],
        text=["first", "third", "second"],
    )
    assert about(notes, "2024-03-01 23:00") == [("third", 3, 5, 3)]
    assert about(notes, "2024-03-02 00:00") == [("first", 0, 1, -1), ("third", 2, 5, 2)]
    assert about(notes, "2024-03-02 01:00", 3) == [("first", 0, 0, -2), ("third", 1, 2, 1)]
    assert about(notes, "2024-03-02 02:00", 2) == [("third", 0, 1, 0)]
    assert notes.latest(pd.Timestamp("2024-03-01 23:00"), 5)[0][2] == "third"


def test_the_dates_of_a_file_have_one_order(tmp_path: Path) -> None:
    """The 20th says that days come first, of `known`, too; and a remark of the data is read as its row is."""
    (tmp_path / "notes.csv").write_text("date,until,known,text\n20/06/2024,25/06/2024 12:00,05/06/2024,a\n")
    dates = pd.date_range("2024-06-01", periods=48, freq="h")
    notes = notes_from_args(Namespace(**FLAGS | {"text_path": str(tmp_path / "notes.csv")}), FRAME, dates)
    times = [[pd.Timestamp("2024-06-20")], [pd.Timestamp("2024-06-25 12:00")], [pd.Timestamp("2024-06-05")]]
    assert notes is not None and notes.read_as == ""
    for found, expected in zip((notes.start, notes.until, notes.known), times, strict=True):
        np.testing.assert_array_equal(found, wall_clock(expected))
    (tmp_path / "notes.csv").write_text("date,text\n03/02/2024,a\n03/03/2024,b\n")
    notes = notes_from_args(Namespace(**FLAGS | {"text_path": str(tmp_path / "notes.csv")}), FRAME, dates)
    assert notes is not None and "both orders of the dates fit" in notes.read_as
    days = pd.date_range("2020-04-01", periods=200, freq="D")
    words = pd.Series("", days)
    words["2020-05-02"], words["2020-09-03"] = "on", "off"
    pd.DataFrame({"": days.strftime("%d/%m/%Y"), "load": 1, "words": words.to_numpy()}).to_csv(
        tmp_path / "d.csv", index=False
    )
    notes = notes_from_args(Namespace(**FLAGS | {"text_column": "words"}), tmp_path / "d.csv", days)
    assert notes is not None and notes.texts == ["on", "off"]
    np.testing.assert_array_equal(notes.known, wall_clock(pd.DatetimeIndex(["2020-05-02", "2020-09-03"])))


def test_notes_stand_on_the_clock_of_the_data() -> None:
    data = pd.date_range("2024-01-10 16:00", periods=4, freq="h", tz="UTC")
    notes = notes_from_args(
        Namespace(**FLAGS), FRAME, data, pd.DataFrame({"date": ["2024-01-10T12:00:00-05:00"], "text": ["a"]})
    )
    assert notes is not None and notes.known[0] == wall_clock([pd.Timestamp("2024-01-10 17:00")])[0]


def test_a_note_without_neighbours_that_make_sense() -> None:
    notes = of_frame(
        date=["2024-03-02 06:00", "2024-03-03 00:00"], until=["2024-03-02", "9999-12-31"], text=["today", "for ever"]
    )
    assert about(notes, "2024-03-02 21:00", 4) == [("today", 0, 1, -16)]  # a day counts whole
    assert about(notes, "2024-03-09 21:00", 2) == [("for ever", 0, 1, -166)]
    assert about(of_frame(date=[], text=[]), "2024-03-02 21:00") == []
    assert about(of_frame(date=["2024-03-02"], text=[None]), "2024-03-02 21:00") == []
    # rows that come twice, a weekend, and a last part of one row: a step is what rows usually are apart
    clock = wall_clock(pd.DatetimeIndex([*pd.bdate_range("2024-03-01", periods=9), "2024-03-13"]))
    assert row_step(clock) == 24 * HOUR


def test_shuffled_notes_are_the_same_texts_at_the_same_dates() -> None:
    notes = of_frame(date=[f"2024-03-0{day}" for day in range(1, 9)], text=[*"abcdabcd"])
    other = notes.shuffled(1)
    assert sorted(other.text) == sorted(notes.text) and (other.text != notes.text).any()
    assert all((getattr(other, name) == getattr(notes, name)).all() for name in ("start", "until", "known"))
    assert other.digest() != notes.digest() == notes.shuffled(1).__class__(**vars(notes)).digest()


def test_a_file_a_column_and_holidays_make_notes(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("Date|load|words\n2024-12-24|1|on\n2024-12-25|2|\n2024-12-26|3|off\n", encoding="utf-8")
    (tmp_path / "notes.csv").write_bytes("date;text\n2024-12-25;Größer, schöner\n".encode("latin-1"))
    given = {"text_path": "notes.csv", "text_column": "words", "root_path": str(tmp_path)}
    notes = notes_from_args(Namespace(**FLAGS | given), data, pd.DatetimeIndex(["2024-12-24", "2024-12-26"]))
    assert notes is not None and set(notes.texts) == {"on", "off", "Größer, schöner"}
    pytest.importorskip("holidays")
    dates = pd.DatetimeIndex(["2024-12-24", "2024-12-26"])
    feasts = notes_from_args(Namespace(**FLAGS | {"holidays": "DE-BY"}), data, dates)
    assert feasts is not None
    eve = wall_clock([pd.Timestamp("2024-12-24")])[0]
    (found,) = [feasts.texts[n[0]] for n in feasts.about(eve, wall_clock(pd.DatetimeIndex(["2024-12-25"])), 24 * HOUR)]
    assert "Weihnacht" in found or "Christmas" in found
    with pytest.raises(InputError, match="--holidays: got 'XX', expected a country"):
        notes_from_args(Namespace(**FLAGS | {"holidays": "XX"}), data, dates)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("date,text\n2024-03-01,a\nsoon,b\n", r"notes.csv: row 3, column 'date': got 'soon', expected a timestamp"),
        (
            "date,text\n2024-03-01,a\n2024-03-02,\n",
            "notes.csv: row 3, column 'text': got 0 characters, expected 1 to 10,000",
        ),
        (
            "date,text\n2024-03-01," + "a" * 10_001 + "\n",
            "row 2, column 'text': got 10,001 characters, expected 1 to 10,000",
        ),
        (
            "date,text,until\n2024-03-02,a,2024-03-01\n",
            "row 2, column 'until': got '2024-03-01', expected nothing, or",
        ),
        ("day,text\n2024-03-02,a\n", r"notes.csv: got the columns \['day', 'text'\], expected date, text"),
        ("date,text\n2024-03-01,a, b and c\n2024-03-02,a\n", "more cells than the header|no regular table"),
        ("", "notes.csv: got an empty file"),
    ],
)
def test_bad_notes_are_one_line_with_file_and_row(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "notes.csv").write_text(text)
    with pytest.raises(InputError, match=said) as error:
        notes_from_args(Namespace(**FLAGS | {"text_path": str(tmp_path / "notes.csv")}), FRAME, HOURS)
    assert "\n" not in str(error.value)


def test_notes_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--text_path: got no file none.csv, expected one of none.csv, "):
        notes_from_args(Namespace(**FLAGS | {"text_path": "none.csv", "root_path": str(tmp_path)}), FRAME, HOURS)


def test_the_clock_is_that_of_the_wall() -> None:
    aware = pd.date_range("2024-03-01", periods=3, freq="h", tz="Europe/Berlin")
    np.testing.assert_array_equal(wall_clock(aware), wall_clock(aware.tz_localize(None)))
