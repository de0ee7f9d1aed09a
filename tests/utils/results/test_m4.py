"""The M4 competition: scores and Naive2 against formulas and the organisers' own figures, and runs as a user sees them."""

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import utils.run
from data_provider.batches import Batch
from data_provider.data_factory import batch_loader
from data_provider.m4 import load_m4, read_wide
from data_provider.splits import PATTERNS
from layers.norm import instance_norm
from layers.prompt import describe_series
from models.TimeLLM import Model
from scripts import m4_scores
from scripts.report import report
from tests.m4_files import write_m4
from tests.realdata import ROOT
from tests.small_run import command_line, refusal, run_folder, train, train_in_two_processes
from tests.utils.test_models_in_the_loop import StopAt
from utils.flags import parse_flags
from utils.results.m4 import PAPER, errors_of, grouped, naive2, owa, table
from utils.saving.interrupt import Interrupted

# As the published script has them; what it leaves out follows from the pattern.
PUBLISHED = {
    "task_name": "short_term_forecast", "data": "m4", "features": "M", "enc_in": 1, "dec_in": 1, "c_out": 1,
    "patch_len": 1, "stride": 1, "loss": "SMAPE", "des": "Exp", "itr": 1,
}  # fmt: skip
LEFT_OUT = dict.fromkeys(("data_path", "seq_len", "label_len", "pred_len"))
RIDGE = {"model": "Ridge", "llm_model_path": None, "plots": 0}


@pytest.fixture
def argv(tmp_path: Path, backbones, monkeypatch):
    """`argv(**flags)`: words of a run on six yearly series with a tiny backbone."""
    monkeypatch.delenv("TIMELLM_DATA", raising=False)

    def words(**flags: object) -> list[str]:
        if not (tmp_path / "m4").exists():
            write_m4(tmp_path / "m4", "Yearly")
        chosen = PUBLISHED | LEFT_OUT | {"seasonal_patterns": "Yearly", "batch_size": 2, "root_path": tmp_path / "m4"}
        return command_line(tmp_path, backbones["qwen2"], **chosen | flags)

    return words


@pytest.mark.parametrize(("pattern", "smape", "mase"), [("Hourly", 18.383, 2.395), ("Weekly", 9.161, 2.777)])
def test_the_organisers_naive2_has_the_organisers_figures_and_ours_too(pattern: str, smape: float, mase: float) -> None:
    folders = [Path(os.environ.get("TIMELLM_DATA", ROOT)), ROOT.parent / "shared" / "data", ROOT / "dataset"]
    folder = next((folder / "m4" for folder in folders if (folder / "m4" / "Naive2.csv").is_file()), None)
    if folder is None or not (folder / f"{pattern}-test.csv").is_file():
        pytest.skip("the M4 files and the organisers' Naive2.csv are not at hand: set TIMELLM_DATA")
    H, season, official = PATTERNS[pattern].horizon, PATTERNS[pattern].season, read_wide(folder / "Naive2.csv")
    series = load_m4(folder, pattern, 2 * H, H, H)
    theirs = np.stack([official[name] for name in series.ids])
    found = errors_of(theirs, series.future, series.known, season)
    assert (round(found["smape"], 3), round(found["mase"], 3)) == (smape, mase)
    np.testing.assert_allclose(np.stack([naive2(values, season, H) for values in series.known]), theirs, rtol=1e-6)


def test_errors_are_their_formulas() -> None:
    random = np.random.default_rng(0)
    forecast, truth = random.uniform(1, 9, (2, 3, 4))
    forecast[0, 0] = truth[0, 0] = 0.0
    known = [random.uniform(1, 9, n) for n in (10, 7, 12)]
    smape = [200 * abs(f - y) / (abs(f) + abs(y)) if f or y else 0 for f, y in zip(forecast.flat, truth.flat, strict=True)]
    mase = [np.abs(forecast[n] - truth[n]).mean() / np.abs(x[4:] - x[:-4]).mean() for n, x in enumerate(known)]
    found = errors_of(forecast, truth, known, 4)
    assert list(found.values()) == [3, pytest.approx(np.mean(smape)), pytest.approx(np.mean(mase)), 3]
    # a series that never moves, or is no longer than a season, has no scale: the mean is over the others
    few = errors_of(forecast, truth, [known[0], np.full(9, 5.0), known[2][:4]], 4)
    assert (few["mase"], few["scaled"]) == (pytest.approx(mase[0]), 1)
    still = errors_of(truth, truth, [np.full(9, 5.0)] * 3, 4)
    assert still["smape"] == 0 and np.isnan(still["mase"]) and np.isnan(owa(found, still))


