"""Pictures: pages for many channels, names that no font can draw, bands, very short runs."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.dates import date2num

from layers.errors import StorageError
from tests.small_run import run_folder, train, write_csv
from utils.results.plots import draw_losses, forecast_figure, panels_of

LOSSES = [{"epoch": i + 1, "train_loss": 1.0, "vali_loss": v, "test_loss": 1.0} for i, v in enumerate([np.nan, 2, 1])]


def test_a_run_of_many_channels_with_odd_names_and_one_row_ahead(argv, tmp_path, capsys):
    odd = ["销量 $a$ of $b", "W/m\ufffd", "x" * 200, "𓀀"]
    write_csv(tmp_path / "series.csv", 200, (*odd, "a", "b", "c", "OT"))
    words = argv(model="Ridge", pred_len=1, do_predict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's of a missing glyph
        train(words, capsys)
    pages = [f"{kind}_{page}.png" for kind in ("test_windows", "forecast") for page in (1, 2)]
    drawn = {path.name: path.read_bytes()[:4] for path in (run_folder(words) / "plots").iterdir()}
    assert drawn == dict.fromkeys([*pages, "error_by_step.png", "coverage_by_step.png", "loss_by_epoch.png"], b"\x89PNG")


def test_bands_open_at_the_last_known_row_and_are_lighter_where_they_are_only_widened():
    days, values = pd.date_range("2020", periods=5, freq="D"), np.arange(5.0)
    history, ahead = pd.DataFrame({"a": values[:3]}, days[:3]), pd.DataFrame({"a": values[3:]}, days[3:])
    bands = {80: (values[3:, None] - 1, values[3:, None] + 1), 95: (values[3:, None] - 2, values[3:, None] + 3)}
    figure = forecast_figure(panels_of(history, ahead, bands, 1), "1 day")
    shades = figure.axes[0].collections  # the widest first, so that it lies below
    assert [shade.get_label() for shade in shades[::2]] == ["95 %", "80 %"]
    wide, wider, narrow, narrower = (shade.get_alpha() for shade in shades)
    assert wider < wide < narrow and narrower < narrow
    corners = [
        {(round(x - date2num(days[0]), 6), round(y, 6)) for x, y in shade.get_paths()[0].vertices} for shade in shades
    ]
    assert [{point for point in points if point[0] >= 0} for points in corners] == [
        {(2, 2), (3, 1), (3, 6)}, {(3, 1), (3, 6), (4, 2), (4, 7)},
        {(2, 2), (3, 2), (3, 4)}, {(3, 2), (3, 4), (4, 3), (4, 5)},
    ]  # fmt: skip
    assert not forecast_figure(panels_of(history, ahead, {}, 1), "1 day").axes[0].collections


def test_the_kept_epoch_is_marked_and_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    marked = []
    monkeypatch.setattr(Axes, "axvline", lambda self, at, **_: marked.append(at))
    draw_losses(tmp_path, LOSSES)
    assert marked == [3]
    with pytest.raises(StorageError, match=r"^plots cannot be written in .* \(Not a directory\)$"):
        draw_losses(tmp_path / "plots/loss_by_epoch.png", LOSSES)


def test_a_wide_run_names_some_columns_and_draws_some(argv, capsys, tmp_path: Path) -> None:
    write_csv(tmp_path / "series.csv", 300, tuple(f"s{n}" for n in range(60)))
    words = argv(model="DLinear", max_iters=3, torch_checkpoint=0, do_predict=True)
    lines, folder = train(words, capsys), run_folder(words)
    assert any(line.startswith("60 channels: s0, s1, s2, s3, s4, s5, s6, s7 and 52 more; all") for line in lines)
    by_error = json.loads((folder / "metrics.json").read_text())["standardised"]["channels"]
    assert len(by_error) == 60  # the figures are of all
    (said,) = (line for line in lines if line.startswith("Pictures of test windows"))
    kind, names = said.split("evenly spread: ")
    assert kind == "Pictures of test windows: 7 of 60 channels, from the lowest test MSE to the highest, "
    ranked, shown = sorted(by_error, key=lambda name: by_error[name]["mse"]), names.split(", ")
    assert [ranked.index(name) for name in shown] == [0, 10, 20, 30, 39, 49, 59]
