"""One evaluation for all splits: its scores against numpy, whatever the batch, and which columns count."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.small_run import COLUMNS, PRED_LEN, SEQ_LEN, figures, run_folder, train
from utils.flags import parse_flags
from utils.saving.checkpoint import shapes_of
from utils.saving.interrupt import Interrupts
from utils.setup import setup
from utils.training.evaluate import score


def windows(path: Path, features: str) -> tuple[np.ndarray, np.ndarray]:
    """The test windows' inputs and truths, from the file by hand: 70/10/20, training rows' scale."""
    table = pd.read_csv(path)
    values = table[["OT"] if features == "S" else list(COLUMNS)].to_numpy()
    n = len(values)
    training = values[: int(0.7 * n)]
    values = (values - training.mean(0)) / training.std(0)
    start = n - int(0.2 * n)
    truth = [values[i : i + PRED_LEN] for i in range(start, n - PRED_LEN + 1)]
    inputs = [values[i - SEQ_LEN : i] for i in range(start, n - PRED_LEN + 1)]
    target = slice(2, 3) if features == "MS" else slice(None)
    return np.stack(inputs)[..., target], np.stack(truth)[..., target]


@pytest.mark.parametrize("features", ["M", "S", "MS"])
def test_errors_against_numpy_whatever_the_batch(argv, capsys, tmp_path: Path, features: str) -> None:
    words = argv(features=features, max_iters=4)
    lines = train(words, capsys)
    inputs, truth = windows(tmp_path / "series.csv", features)
    for size in (1, 5, 57, 100) if features == "M" else (16,):
        args = parse_flags([*words, "--is_training", "0", "--eval_batch_size", str(size)])
        job = setup(args, 0, Interrupts())
        job.model.load_state_dict(job.checkpoint.tensors(shapes_of(job.model)))
        seen, forecasts = [], []

        def consume(batch, forecast, seen=seen, forecasts=forecasts):
            x = batch.x
            channels = len(x) // len(batch.index)
            seen.append(x.view(-1, channels, SEQ_LEN).mT.numpy())
            forecasts.append(forecast.view(-1, channels, PRED_LEN).mT.numpy())

        scores = score(job, "test", consume)
        np.testing.assert_allclose(np.concatenate(seen), inputs, rtol=1e-5, atol=1e-5)
        error = np.concatenate(forecasts) - truth
        assert error.shape == (57, PRED_LEN, 3 if features == "M" else 1)
        assert scores.mse == pytest.approx(np.square(error).mean(), rel=1e-5)
        assert scores.mae == pytest.approx(np.abs(error).mean(), rel=1e-5)
        assert float(figures(lines)[0]) == pytest.approx(scores.mse, rel=1e-6, abs=1e-7)


def test_target_alone_is_scored_and_every_column_is_read(argv, capsys, tmp_path: Path) -> None:
    """MS: the record has all columns. S: only the target; the forecasts of one channel are the same."""
    outcome = {}
    for features in ("S", "MS"):
        words = argv(features=features, max_iters=4, checkpoints=tmp_path / features)
        outcome[features] = (
            figures(train(words, capsys)),
            json.loads((run_folder(words) / "checkpoint.json").read_text()),
        )
    assert outcome["S"][1]["columns"] == ["OT"] and outcome["MS"][1]["columns"] == list(COLUMNS)
    assert outcome["S"][0] == outcome["MS"][0]