SHAPE, ODD, WALK = np.array([1.2, 0.7, 1.0, 1.1]), np.array([0.5, 1.5, 1.0]), 100 + np.cumsum(np.sin(np.arange(80.0) ** 2))


@pytest.mark.parametrize(
    ("values", "season", "expected"),
    [
        (50 * SHAPE[np.arange(30) % 4], 4, 50 * SHAPE[np.arange(30, 36) % 4]),  # a pure season goes on
        (ODD[np.arange(20) % 3], 3, ODD[np.arange(20, 26) % 3]),
        (np.tile([1.0, 0.0, 3.0, 2.0], 8), 4, [1, 0, 3, 2, 1, 0]),  # one of its values is 0
        (WALK, 1, WALK[-1:]),  # without a season the last value does: none is known,
        (WALK[:11], 4, WALK[10:11]),  # the series is too short,
        (np.full(40, 3.0), 12, [3.0]),  # or never moves,
        (np.tile([1.0, 2.0, 3.0, 0.0], 8), 4, [0.0]),  # the last index is 0,
        (np.tile([1.0, -1.0, 1.0, -1.0], 8), 4, [-1.0]),  # the trend is 0 everywhere,
        (np.tile([3.0, -1.0, -1.0, -1.0], 8) + np.eye(32)[5], 4, [-1.0]),  # or in most places
    ],
)
def test_naive2_goes_on_with_a_season_where_there_is_one(values, season, expected) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(naive2(values, season, 6), np.broadcast_to(expected, 6), rtol=1e-12)


def test_groups_and_the_average_are_weighted_by_series() -> None:
    figures = {
        "Weekly": ((300, 8.0, 2.0, 100), (300, 10.0, 4.0, 100)),
        "Daily": ((50, 8.0, np.nan, 0), (50, 10.0, np.nan, 0)),
        "Hourly": ((100, 17.0, 1.0, 100), (100, 19.0, 2.0, 100)),
        "Yearly": ((550, 12.0, 3.0, 550), (550, 16.0, 4.0, 550)),
    }
    own = {("one", name): ours for name, (ours, _) in figures.items()}
    own |= {("other", name): own["one", name] for name in ("Weekly", "Hourly")}
    own |= {("Naive2", name): theirs for name, (_, theirs) in figures.items()}
    scores = pd.DataFrame(own, ["series", "smape", "mase", "scaled"]).T
    rows = grouped(scores).loc["one"]
    assert list(rows.index) == ["Yearly", "Weekly", "Daily", "Hourly", "Others", "Average"]
    assert rows.loc["Others"].tolist() == pytest.approx([450, 10.0, 1.5, 200, (10 / 12 + 1.5 / 3) / 2])
    assert rows.loc["Average"].tolist()[:4] == pytest.approx([1000, 11.1, (100 * 2 + 100 + 550 * 3) / 750, 750])
    # averages stand beside those of the same series alone
    lines = table(scores).splitlines()
    assert "one" in lines and "other (without Yearly, Daily, so without their average)" in lines
    assert sum(line.startswith("  Average") for line in lines) == 3  # one's, Naive2's, and the paper's,
    assert f"  {'Average':30}    11.983    1.595   0.859" in lines  # which is that of its groups
    paper = [PAPER[name][:2] for name in ("Yearly", "Quarterly", "Monthly", "Others")]
    np.testing.assert_allclose(np.average(paper, 0, [23, 24, 48, 5]), PAPER["Average"][:2], atol=6e-4)


