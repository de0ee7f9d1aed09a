"""Reading a CSV file or a frame: what is accepted, and the one line that says where it is not."""

import gzip
import io

import numpy as np
import pandas as pd
import pytest

from data_provider.table import Table, read_table, tables_of
from layers.errors import InputError
from tests.realdata import real_data

GOOD = "date,b,a\n2020-01-01 00:00:00,1,2.5\n2020-01-01 01:00:00,-3,1e40\n2020-01-01 02:00:00,5,6\n"
HEAD = "date,x,y\n2020-01-01,1,2\n"
WRITTEN = {
    "plain": GOOD.encode(),
    "bom": b"\xef\xbb\xbf" + GOOD.encode(),
    "bom, crlf and blank end": b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() + b"\r\n\r\n",
    "empty cells at the end": GOOD.encode() + b",,\n",
    "no last line end": GOOD.rstrip("\n").encode(),
    "latin-1, date last": b"T (\xb0C),W/m\xb2,date\n"
    b"1,2.5,2020-01-01 00:00\n-3,1e40,2020-01-01 01:00\n5,6,2020-01-01 02:00\n",
}
OWN = "时间;温度 (°C);负荷\n2020-01-01;1,5;1.234,5\n2020-01-02;2;-0,25\n"
LONG = "id,date,v\n07,2020-01-01,1\n07,2020-01-02,2\n12,2020-01-01,3\n12,2020-01-02,4\n"
# Content, flags, columns, their values, and what is said of it.
FOUND = {
    "GBK, semicolons, decimal commas": (OWN.encode("gbk"), {"date_column": "时间"}, "温度 (°C),负荷", [[1.5, 1234.5],
        [2, -0.25]], "encoding gb18030, semicolon-separated, decimal commas, timestamps in column '时间'"),
    "GBK, one character a name": ("date,温,压,a\n2020-01-01,1,2,3\n".encode("gbk"), {}, "温,压,a", [[1, 2, 3]],
        "encoding gb18030"),
    "UTF-16": (GOOD.encode("utf-16"), {}, "b,a", [[1, 2.5], [-3, 1e40], [5, 6]], "encoding utf-16"),
    "Big5": ("date,溫度\n2020-01-01,1\n".encode("big5"), {"encoding": "big5"}, "溫度", [[1]], "encoding big5"),
    "Latin-1 that could be GBK": ("date,W/(m²·K),Größe\n2020-01-01,1,2\n".encode("latin-1"), {}, "W/(m²·K),Größe", [[1, 2]],
        "encoding latin-1"),
    "signs of Latin-1": ("date,±°,Größe\n2020-01-01,1,2\n".encode("latin-1"), {}, "±°,Größe", [[1, 2]], "encoding latin-1"),
    "decimals after whole numbers": ("date;x\n" + "".join(f"{y}-01-01;0\n" for y in range(1990, 2020)) + "2020-01-01;0,5\n",
        {}, "x", [*[[0]] * 30, [0.5]], "semicolon-separated, decimal commas"),
    "groups of thousands": ("date;x;y\n2020-01-01;1,5;1.234\n2020-01-02;2;1 234 567\n", {}, "x,y", [[1.5, 1234],
        [2, 1234567]], "semicolon-separated, decimal commas"),
    "commas in names": ("date;load, kW;a,b,c\n2020-01-01;1.5;1\n", {}, "load, kW;a,b,c", [[1.5, 1]], "semicolon-separated"),
    "small decimals": ("date;x\n2020-01-01;2,5e-06\n", {}, "x", [[2.5e-6]], "semicolon-separated, decimal commas"),
    "quoted decimals": ('date,x\n2020-01-01,"1,5"\n2020-01-02,"2,25"\n', {}, "x", [[1.5], [2.25]], "decimal commas"),
    "tabs": (GOOD.replace(",", "\t"), {}, "b,a", [[1, 2.5], [-3, 1e40], [5, 6]], "tab-separated"),
    "index": (",date,x\n0,2020-01-01,1\n1,2020-01-02,5\n\n", {}, "x", [[1], [5]], "without column 'Unnamed: 0'"),
    "index, saved twice": (",Unnamed: 0,date,x\n3,0,2020-01-01,1\n1,1,2020-01-02,5\n", {}, "x", [[1], [5]],
        "without column 'Unnamed: 0.1', without column 'Unnamed: 0'"),
    "index of dates": (",x\n2020-01-01,1\n2020-01-02,5\n", {}, "x", [[1], [5]], "timestamps in column 'Unnamed: 0'"),
    "separator at the end": ("date,x,\n2020-01-01,1,\n", {}, "x", [[1]], "without column 'Unnamed: 2'"),
    "Date": ("Date,x\n2020-01-01,1\n", {}, "x", [[1]], "timestamps in column 'Date'"),
    "left out": ("Zeit,date,x,note\n2020-01-01,a,1,b\n", {"date_column": "Zeit", "drop_columns": ["note", "nix"]},
        "x", [[1]], "timestamps in column 'Zeit', without column 'date', WARNING: no column 'nix' to leave out"),
    "long": (LONG, {"id_column": "id"}, "07,12", [[1, 3], [2, 4]], ""),
    "long, two values, mixed": ("date,id,v,w\n2020-01-02,n,1,2\n2020-01-01,s,3,4\n2020-01-01,n,5,6\n" +
        "2020-01-02,s,7,8\n" * 2,
        {"id_column": "id"}, "n v,s v,n w,s w", [[5, 3, 6, 4], [1, 7, 2, 8]], ""),
}  # fmt: skip
BAD_FORMAT = {
    "columns": ("time;x\n2020-01-01;1\n", {}, "got the columns ['time', 'x'], expected a semicolon-separated file with "
                "a column 'date'; --date_column names"),
    "encoding": (OWN.encode("gbk"), {"encoding": "utf-8"}, "got bytes that are not utf-8, expected text; --encoding names"),
    "decimal point": ("date;x;y\n2020-01-01;1,5;3\n2020-01-02;2;1.5\n", {}, "row 3, column 'y': got '1.5' (1 such cell in "
                      "this column), expected a number with a decimal comma"),
    "commas between thousands": ("date\tx\n2020-01-01\t1,234\n2020-01-02\t999\n", {}, "row 2, column 'x': got '1,234'"),
    "thousands or decimals": ('date,x\n2020-01-01,"1,234"\n', {}, "row 2, column 'x': got '1,234'"),
    "text": ("date,x,note\n2020-01-01,1,dry\n", {}, "row 2, column 'note': got 'dry' (1 such cell in this column), expected "
             "a number; --drop_columns 'note' leaves the column out"),
    "nameless": (",date,x\n1.5,2020-01-01,1\n", {}, "row 1, column 1: got no name, expected one for each column"),
    "long": (LONG, {}, "row 4, column 'date': got '2020-01-01', which is earlier than the row above ('2020-01-02'), "
             "expected timestamps that increase; sort the rows by date; where a column names the series of each row, "
             "give it as --id_column"),
    "id": (LONG, {"id_column": "station"}, "--id_column: got 'station', expected one of id, v, beside a column of numbers"),
    "two values of a date": (LONG + "07,2020-01-02,5\n", {"id_column": "id"}, "row 6, column 'id': got '07' at 2020-01-02"),
    "gap": (LONG + "07,2020-01-03,5\n", {"id_column": "id"}, "row 2020-01-03 00:00:00, column '12': got an empty cell"),
    "workbook": (b"PK\x03\x04", {}, "got an Excel workbook or a packed file, expected a CSV file"),
    "gzip": (gzip.compress(GOOD.encode()), {}, "got an Excel workbook or a packed file, expected a CSV file, or one"),
}  # fmt: skip
EMPTY = "; --fill_missing linear or ffill fills empty cells (in Python: fill_missing='linear')"
BAD = {
    "text": (HEAD + "2020-01-02,1,oops\n2020-01-03,1,2\n", "row 3, column 'y': got 'oops' (1 such cell"),
    "empty cell": (HEAD + "2020-01-02,1,2\n2020-01-03,,2\n2020-01-04,,2\n", "row 4, column 'x': got an empty cell (or NaN) "
                   "(2 such cells in this column), expected a number" + EMPTY),
    "NaN": (HEAD + "2020-01-02,NaN,2\n", "row 3, column 'x': got an empty cell (or NaN)"),
    "infinite": (HEAD + "2020-01-02,1,inf\n", "row 3, column 'y': got 'inf' (1 such cell in this column), expected a numbe"),
    "too large": (HEAD + "2020-01-02,1,1e300\n", "row 3, column 'y': got '1e+300' (1 such cell in this column), expected a "
                  "number of at most 1e+150"),
    "beyond float64": (HEAD + "2020-01-02,1,1e400\n", "row 3, column 'y': got 'inf'"),
    "truth values": ("date,x\n2020-01-01,True\n2020-01-02,False\n", "row 2, column 'x': got 'True'"),
    "blank line inside": (HEAD + "\n2020-01-02,1,2\n", "row 3, column 'date': got an empty cell"),
    "timestamp": (HEAD + "2020-01-02,1,2\nyesterday,1,2\n", "row 4, column 'date': got 'yesterday'"),
    "word pandas knows": (HEAD + "now,1,2\n", "row 3, column 'date': got 'now'"),
    "no such day": (HEAD + "2020-02-30,1,2\n", "row 3, column 'date': got '2020-02-30'"),
    "timestamp missing": (HEAD + ",1,2\n", "row 3, column 'date': got an empty cell"),
    "no timestamp at all": ("date,x\n,1\n,2\n", "row 2, column 'date': got an empty cell"),
    "backwards": (HEAD + "2020-01-03,1,2\n2020-01-02,1,2\n", "row 4, column 'date': got '2020-01-02', which is earlier than "
                  "the row above ('2020-01-03'), expected timestamps that increase"),
    "repeated": (HEAD + "2020-01-01,1,3\n", "row 3, column 'date': got '2020-01-01', which repeats, with other values"),
    "no date": ("time,x\n2020-01-01,1\n", "got the columns ['time', 'x'], expected a comma-separated file with a column 'd"),
    "only dates": ("date\n2020-01-01\n", "got no column beside 'date', expected"),
    "empty": ("", "got an empty file, expected"),
    "blank": ("\r\n \n", "got an empty file, expected"),
    "blank first line": ("\n" + HEAD, "row 1: got an empty line, expected the header"),
    "header only": ("date,x\n", "got only a header and no rows, expected"),
    "nameless column": ("date,x,\n2020-01-01,1,2\n", "row 1, column 3: got no name, expected one for each column"),
    "cell too many": (HEAD + "2020-01-02,1,2,3\n", "line 3"),
    "cell too many in each": ("date,x\n2020-01-01,1,2\n2020-01-02,1,2\n", "row 2: got more cells than the header, expected "
                              "2 cells in every row"),
}  # fmt: skip


