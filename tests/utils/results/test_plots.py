"""Pictures: pages for many channels, names that no font can draw, bands, very short runs."""

import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.dates import date2num

from layers.errors import StorageError
from tests.small_run import command_line, run_folder, train, write_csv
from utils.results.forecast import bands_of
from utils.results.plots import draw_losses, forecast_figure, panels_of

LOSSES = [{"epoch": i + 1, "train_loss": 1.0, "vali_loss": v, "test_loss": 1.0} for i, v in enumerate([np.nan, 2, 1])]


def test_a_run_of_many_channels_with_odd_names_and_one_row_ahead(tmp_path, backbones, capsys):
    odd = ["销量 $a$ of $b", "W/m\ufffd", "x" * 200, "𓀀"]
    write_csv(tmp_path / "series.csv", 320, (*odd, *(f"c{n}" for n in range(16)), "OT"))
    flags = {"model": "Ridge", "pred_len": 1, "do_predict": True, "train_epochs": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's of a missing glyph
        words = command_line(tmp_path, backbones["qwen2"], **flags)
        train(words, capsys)
    pages = [f"{kind}_{page}.png" for kind in ("test_windows", "forecast") for page in (1, 2, 3)]
    drawn = {path.name: path.read_bytes()[:4] for path in (run_folder(words) / "plots").iterdir()}
    assert drawn == dict.fromkeys([*pages, "error_by_step.png", "loss_by_epoch.png"], b"\x89PNG")


def test_bands_open_at_the_last_known_row_and_are_lighter_where_they_are_only_widened():
    days, values = pd.date_range("2020", periods=5, freq="D"), np.arange(5.0)
    history = pd.DataFrame({"a": values[:3]}, days[:3])
    forecast = pd.DataFrame({"date": days[3:], "a": values[3:]})
    for level, low, high in ((80, 1, 1), (95, 2, 3)):
        forecast[f"a_lo{level}"], forecast[f"a_hi{level}"] = values[3:] - low, values[3:] + high
    ahead = forecast.set_index("date")[["a"]]
    figure = forecast_figure(panels_of(history, ahead, bands_of(forecast, ["a"]), 1), "1 day")
    wide, wider, narrow, narrower = figure.axes[0].collections  # the widest first, so that it lies below
    assert (wide.get_label(), narrow.get_label()) == ("95 %", "80 %")
    assert wide.get_alpha() < narrow.get_alpha()
    assert wider.get_alpha() < wide.get_alpha() and narrower.get_alpha() < narrow.get_alpha()

    def corners(shade):
        points = {(round(x - date2num(days[0]), 6), round(y, 6)) for x, y in shade.get_paths()[0].vertices}
        return {point for point in points if point[0] >= 0}

    assert corners(wide) == {(2, 2), (3, 1), (3, 6)}
    assert corners(wider) == {(3, 1), (3, 6), (4, 2), (4, 7)}
    assert corners(narrow) == {(2, 2), (3, 2), (3, 4)} and corners(narrower) == {(3, 2), (3, 4), (4, 3), (4, 5)}
    assert not forecast_figure(panels_of(history, ahead, {}, 1), "1 day").axes[0].collections


def test_the_kept_epoch_is_marked_and_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    marked = []
    monkeypatch.setattr(Axes, "axvline", lambda self, at, **_: marked.append(at))
    draw_losses(tmp_path, LOSSES)
    draw_losses(tmp_path, LOSSES[:1])
    assert marked == [3]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plots").write_text("mine")
    with pytest.raises(StorageError, match=r"^plots cannot be written in .* \(File exists\)$"):
        draw_losses(tmp_path / "run", LOSSES)
