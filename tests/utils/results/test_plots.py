"""Pictures: pages for many channels, names that no font can draw, very short runs."""

import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.dates import date2num

from utils.errors import StorageError
from utils.results.forecast import Forecast
from utils.results.plots import draw_forecast, draw_losses, draw_steps, draw_windows, forecast_figure, panels_of
from utils.results.test_pass import Window


@pytest.mark.parametrize(("channels", "pages"), [(1, 1), (7, 1), (21, 3)])
def test_pages(tmp_path, channels, pages):
    dates, values = pd.date_range("2020", periods=30, freq="h"), np.random.default_rng(0).random((30, channels))
    later = pd.date_range("2020-01-02 06:00", periods=6, freq="h")
    bands = {level: (values[:6] - level / 100, values[:6] + level / 100) for level in (80.0, 95.0)}
    forecast = Forecast([f"c{i}" for i in range(channels)], later, values[:6], bands, 4)
    drawn = draw_forecast(tmp_path, (dates, values), forecast, "1 hour")
    assert [path.name for path in drawn] == (
        ["forecast.png"] if pages == 1 else [f"forecast_{page}.png" for page in range(1, pages + 1)]
    )
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_odd_names_and_one_row_ahead_draw_without_a_warning(tmp_path):
    dates, values = pd.date_range("2001-01-31", periods=25, freq="ME"), np.arange(25.0)[:, None]
    window = Window(dates, values[:24], values[24:], values[24:] + 1, {"lo80": values[24:], "hi80": values[24:] + 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("销量 $a$ of $b", "W/m\ufffd", "x" * 200, "𓀀"):
            draw_windows(tmp_path, [name], [window] * 2, "1 month")
        draw_losses(tmp_path, [{"epoch": 1, "train_loss": 0.5, "vali_loss": 0.4, "test_loss": 0.45}])
        draw_steps(tmp_path, {"steps": {"mse": [0.4], "mae": [0.3]}, "all": {"mse": 0.4, "mae": 0.3}}, "1 month")


def test_bands_open_at_the_last_known_row_and_are_lighter_where_they_are_only_widened():
    dates, values = pd.date_range("2020", periods=5, freq="D"), np.arange(5.0)[:, None]
    ends = {80.0: (values[3:] - 1, values[3:] + 1), 95.0: (values[3:] - 2, values[3:] + 3)}
    forecast = Forecast(["a"], dates[3:], values[3:], ends, 1)
    figure = forecast_figure(panels_of((dates[:3], values[:3]), forecast), "1 day")
    wide, wider, narrow, narrower = figure.axes[0].collections  # the widest first, so that it lies below
    assert (wide.get_label(), narrow.get_label()) == ("95 %", "80 %")
    assert wide.get_alpha() < narrow.get_alpha()
    assert wider.get_alpha() < wide.get_alpha() and narrower.get_alpha() < narrow.get_alpha()

    def corners(shade):
        points = {(round(x - date2num(dates[0]), 6), round(y, 6)) for x, y in shade.get_paths()[0].vertices}
        return {point for point in points if point[0] >= 0}

    assert corners(wide) == {(2, 2), (3, 1), (3, 6)}
    assert corners(wider) == {(3, 1), (3, 6), (4, 2), (4, 7)}
    assert corners(narrow) == {(2, 2), (3, 2), (3, 4)} and corners(narrower) == {(3, 2), (3, 4), (4, 3), (4, 5)}
    plain = forecast_figure(panels_of((dates[:3], values[:3]), Forecast(["a"], dates[3:], values[3:])), "1 day")
    assert not plain.axes[0].collections


def test_a_file_where_the_pictures_folder_should_be_is_named(tmp_path):
    (tmp_path / "plots").write_text("mine")
    with pytest.raises(StorageError, match=r"^plots cannot be written in .* \(File exists\)$"):
        draw_losses(tmp_path, [{"epoch": 1, "train_loss": 0.5, "vali_loss": 0.4, "test_loss": 0.45}])


def test_losses_that_are_no_numbers(tmp_path, monkeypatch):
    marked = []
    monkeypatch.setattr(Axes, "axvline", lambda self, at, **_: marked.append(at))
    history = [{"epoch": i + 1, "train_loss": 1.0, "vali_loss": v, "test_loss": 1.0} for i, v in enumerate([np.nan, 2, 1])]
    draw_losses(tmp_path, history)
    draw_losses(tmp_path, history[:1])
    assert marked == [3]
