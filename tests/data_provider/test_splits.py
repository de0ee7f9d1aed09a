"""The table of data sets: a name is a row there, and nowhere else."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from data_provider.data_loader import load_series
from data_provider.description import dataset_description
from data_provider.splits import DATASETS, DataSet, Splits, find_csv, split_rows
from layers.errors import InputError
from tests.realdata import ROOT, real_data
from utils.flags import parse_flags

FILE = Path("some.csv")


def test_a_new_row_is_enough(monkeypatch) -> None:
    monkeypatch.setitem(DATASETS, "Mine", DataSet(borders=(60, 20, 10)))
    assert split_rows("Mine", 95, 8, 4, 100, FILE) == Splits(60, 20, 10, few_shot=60)
    with pytest.raises(InputError, match=r"--data Mine: got some.csv with 89 rows, expected at least 90 \(60 \+ 20 \+ 10\)"):
        split_rows("Mine", 89, 8, 4, 100, FILE)


def test_fixed_borders_and_shares() -> None:
    assert split_rows("ETTh2", 17420, 96, 96, 100, FILE) == Splits(8640, 2880, 2880, few_shot=8640)
    assert split_rows("ETTm1", 69680, 96, 96, 100, FILE) == Splits(34560, 11520, 11520, few_shot=34560)
    for name in ("custom", "ECL", "Traffic", "Weather"):
        assert split_rows(name, 101, 8, 4, 100, FILE) == Splits(70, 11, 20, few_shot=70)


@pytest.mark.parametrize(
    ("name", "file"), [("ECL", "electricity.csv"), ("Traffic", "traffic.csv"), ("Weather", "weather.csv")]
)
def test_a_name_stands_for_the_familys_file_and_folder(tmp_path, monkeypatch, name: str, file: str) -> None:
    monkeypatch.delenv("TIMELLM_DATA", raising=False)
    words = "--task_name long_term_forecast --is_training 1 --model_id a --model_comment b --model DLinear --data"
    args = parse_flags([*words.split(), name, "--root_path", str(tmp_path)])
    assert (args.data, args.data_path, args.target, args.freq) == (name, file, None, None)
    with pytest.raises(
        InputError, match=f"no such file, expected one of {tmp_path}/{file}, {tmp_path}/{Path(file).stem}/{file}"
    ):
        find_csv(args.root_path, args.data_path)
    (tmp_path / Path(file).stem).mkdir()
    (tmp_path / Path(file).stem / file).touch()
    assert find_csv(args.root_path, args.data_path) == tmp_path / Path(file).stem / file
    text = dataset_description(Namespace(**vars(args) | {"prompt_domain": 1}))
    assert 60 < len(text.split()) < 120 and text == (ROOT / f"dataset/prompt_bank/{name}.txt").read_text().strip()


def test_weather_as_distributed() -> None:
    path = real_data("weather")
    series = load_series("Weather", path.parent, path.name, target=None, freq=None, seq_len=512)
    assert series.splits == Splits(36887, 5270, 10539, few_shot=36887) and series.step_words == "10 minutes"
    assert [len(series.windows(split)) for split in ("train", "val", "test")] == [36280, 5175, 10444]
    assert not series.synthetic and (str(series.dates[0]), str(series.dates[-1])) == (
        "2020-01-01 00:10:00",
        "2021-01-01 00:00:00",
    )


def test_an_unknown_name_is_answered_with_all_that_there_are() -> None:
    with pytest.raises(InputError) as caught:
        split_rows("etth1", 101, 8, 4, 100, FILE)
    assert str(caught.value) == f"--data: got 'etth1', expected one of {', '.join(DATASETS)}"


def test_the_table_is_read_without_torch_numpy_and_pandas() -> None:
    code = "import sys, data_provider.splits; print(*sorted({'torch', 'numpy', 'pandas'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
