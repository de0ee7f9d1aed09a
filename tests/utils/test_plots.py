"""Pictures: pages for many channels, names that no font can draw, very short runs."""

import warnings

import numpy as np
import pandas as pd
import pytest

from utils.errors import StorageError
from utils.plots import draw_forecast, draw_losses, draw_steps, draw_windows
from utils.results import Window


@pytest.mark.parametrize(("channels", "pages"), [(1, 1), (7, 1), (21, 3)])
def test_pages(tmp_path, channels, pages):
    dates, values = pd.date_range("2020", periods=30, freq="h"), np.random.default_rng(0).random((30, channels))
    future = (pd.date_range("2020-01-02 06:00", periods=6, freq="h"), values[:6])
    drawn = draw_forecast(tmp_path, [f"c{i}" for i in range(channels)], (dates, values), future, "1 hour")
    assert [path.name for path in drawn] == (
        ["forecast.png"] if pages == 1 else [f"forecast_{page}.png" for page in range(1, pages + 1)]
    )
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_odd_names_and_one_row_ahead_draw_without_a_warning(tmp_path):
    dates, values = pd.date_range("2001-01-31", periods=25, freq="ME"), np.arange(25.0)[:, None]
    window = Window(dates, values[:24], values[24:], values[24:] + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("销量 $a$ of $b", "W/m\ufffd", "x" * 200, "𓀀"):
            draw_windows(tmp_path, [name], [window] * 2, "1 month")
        draw_losses(tmp_path, [{"epoch": 1, "train_loss": 0.5, "vali_loss": 0.4, "test_loss": 0.45}])
        draw_steps(tmp_path, {"steps": {"mse": [0.4], "mae": [0.3]}, "all": {"mse": 0.4, "mae": 0.3}}, "1 month")


def test_a_file_where_the_pictures_folder_should_be_is_named(tmp_path):
    (tmp_path / "plots").write_text("mine")
    with pytest.raises(StorageError, match=r"^plots cannot be written in .* \(File exists\)$"):
        draw_losses(tmp_path, [{"epoch": 1, "train_loss": 0.5, "vali_loss": 0.4, "test_loss": 0.45}])
