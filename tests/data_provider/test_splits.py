"""The table of data sets: a name is a row there, and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_provider.splits import DATASETS, DataSet, Splits, split_rows
from layers.errors import InputError
from tests.realdata import ROOT

FILE = Path("some.csv")


def test_a_new_row_is_enough(monkeypatch) -> None:
    monkeypatch.setitem(DATASETS, "Mine", DataSet(borders=(60, 20, 10)))
    assert split_rows("Mine", 95, 8, 4, 100, FILE) == Splits(60, 20, 10, few_shot=60)
    monkeypatch.setitem(DATASETS, "Alias", DataSet(read_as="Mine"))
    assert split_rows("Alias", 95, 8, 4, 100, FILE) == Splits(60, 20, 10, few_shot=60)
    with pytest.raises(InputError, match=r"--data Mine: got some.csv with 89 rows, expected at least 90 \(60 \+ 20 \+ 10\)"):
        split_rows("Mine", 89, 8, 4, 100, FILE)


def test_fixed_borders_and_shares() -> None:
    assert split_rows("ETTh2", 17420, 96, 96, 100, FILE) == Splits(8640, 2880, 2880, few_shot=8640)
    assert split_rows("ETTm1", 69680, 96, 96, 100, FILE) == Splits(34560, 11520, 11520, few_shot=34560)
    for name in ("custom", "ECL", "Traffic", "Weather"):
        assert split_rows(name, 101, 8, 4, 100, FILE) == Splits(70, 11, 20, few_shot=70)


def test_a_name_is_read_as_one_that_stands_for_itself() -> None:
    assert all(DATASETS[row.read_as].read_as is None for row in DATASETS.values() if row.read_as)


def test_an_unknown_name_is_answered_with_all_that_there_are() -> None:
    with pytest.raises(InputError) as caught:
        split_rows("etth1", 101, 8, 4, 100, FILE)
    assert str(caught.value) == f"--data: got 'etth1', expected one of {', '.join(DATASETS)}"


def test_the_table_is_read_without_torch_numpy_and_pandas() -> None:
    code = "import sys, data_provider.splits; print(*sorted({'torch', 'numpy', 'pandas'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