def test_a_run_trains_scores_and_leaves_the_competitions_file(argv, capsys, tmp_path: Path) -> None:
    words = argv(train_epochs=8, learning_rate=1e-2, lradj="constant", eval_batch_size=2)
    lines, folder = train(words, capsys), run_folder(words)
    series = load_m4(tmp_path / "m4", "Yearly", 12, 6, 6)
    made = pd.read_csv(folder / "Yearly_forecast.csv", index_col="id")
    assert list(made.index) == series.ids and list(made.columns) == [f"F{n}" for n in range(1, 7)]
    own = errors_of(made.to_numpy(), series.future, series.known, 1)
    naive = errors_of(np.stack([naive2(v, 1, 6) for v in series.known]), series.future, series.known, 1)
    (line,) = [line for line in lines if line.startswith("Test ")]
    assert line == f"Test SMAPE: {own['smape']:.3f} MASE: {own['mase']:.3f} OWA: {owa(own, naive):.3f}"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test"]["smape"] == pytest.approx(own["smape"]) and metrics["test"]["owa"] == pytest.approx(
        owa(own, naive)
    )
    rows = {row["name"]: (row["smape"], row["mase"], row["owa"]) for row in metrics["baselines"]["rows"]}
    assert list(rows) == ["naive2", "last value", "ridge"] and rows["naive2"] == pytest.approx(
        (naive["smape"], naive["mase"], 1)
    )
    assert (folder / "plots" / "test_windows.png").is_file() and f"{own['smape']:10.3f}{own['mase']:9.3f}" in report(folder)
    # the epoch's losses are the run's loss: the best validation loss is what the checkpoint was chosen by
    record, history = json.loads((folder / "checkpoint.json").read_text()), pd.read_csv(folder / "history.csv")
    assert record["vali_loss"] == pytest.approx(history["vali_loss"].min()) and 0 < record["vali_loss"] < 200
    assert history["train_loss"].iloc[-2:].mean() < 0.8 * history["train_loss"].iloc[0]
    # a test of the checkpoint alone finds the same, and so do two processes with three batches between them
    test, text = ["--is_training", "0", "--checkpoint", str(folder)], (folder / "Yearly_forecast.csv").read_text()
    assert line in train(test, capsys) and line in train_in_two_processes([*words, "--is_training", "0"])
    assert (folder / "Yearly_forecast.csv").read_text() == text
    line = refusal([*test, "--seasonal_patterns", "Weekly"], capsys)
    assert line.startswith("--seasonal_patterns: got Weekly, expected Yearly, on whose series")


def test_the_table_says_what_the_model_was_trained_on(argv, capsys, tmp_path: Path) -> None:
    words, folder = argv(**RIDGE), run_folder(argv(**RIDGE))
    write_m4(tmp_path / "other", "Yearly", seed=1)
    for file in (tmp_path / "m4").iterdir():
        file.write_text(file.read_text().replace('"Y1"', '"synthetic1"'))
    train(words, capsys)
    assert "generated, not measured; these figures say nothing about M4" in report(folder)
    rows = json.loads((folder / "metrics.json").read_text())
    assert rows["test"]["smape"] == pytest.approx(rows["baselines"]["rows"][2]["smape"], rel=1e-4)  # one linear map
    lines = train(["--is_training", "0", "--checkpoint", str(folder), "--root_path", str(tmp_path / "other")], capsys)
    (other,) = (file.parent for file in folder.glob("on_*/metrics.json"))
    for text in ("\n".join(lines), report(other), table(*m4_scores.of_runs([other]))):
        assert "Yearly: after training on other series, those of Yearly-train.csv" in text
        assert "SYNTHETIC DATA: Yearly-train.csv, which the model was trained on, was generated" in text
    assert m4_scores.main([str(tmp_path)]) == 2 and "got no metrics.json of a run on M4" in capsys.readouterr().err


def test_padding_and_what_stands_in_it_change_nothing(argv, load, tmp_path: Path) -> None:
    args = parse_flags(argv())
    model = Model(args, load("qwen2")).eval()
    x, mask = torch.rand(1, 12) * 50 + 100, (torch.arange(12) >= 5).float()[None]
    torch.testing.assert_close(instance_norm(x, mask)[0][:, 5:], instance_norm(x[:, 5:])[0])
    prompts = model.make_prompts(torch.rand(1, 12, 1))
    made = [model(Batch(v, v[:, :0], prompts, x_mask=mask)) for v in (x, x.masked_fill(mask == 0, 1e6))]
    torch.testing.assert_close(made[0], made[1])
    # the prompts speak of what exists: two values before the held-out ones of the shortest series
    series = load_m4(tmp_path / "m4", "Yearly", 12, 6, 6)
    batch, short = next(iter(batch_loader(args, "val", series, model.prompts)[1])), list(map(len, series.known)).index(8)
    z = instance_norm(torch.tensor(series.known[short][:2], dtype=torch.float32)[None])[0]
    (ids,) = model.prompts.encode(describe_series(z.numpy(), model.prompts.template))
    assert batch.prompts.ids[short, : int(batch.prompts.length[short])].tolist() == ids


