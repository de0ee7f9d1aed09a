"""Past forecasts against what came true since: figures worked by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from layers.errors import InputError
from scripts.past_forecasts import main, score_forecasts
from tests.small_run import command_line, run_folder, train, write_csv
from utils.forecaster import Forecaster
from utils.saving.checkpoint import Checkpoint

DAYS = pd.date_range("2024-01-01", periods=8, freq="D")


def write_series(folder: Path, **columns: list[float]) -> Path:
    rows = len(next(iter(columns.values())))
    pd.DataFrame({"date": DAYS[:rows], **columns}).to_csv(folder / "series.csv", index=False)
    return folder / "series.csv"


def write_history(folder: Path, rows: list[list], bands: str = ",OT_lo80,OT_hi80") -> None:
    lines = [",".join(str(DAYS[cell].date()) if n < 2 else str(cell) for n, cell in enumerate(row)) for row in rows]
    (folder / "forecasts.csv").write_text("\n".join([f"origin,date,OT{bands}", *lines]) + "\n")


def cells(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.strip().startswith(name)).split()


def test_figures_by_hand(tmp_path: Path) -> None:
    """Truth 10, 12, 14, 13, 9; forecasts from the first and the second day, one row of which has not come yet."""
    data = write_series(tmp_path, OT=[10.0, 12, 14, 13, 9])
    write_history(tmp_path, [
        [0, 1, 11, 10, 12],  # off by 1, in the band
        [0, 2, 11, 10, 13],  # off by 3, above it
        [1, 2, 15, 13, 16],  # off by 1, in it
        [1, 3, 13, 12.5, 13],  # exact, at its end
        [1, 4, 11, 10, 12],  # off by 2, below it
        [1, 5, 7, 6, 8],  # not yet
    ])  # fmt: skip
    text = score_forecasts(tmp_path, data)
    assert cells(text, "2024-01-01 ")[1:] == ["2", "of", "2", "2", "2.236", "50.0", "%", "3", "3.162"]
    assert cells(text, "2024-01-02 ")[1:] == ["3", "of", "4", "1", "1.291", "66.7", "%", "2", "2.16"]
    # errors 1 3 1 0 2; of the last value 2 4 2 1 3
    assert cells(text, "all") == ["all", "5", "of", "6", "1.4", "1.732", "60.0", "%", "2.4", "2.608"]
    assert "the forecasts' MAE was lower than that of the last value: 1.4 against 2.4." in text
    assert "errors in units of OT" in text
    data = write_series(tmp_path, OT=[10.0])
    text = score_forecasts(tmp_path, data)
    assert "No row has come true yet" in text and cells(text, "all") == ["all", "0", "of", "6"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--checkpoint .*: got no checkpoint"),
        ("", "forecasts.csv: got a file that cannot be read"),
        ("origin,date,OT\n", "forecasts.csv: got no rows"),
        ("date,OT\n2024-01-01,2\n", "forecasts.csv: got the columns date, OT"),
        ("origin,date,OT\n2024-01-01,2024-01-02,low\n", "forecasts.csv: row 2, column 'OT': got no number"),
        ("origin,date,OT\nsoon,2024-01-02,1\n", "forecasts.csv: row 2, column 'date': got 'soon'"),
        ("origin,date,wind\n2024-01-01,2024-01-02,1\n", "forecasts.csv: got the columns wind, expected columns of the data"),
    ],
)
def test_what_is_no_history_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    data = write_series(tmp_path, OT=[1.0, 2])
    if text is not None:
        (tmp_path / "forecasts.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        score_forecasts(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_a_runs_own_history_by_its_script(tmp_path: Path, backbones, capsys) -> None:
    """Errors on the training's scale, the file of the training where none is named."""
    write_csv(tmp_path / "series.csv", 400)
    rows = (tmp_path / "series.csv").read_text()
    words = command_line(tmp_path, backbones["qwen2"], model="Ridge", plots=0, torch_checkpoint=0, save_predictions=0)
    (tmp_path / "series.csv").write_text("".join(rows.splitlines(keepends=True)[:361]))
    train([*words, "--do_predict", "--append"], capsys)
    (tmp_path / "series.csv").write_text(rows)
    folder = run_folder(words)
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    names = ["load", "flow", "OT"]
    whole = pd.read_csv(tmp_path / "series.csv")[names].to_numpy()
    held, truth, std = pd.read_csv(folder / "forecasts.csv"), whole[360:368], whole[:252].std(axis=0)  # 70 % of 360 rows
    error = np.abs(held[names].to_numpy() - truth)
    found, flow = cells(out, "all"), cells(out, "flow")
    assert found[:4] == ["all", "8", "of", "8"] and "errors in deviations of the training" in out
    assert float(found[4]) == pytest.approx((error / std).mean(), rel=1e-3)
    low, high = (held[[f"{name}_{end}80" for name in names]].to_numpy() for end in ("lo", "hi"))
    assert float(found[6]) == pytest.approx(100 * np.mean((low <= truth) & (truth <= high)), abs=0.05)
    assert float(flow[4]) == pytest.approx(error[:, 1].mean(), rel=1e-3)
    for words, message in ([str(tmp_path / "gone")], "--checkpoint "), ([], "--checkpoint .: got no checkpoint"):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith(f"past_forecasts.py: error: {message}") and err.count("\n") == 1


def test_bands_learn_from_what_has_come_true(backbones, tmp_path: Path, capsys) -> None:
    """After the training the series swings three times as far: the bands of the next forecast know it, the test's stay."""
    words = command_line(
        tmp_path, backbones["qwen2"], model="DLinear", max_iters=3, plots=0, do_predict=True, intervals="80"
    )
    train(words, capsys)
    folder, data = run_folder(words), tmp_path / "series.csv"
    frame = pd.read_csv(data)
    later = frame.copy()
    later["date"] = pd.date_range(pd.Timestamp(frame["date"].iloc[-1]) + pd.Timedelta("1h"), periods=len(later), freq="h")
    noise = np.random.default_rng(3).standard_normal((len(later), 3)) * frame.iloc[:, 1:].std().to_numpy() * 3
    later.iloc[:, 1:] += noise
    pd.concat([frame, later]).to_csv(data, index=False)
    whole, forecaster, history = pd.read_csv(data), Forecaster.load(folder), []
    for end in range(len(frame), len(whole), 4):
        made = forecaster.predict(whole[:end])
        made.insert(0, "origin", whole["date"][end - 1])
        history.append(made)
    pd.concat(history).to_csv(folder / "forecasts.csv", index=False)
    before, test = Checkpoint.open(folder).intervals, (folder / "metrics.json").read_bytes()
    widths = []
    for kind in ("plain", "adaptive"):
        text = score_forecasts(folder, data, kind)
        assert f"have {kind} bands from {len(history)} forecasts" in text
        after = Checkpoint.open(folder).intervals
        np.testing.assert_array_equal(after.offsets, before.offsets)
        assert after.newest.windows == len(history) and (folder / "metrics.json").read_bytes() == test
        frame = Forecaster.load(folder).predict(whole)
        widths.append((frame["OT_hi80"] - frame["OT_lo80"]).mean())
    assert (np.array(widths) > 1.05 * (made["OT_hi80"] - made["OT_lo80"]).mean()).all()
    assert "such bands of 80 % would have held" in text
    (folder / "forecasts.csv").write_text("\n".join((folder / "forecasts.csv").read_text().splitlines()[:20]))
    assert main([str(folder), "--data", str(data), "--recalibrate", "plain"]) == 2
    assert "got 2 forecasts whose rows have all come true, expected at least 9" in capsys.readouterr().err