def read(tmp_path, content: str | bytes, fill: str | None = None, name: str = "data.csv", **flags) -> Table:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    table = read_table(path, fill, **flags)
    return table.only(table.columns)


@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN)
def test_a_file_and_the_frame_that_pandas_makes_of_it_are_one_table(tmp_path, content: bytes) -> None:
    table = read(tmp_path, content)
    latin = b"\xb0" in content
    assert table.columns == (["T (°C)", "W/m²"] if latin else ["b", "a"])
    np.testing.assert_array_equal(table.values, [[1, 2.5], [-3, 1e40], [5, 6]])
    assert table.values.dtype == np.float64 and list(table.dates) == list(pd.date_range("2020-01-01", periods=3, freq="h"))
    frame = pd.read_csv(io.BytesIO(content), encoding="latin-1" if latin else "utf-8-sig").dropna(how="all")
    panel = pd.concat([frame.assign(id="second"), frame.assign(id="first")])
    made = tables_of(panel, table.columns, "id")
    assert list(made) == ["second", "first"]  # in the order of their rows
    for found in (tables_of(frame, table.columns)[None], *made.values()):
        np.testing.assert_array_equal(found.values, table.values)
        assert found.dates.equals(table.dates) and found.columns == table.columns


@pytest.mark.parametrize(("content", "flags", "columns", "values", "said"), FOUND.values(), ids=FOUND)
def test_the_format_of_a_file_is_found_and_said(tmp_path, content, flags: dict, columns: str, values, said: str) -> None:
    table = read(tmp_path, content, **flags)
    assert table.columns == columns.split(";" if ";" in columns else ",") and table.values.tolist() == values
    assert table.read_as == (f"{tmp_path / 'data.csv'} was read as: {said}" if said else "")
    packed = read(
        tmp_path, gzip.compress(content if isinstance(content, bytes) else content.encode()), None, "x.csv.gz", **flags
    )
    assert packed.columns == table.columns and packed.values.tolist() == values and packed.dates.equals(table.dates)


