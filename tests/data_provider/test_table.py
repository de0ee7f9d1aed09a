"""Reading a CSV: what it accepts, and the line it says where it cannot."""

import numpy as np
import pandas as pd
import pytest

from data_provider.table import read_table
from layers.errors import InputError
from tests.realdata import real_data

GOOD = "date,b,a\n2020-01-01 00:00:00,1,2.5\n2020-01-01 01:00:00,-3,1e40\n2020-01-01 02:00:00,5,6\n"


def read(tmp_path, content: str | bytes):
    path = tmp_path / "data.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path)


@pytest.mark.parametrize(
    "content",
    [
        GOOD.encode(),
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() + b"\r\n\r\n",
        GOOD.encode() + b",,\n",
        GOOD.rstrip("\n").encode(),
    ],
    ids=["plain", "bom", "crlf", "bom, crlf and blank end", "empty cells at the end", "no last line end"],
)
def test_reads(tmp_path, content):
    table = read(tmp_path, content)
    assert table.columns == ["b", "a"]
    assert table.values.dtype == np.float64
    np.testing.assert_array_equal(table.values, [[1, 2.5], [-3, 1e40], [5, 6]])
    assert list(table.dates) == list(pd.date_range("2020-01-01", periods=3, freq="h"))


def test_date_column_anywhere(tmp_path):
    assert read(tmp_path, "x,date,y\n1,2020-01-01,2\n3,2020-01-02,4\n").columns == ["x", "y"]


def test_bytes_that_are_not_utf8(tmp_path):
    table = read(tmp_path, GOOD.encode().replace(b"b,a", b"T (\xb0C),W/m\xb2"))
    assert table.columns == ["T (°C)", "W/m²"]


def test_weather_as_distributed():
    table = read_table(real_data("weather"))
    assert table.values.shape == (52696, 21)
    assert table.columns[0] == "p (mbar)" and table.columns[-1] == "OT"
    assert sum("\ufffd" in name for name in table.columns) == 3  # already damaged in the file


HEAD = "date,x,y\n2020-01-01,1,2\n"
BAD = {
    "text": (HEAD + "2020-01-02,1,oops\n2020-01-03,1,2\n", "row 3, column 'y': got 'oops'"),
    "empty cell": (HEAD + "2020-01-02,1,2\n2020-01-03,,2\n", "row 4, column 'x': got an empty cell"),
    "NaN": (HEAD + "2020-01-02,NaN,2\n", "row 3, column 'x': got an empty cell (or NaN)"),
    "infinite": (HEAD + "2020-01-02,1,inf\n", "row 3, column 'y': got 'inf'"),
    "too large": (HEAD + "2020-01-02,1,1e400\n", "row 3, column 'y': got 'inf'"),
    "truth values": ("date,x\n2020-01-01,True\n2020-01-02,False\n", "row 2, column 'x': got 'True'"),
    "blank line inside": (HEAD + "\n2020-01-02,1,2\n", "row 3, column 'x': got an empty cell"),
    "timestamp": (HEAD + "2020-01-02,1,2\nyesterday,1,2\n", "row 4, column 'date': got 'yesterday'"),
    "word pandas knows": (HEAD + "now,1,2\n", "row 3, column 'date': got 'now'"),
    "no such day": (HEAD + "2020-02-30,1,2\n", "row 3, column 'date': got '2020-02-30'"),
    "timestamp missing": (HEAD + ",1,2\n", "row 3, column 'date': got an empty cell"),
    "backwards": (
        HEAD + "2020-01-03,1,2\n2020-01-02,1,2\n",
        "got '2020-01-02', which is earlier than the row above ('2020-01-03'), expected timestamps that increase",
    ),
    "repeated": (HEAD + "2020-01-01,1,3\n", "row 3, column 'date': got '2020-01-01', which repeats"),
    "no date": (
        "time,x\n2020-01-01,1\n",
        "got the columns ['time', 'x'], expected a comma-separated file with a column 'date'",
    ),
    "only dates": ("date\n2020-01-01\n", "got no column beside 'date', expected"),
    "empty": ("", "got an empty file, expected"),
    "blank": ("\r\n \n", "got an empty file, expected"),
    "header only": ("date,x\n", "got only a header and no rows, expected"),
    "nameless column": ("date,x,\n2020-01-01,1,2\n", "row 1, column 3: got no name, expected one for each column"),
    "cell too many": (HEAD + "2020-01-02,1,2,3\n", "line 3"),
    "cell too many in each": (
        "date,x\n2020-01-01,1,2\n2020-01-02,1,2\n",
        "row 2: got more cells than the header, expected 2 cells in every row",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_file(tmp_path, content, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)
    assert message in str(caught.value)
    assert str(tmp_path / "data.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="got no such file, expected a CSV file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(InputError, match="got an unreadable file .*, expected a CSV file"):
        read_table(tmp_path)


def test_gap_and_whole_row_twice_are_fine(tmp_path):
    table = read(tmp_path, HEAD + "2020-01-01,1,2\n2020-03-01,1,2\n")
    assert len(table.dates) == 3