def test_a_stopped_run_resumes_to_the_last_bit_and_with_the_same_series_alone(argv, capsys, tmp_path: Path) -> None:
    flags = {"train_epochs": 3, "test_every": 0, "plots": 0, "skip": "ridge"}
    words, stopped = (argv(**flags, checkpoints=tmp_path / name) for name in ("whole", "stopped"))
    assert any(line.startswith("Linear map in closed form") for line in train(words, capsys))
    with pytest.raises(Interrupted):
        utils.run.main(parse_flags(stopped), StopAt(4))
    stopped += ["--resume"]
    assert any(line.startswith("Resuming from state.") for line in train(stopped, capsys))
    for name in ("checkpoint.safetensors", "Yearly_forecast.csv"):
        assert (run_folder(words) / name).read_bytes() == (run_folder(stopped) / name).read_bytes()
    other = write_m4(tmp_path / "other", "Yearly", seed=1)
    (other / "Yearly-test.csv").replace(tmp_path / "m4" / "Yearly-test.csv")  # no training reads it
    assert any(line.startswith("This run is finished") for line in train(stopped, capsys))
    (other / "Yearly-train.csv").replace(tmp_path / "m4" / "Yearly-train.csv")
    line = refusal(stopped, capsys)
    assert re.match(r"--resume: got the data's training series \(SHA-256\) \w{8}, expected .*\w{8}, with which", line)


REFUSED = [
    ({"task_name": "long_term_forecast"}, "--task_name: got long_term_forecast, expected short_term_forecast"),
    ({"pred_len": 8}, "--pred_len: got 8, expected 6, the competition's for Yearly"),
    ({"data_path": "my.csv"}, "--data_path: got my.csv, expected nothing with --data m4"),
    ({"features": "S"}, "--features: got S, expected M with --data m4"),
    ({"percent": 10}, "--percent: got 10, expected 100 with --data m4"),
    ({"do_predict": True}, "--do_predict: got "),
    ({"intervals": 80}, "--intervals: got 80, expected none with --data m4"),
    ({"patch_len": 16}, "--seq_len: got 12, expected --patch_len 16 or more"),
    ({"seasonal_patterns": "Hourly"}, "--seasonal_patterns Hourly: got no Hourly-train.csv and Hourly-test.csv"),
    ({"model": "DLinear", "llm_model_path": None}, "--model: got DLinear, expected TimeLLM or Ridge with --data m4"),
    ({"batch_size": 7}, "--batch_size: got 7, expected at most 6, for 6 training windows"),
    ({"enc_in": 7}, "--enc_in: got 7, expected 1"),
    ({"data_pretrain": "ETTh1"}, "--data_pretrain: got ETTh1, expected nothing with --data m4"),
    # a map that nothing can be fitted to: the longest series has 60 values
    ({"seq_len": 49, "skip": "linear"}, "--skip linear: got --seq_len 49, with which no training series"),
    (RIDGE | {"seq_len": 49}, "--model Ridge: got --seq_len 49, with which no training series"),
    # other data take none of the competition's
    ({"data": "custom", "task_name": "long_term_forecast", "data_path": "series.csv"}, "--loss: got SMAPE"),
    ({"data": "custom", "data_path": "series.csv", "loss": "MSE"}, "--task_name: got short_term_forecast, expected "),
]  # fmt: skip


def test_what_cannot_be_asked_for_is_refused(argv, capsys, tmp_path: Path) -> None:
    for flags, message in REFUSED:
        assert message in refusal(argv(**flags), capsys) and not run_folder(argv()).exists()
    file = tmp_path / "m4" / "Yearly-train.csv"
    whole = file.read_text()
    for line, message in (
        ("Y7,,,", "Yearly-train.csv: row 8, series 'Y7': got no values"),
        ("Y7,1,two,3", "Yearly-train.csv: row 8, series 'Y7', value 2: got 'two', expected a number"),
        ("Y7,1,2,3", "Yearly-test.csv: series 'Y7': got 0 values, expected 6"),
    ):
        file.write_text(f"{whole}{line}\n")
        assert message in refusal(argv(), capsys)