def test_a_long_frame_is_read_as_its_file(tmp_path) -> None:
    months = pd.date_range("2008-01-01", periods=24, freq="MS")
    rows = pd.DataFrame({"id": ["n"] * 24 + ["s"] * 24, "date": "2001-01-01", "Zeit": [*months.strftime("%d/%m/%Y")] * 2})
    rows = rows.assign(note="dry", v=np.arange(48.0))
    table = read(tmp_path, rows.to_csv(), date_column="Zeit", id_column="id", drop_columns=["note"])
    frame = pd.read_csv(tmp_path / "data.csv")
    framed = tables_of(frame, table.columns, date_column="Zeit", pivot_by="id", drop_columns=["note"])[None]
    for found in (table, framed):
        assert found.columns == ["n", "s"] and found.dates.equals(months) and "read day first" in found.read_as
        np.testing.assert_array_equal(found.values.T, np.arange(48).reshape(2, 24))


@pytest.mark.parametrize(("content", "flags", "message"), BAD_FORMAT.values(), ids=BAD_FORMAT)
def test_a_format_that_cannot_be_read_is_named_in_one_line(tmp_path, content, flags: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, content, **flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_archive_is_named(tmp_path) -> None:
    for content, message in ((GOOD.encode(), "Not a gzipped file"), (gzip.compress(GOOD.encode())[:-9], "ended before")):
        with pytest.raises(InputError, match=f"x.csv.gz: got an unreadable file .*{message}.*, expected a CSV file"):
            read(tmp_path, content, None, "x.csv.gz")


def test_only_the_columns_that_are_used_need_be_numbers(tmp_path) -> None:
    content = "date,note,x,half\n2020-01-01,dry,1,\n2020-01-02,wet,5,2\n2020-01-02,dry,5,\n"
    content += "".join(f"2020-02-{day},dry,0,0\n" for day in range(10, 20))  # of rows that often repeat one is left out
    (tmp_path / "data.csv").write_text(content)
    table = read_table(tmp_path / "data.csv", "ffill")
    assert table.only(["x"]).values.tolist() == [[1], [5], [5], *[[0]] * 10] and table.only(["x"]).filled == 0
    with pytest.raises(InputError, match="row 2, column 'half': got an empty cell .*ffill has no value"):
        table.only(["x", "half"])


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_file_is_named_in_one_line(tmp_path, content, message) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'data.csv'}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "column", "expected"),
    [
        ("linear", ["1", "", "", "4"], [1, 2, 3, 4]), ("linear", ["", "2", ""], [2, 2, 2]),
        ("ffill", ["1", "", "", "4", ""], [1, 1, 1, 4, 4]), ("ffill", ["1", "2"], [1, 2]),
        ("ffill", ["", "2"], "row 2, column 'x': got an empty cell .*; --fill_missing ffill has no value to fill it with"),
        ("linear", ["", ""], "row 2, column 'x': got an empty cell .*, expected a number; --drop_columns 'x' leaves"),
        ("linear", ["1", "bad", ""], "row 3, column 'x': got 'bad' .*, expected a number$"),
    ],
)  # fmt: skip
def test_empty_cells_are_filled_or_named(tmp_path, how, column, expected) -> None:
    rows = [f"2020-01-{day:02},{cell},5" for day, cell in enumerate(column, 1)]
    content = "\n".join(["date,x,y", *rows])
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            read(tmp_path, content, how)
        return
    table = read(tmp_path, content, how)
    assert table.filled == column.count("") and table.values.tolist() == [[value, 5] for value in expected]
    framed = tables_of(pd.read_csv(tmp_path / "data.csv"), ["x"], fill=how)[None]
    assert framed.filled == table.filled and framed.values[:, 0].tolist() == expected


