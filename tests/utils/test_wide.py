"""A file of 60 columns through the program: what is chosen and said, and what does not grow with the number of columns."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_provider.data_loader import WindowDataset, load_series
from scripts import past_forecasts
from tests.small_run import run_folder, train
from utils.results import baselines

COLUMNS = tuple(f"s{n}" for n in range(60))


def write_wide(path: Path, rows: int = 300) -> Path:
    """60 columns of hourly values, the later ones noisier."""
    random, hour = np.random.default_rng(0), np.arange(330)
    table = {"date": pd.date_range("2020-01-01", periods=rows, freq="h")}
    for n, name in enumerate(COLUMNS):
        table[name] = (n + np.sin(2 * np.pi * (hour + n) / 24) + 0.02 * n * random.standard_normal(330))[:rows].round(4)
    pd.DataFrame(table).to_csv(path, index=False)
    return path


@pytest.fixture
def wide(argv, tmp_path: Path):
    """`wide(**flags)`: the command line of a DLinear of 3 iterations on 60 columns."""
    write_wide(tmp_path / "series.csv")
    return lambda **flags: argv(**{"model": "DLinear", "max_iters": 3, "torch_checkpoint": 0} | flags)


def test_a_wide_run_names_some_columns_and_draws_some(wide, capsys, tmp_path: Path) -> None:
    words = wide(do_predict=True, append=True)
    lines = train(words, capsys)
    assert max(map(len, lines)) < 300
    assert any(line.startswith("60 channels: s0, s1, s2, s3, s4, s5, s6, s7 and 52 more; all") for line in lines)
    folder = run_folder(words)
    assert {file.name for file in (folder / "plots").iterdir()} == {
        "test_windows.png", "error_by_step.png", "loss_by_epoch.png", "forecast.png",
    }  # fmt: skip
    by_error = json.loads((folder / "metrics.json").read_text())["standardised"]["channels"]
    assert len(by_error) == 60  # the figures are of all
    (said,) = [line for line in lines if line.startswith("Pictures of test windows")]
    kind, names = said.split("evenly spread: ")
    assert kind == "Pictures of test windows: 7 of 60 channels, from the lowest test MSE to the highest, "
    ranked, shown = sorted(by_error, key=lambda name: by_error[name]["mse"]), names.split(", ")
    assert [ranked.index(name) for name in shown] == [0, 10, 20, 30, 39, 49, 59]
    assert "Pictures of the forecast: 7 of 60 channels, from the first to the last, evenly spread: s0, s10" in "\n".join(
        lines
    )
    # the history of forecasts, whose 300 columns are told apart again
    newer = write_wide(tmp_path / "newer.csv", 330)
    assert past_forecasts.main([str(folder), "--data", str(newer)]) == 0
    table = capsys.readouterr().out
    assert len(re.findall(r"^  s\d+ ", table, re.MULTILINE)) == 10 and "5 columns with the lowest" in table


def test_a_narrow_run_has_every_column_drawn_and_says_nothing_of_it(argv, capsys) -> None:
    words = argv(model="DLinear", max_iters=3)
    assert not any("Pictures" in line for line in train(words, capsys))
    assert (run_folder(words) / "plots/test_windows.png").is_file()


def test_a_ridge_regression_of_very_many_sequences_is_fitted_to_every_kth_window(tmp_path: Path, monkeypatch) -> None:
    write_wide(tmp_path / "series.csv")
    series = load_series("custom", tmp_path, "series.csv", target=None, seq_len=32, label_len=8, pred_len=8)
    assert baselines.fitted_every(series.windows("train")) == 1
    train, val = series.windows("train"), series.windows("val")
    monkeypatch.setattr(baselines, "MOST_FITTED", 60 * 50)
    every = baselines.fitted_every(train)
    assert every == -(-len(train) // 50) > 1
    weights, _ = baselines.fit_ridge(train, val)
    by_hand = np.concatenate([train.values[n : n + 40].T for n in range(0, len(train), every)]).astype(np.float64)
    found = np.concatenate([np.concatenate(pair, axis=1) for pair in train.sequences(every)])
    np.testing.assert_array_equal(found, by_hand)
    assert weights.shape == (32, 8) and isinstance(train, WindowDataset)
    detail = baselines.baselines(series)[-1]["detail"]
    assert detail.endswith(f", fitted to one training window in {every}")
