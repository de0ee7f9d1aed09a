"""--refit: the forecast is of a model that has seen all rows, the test of the one before."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from tests.small_run import command_line, figures, refusal, run_folder, train
from utils.flags import parse_flags
from utils.forecaster import Forecaster
from utils.run import Interrupts, setup
from utils.saving.interrupt import Interrupted


def last_lines(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("The model has learned", "Refit", "train "))]


@pytest.mark.parametrize("flags", [{"skip": "ridge", "dropout": 0.2}, {"model": "Ridge"}, {"model": "LinearStack"}])
def test_the_forecast_knows_the_last_row_and_the_test_does_not(backbones, tmp_path: Path, capsys, flags) -> None:
    words = command_line(
        tmp_path, backbones["qwen2"], train_epochs=3, patience=1, do_predict=True, plots=0, torch_checkpoint=0, **flags
    )
    before = train(words, capsys)
    folder, end = run_folder(words), pd.read_csv(tmp_path / "series.csv")["date"].iloc[-1]
    held = load_file(folder / "checkpoint.safetensors")
    plain = pd.read_csv(folder / "forecast.csv")
    assert last_lines(before)[-1] == "The model has learned from rows up to 2020-01-10 07:00:00"  # 224 rows of 320

    after = train([*words, "--refit"], capsys)
    assert figures(after) == figures(before)
    kept, refitted = (load_file(place / "checkpoint.safetensors") for place in (folder, folder / "refit"))
    assert kept.keys() == refitted.keys() and all(np.array_equal(kept[name], held[name]) for name in held)
    epoch, steps = json.loads((folder / "checkpoint.json").read_text())["epoch"], len(range(224 - 39)) // 16
    said = last_lines(after)
    assert said[-1] == f"The model has learned from rows up to {end}" and f"train {320 - 39}" in said[1:]
    if "model" not in flags:
        assert f"Refit on all rows for {epoch} x {steps} steps" in said[-2]
        assert len(pd.read_csv(folder / "refit" / "history.csv")) == epoch
    frame = pd.read_csv(folder / "refit" / "forecast.csv")  # beside its model; none is left of the model before
    assert not (folder / "forecast.csv").exists()
    assert (frame["date"] == plain["date"]).all() and not np.allclose(frame["OT"], plain["OT"], rtol=1e-4)
    # its bands are those of the model before, as wide around the new forecast
    np.testing.assert_allclose(frame["OT_hi80"] - frame["OT"], plain["OT_hi80"] - plain["OT"], rtol=1e-3)
    later = ["--is_training", "0", "--checkpoint", str(folder / "refit"), "--do_predict", "--append", "--device", "cpu"]
    train(later, capsys)
    assert (folder / "refit/forecasts.csv").is_file() and pd.read_csv(folder / "refit/forecast.csv").equals(frame)
    again = Forecaster.load(folder / "refit").predict(pd.read_csv(tmp_path / "series.csv"))
    np.testing.assert_allclose(again["OT_hi80"], frame["OT_hi80"], rtol=1e-4)
    assert repr(Forecaster.load(folder)).endswith("of 80 %)")
    there = ["--is_training", "0", "--checkpoint", str(folder / "refit")]
    assert "got a model that has learned from rows up to 2020-01-14" in refusal(
        there, capsys
    )  # its test would be its training
    assert refusal([*words, "--season", "230"], capsys) == "--season: got 230, expected at most 224 rows, those that train"
    assert refusal([*words, "--refit", "--itr", "2"], capsys).startswith("--itr: got 2, expected 1 with --refit")


def test_a_refit_that_was_stopped_goes_on(backbones, tmp_path: Path, capsys, monkeypatch) -> None:
    words = command_line(
        tmp_path,
        backbones["qwen2"],
        model="DLinear",
        train_epochs=2,
        do_predict=True,
        refit=True,
        plots=0,
        torch_checkpoint=0,
    )
    whole = train([*words, "--des", "whole"], capsys)
    expected = pd.read_csv(run_folder([*words, "--des", "whole"]) / "refit" / "forecast.csv")
    interrupts = Interrupts()

    def stop_in_the_refit(args, repeat, given):
        context = setup(args, repeat, given)
        given.received = 15 if args.all_rows else 0
        return context

    import utils.run as module

    monkeypatch.setattr(module, "setup", stop_in_the_refit)
    with pytest.raises(Interrupted):
        module.main(parse_flags(words), interrupts)
    monkeypatch.undo()
    refit = run_folder(words) / "refit"
    assert refit.is_dir() and not (refit / "forecast.csv").is_file()
    resumed = train([*words, "--resume"], capsys)
    assert figures(resumed) == figures(whole)
    pd.testing.assert_frame_equal(pd.read_csv(refit / "forecast.csv"), expected)