@pytest.mark.parametrize("times", [2, 3])
def test_rows_that_all_stand_twice_are_read_once(tmp_path, times) -> None:
    once = pd.DataFrame({"date": pd.date_range("2020-01-01", periods=9, freq="h").astype(str), "x": range(9)})
    frame = once.loc[once.index.repeat(times)]
    for table in (read(tmp_path, frame.to_csv(index=False)), tables_of(frame, ["x"])[None]):
        assert table.values.tolist() == [[value] for value in range(9)] and list(table.dates) == list(
            once["date"].astype("M8[us]")
        )
        assert table.read_as.endswith(f": {9 * times - 9} rows that repeat the one above them are left out")


def test_rows_that_stand_twice_are_filled_as_if_they_stood_once(tmp_path) -> None:
    once = pd.DataFrame({"date": pd.date_range("2020-01-01", periods=4, freq="h").astype(str), "x": [1, np.nan, np.nan, 4]})
    table = read(tmp_path, once.loc[once.index.repeat(2)].to_csv(index=False), "linear")
    assert table.values.tolist() == [[1], [2], [3], [4]] and table.filled == 2


def test_weather_as_distributed() -> None:
    table = read_table(real_data("weather"))
    assert table.values.shape == (52696, 21) and table.values.flags.f_contiguous
    assert table.columns[0] == "p (mbar)" and table.columns[-1] == "OT"
    assert sum("\ufffd" in name for name in table.columns) == 3  # already damaged in the file
