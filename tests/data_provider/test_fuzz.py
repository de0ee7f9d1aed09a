"""Whatever a CSV holds: a series, or one line that says what is wrong; never a traceback."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_provider.data_loader import load_series
from layers.errors import InputError

START = pd.Timestamp("2021-01-01")
NUMBERS = st.one_of(
    st.floats(width=64).map(repr),
    st.integers().map(str),
    st.sampled_from(["", "nan", "inf", "-inf", "1e400", "1e308", "0x10", "1,5", "1 000"]),
    st.sampled_from(["True", "null", "-", "\x00", "١", '"']),
)
DATES = st.one_of(
    st.datetimes().map(str),
    st.integers(-(10**20), 10**20).map(str),
    st.sampled_from(
        ["", "now", "24:00", "2021-02-30", "2021-01-01T00:00+02:00", "01/02/2021 3:00 PM", "9999-12-31", "2262-04-12",
         "0001-01-01", "2021-W01", "NaT", "1e9", "01/02/21", "2021-01-01 UTC"]
    ),
    st.text(max_size=12),
)  # fmt: skip
NAMES = st.one_of(st.sampled_from(["date", "OT", "a", "a", "Unnamed: 0", "", "date.1", "🙂"]), st.text(max_size=6))
RAW = st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))


@st.composite
def tables(draw) -> bytes:
    """A regular table with some cells, the header, a row or the line ends changed."""
    rows, columns = draw(st.integers(0, 60)), draw(st.integers(0, 3))
    step = draw(st.sampled_from(["1h", "15min", "1D", "0h", "-1h"]))
    table = [["date", *(f"c{i}" for i in range(columns))]]
    for row in range(rows):
        table.append([str(START + row * pd.Timedelta(step)), *(str(row * (i + 1) % 7) for i in range(columns))])
    for _ in range(draw(st.integers(0, 4))):
        row = draw(st.integers(0, len(table) - 1))
        cell = draw(st.integers(0, max(len(table[row]) - 1, 0)))
        kind = draw(st.sampled_from(["cell", "cell", "cell", "short", "long", "empty"]))
        if kind == "cell" and table[row]:
            table[row][cell] = draw(NAMES if row == 0 else DATES if cell == 0 else NUMBERS)
        elif kind == "short":
            table[row] = table[row][:cell]
        elif kind == "long":
            table[row] = [*table[row], draw(NUMBERS)]
        elif kind == "empty":
            table[row] = []
    end, separator = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"])), draw(st.sampled_from([",", ",", ";", "\t"]))
    text = end.join(separator.join(row) for row in table)
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"])) + text.encode("utf-8", "surrogatepass")


def check(folder: Path, content: bytes, **flags) -> None:
    (folder / "x.csv").write_bytes(content)
    try:
        series = load_series("custom", folder, "x.csv", seq_len=8, label_len=2, pred_len=3, **flags)
    except InputError as error:
        assert len(str(error).splitlines()) == 1, repr(str(error))
        assert re.fullmatch(".+: got .+, expected .+", str(error), re.DOTALL), str(error)
    else:
        assert np.isfinite(series.values).all() and np.isfinite(series.marks).all()
        assert len(series.windows("train")) > 0


QUICK = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@settings(QUICK, max_examples=400)
@given(content=tables(), features=st.sampled_from(["M", "S", "MS"]), target=NAMES)
def test_changed_tables(tmp_path: Path, content: bytes, features: str, target: str) -> None:
    check(tmp_path, content, features=features, target=target)


@settings(QUICK, max_examples=200)
@given(content=RAW)
@example(content=b'date,"a\n2020-01-01,1\n')  # a quote that nothing closes, in the header
@example(content=b'"')
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    check(tmp_path, content)
