"""Files of a forecast: the names of their columns, the history that --append keeps, and that no forecast is lost."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from layers.errors import InputError
from tests.small_run import PRED_LEN, command_line, run_folder, train, write_csv
from utils.results.forecast import Forecast, band_columns
from utils.results.forecast_files import write_forecast

HOURS = pd.date_range("2024-02-28 22:00", periods=12, freq="h")  # a midnight among them, of a leap day


def made(origin: int, seed: int = 0, steps: int = 4, levels: tuple[float, ...] = (80,), columns=("load", "OT")) -> Forecast:
    """A forecast from row `origin` of HOURS."""
    values = np.random.default_rng(seed).standard_normal((steps, len(columns)))
    bands = {level: (values - level, values + level) for level in levels}
    return Forecast(list(columns), HOURS[origin + 1 : origin + 1 + steps], values, bands, steps)


def write(folder: Path, origin: int, append: bool = True, **changes) -> list[str]:
    return write_forecast(folder, made(origin, **changes), HOURS[origin], append)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_columns_go_by_column_and_then_by_level() -> None:
    found = band_columns(["load", "OT"], [80, 99.5])
    assert found == ["load_lo80", "load_hi80", "load_lo99.5", "load_hi99.5", "OT_lo80", "OT_hi80", "OT_lo99.5", "OT_hi99.5"]


def test_no_two_columns_have_one_name() -> None:
    columns = ["a", "a_lo80", "a_lo80_", "b"]
    names = band_columns(columns, [80])
    assert names[:2] == ["a_lo80__", "a_hi80"] and len({*columns, *names}) == 4 + 8


def test_a_history_has_a_row_set_an_origin(tmp_path: Path) -> None:
    for origin in (0, 1, 2):
        lines = write(tmp_path, origin, seed=origin)
        assert lines == [f"History of forecasts: {tmp_path / 'forecasts.csv'}"]
    assert set(files(tmp_path)) == {"forecast.csv", "forecasts.csv"}  # the history has what forecast.csv had
    held = pd.read_csv(tmp_path / "forecasts.csv", parse_dates=["origin"], date_format="ISO8601")
    assert list(held.columns) == ["origin", "date", "load", "OT", "load_lo80", "load_hi80", "OT_lo80", "OT_hi80"]
    assert held["origin"].tolist() == [HOURS[origin] for origin in (0, 1, 2) for _ in range(4)]
    last = held[held["origin"] == HOURS[2]].drop(columns="origin").reset_index(drop=True)
    assert last.equals(pd.read_csv(tmp_path / "forecast.csv"))
    np.testing.assert_allclose(held["OT_lo80"], held["OT"] - 80, rtol=1e-6)


def test_the_same_forecast_again_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path, 1, seed=1)
    before = files(tmp_path)
    write(tmp_path, 1, seed=1)
    assert files(tmp_path) == before
    write(tmp_path, 0)  # an earlier one, which the history has
    assert (tmp_path / "forecasts.csv").read_bytes() == before["forecasts.csv"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"got another forecast from 2024-02-28 22:00:00 than the one to append \(4 and 4 rows\), expected"),
        ({"steps": 6}, r"got another forecast from 2024-02-28 22:00:00 than the one to append \(4 and 6 rows\)"),
        ({"levels": (80, 95)}, "got the columns origin,date,load,OT,load_lo80,load_hi80,OT_lo80,OT_hi80, expected those"),
        ({"levels": ()}, "got the columns origin,date,load,OT,load_lo80,"),
        ({"columns": ("load", "wind")}, "got the columns origin,date,load,OT,"),
    ],
)  # fmt: skip
def test_what_a_history_cannot_take_is_refused_and_nothing_is_written(tmp_path: Path, changes: dict, message: str) -> None:
    write(tmp_path, 0)
    before = files(tmp_path)
    with pytest.raises(InputError, match=rf"forecasts\.csv: {message}") as caught:
        write(tmp_path, 0, **changes)
    assert "\n" not in str(caught.value) and files(tmp_path) == before


@pytest.mark.parametrize("damage", [b"origin,date,load\n", b"\xff\xfe", b"", b"-cut short"])
def test_a_history_that_is_none(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path, 0)
    path = tmp_path / "forecasts.csv"
    path.write_bytes(path.read_bytes().rstrip() + damage if damage.startswith(b"-") else damage)
    if not damage:  # an empty file is a history of nothing
        write(tmp_path, 1)
        assert len(path.read_text().splitlines()) == 5
        return
    before = files(tmp_path)
    with pytest.raises(InputError, match=r"forecasts\.csv: got "):
        write(tmp_path, 1)
    assert files(tmp_path) == before


def test_without_a_history_an_earlier_forecast_is_moved_aside(tmp_path: Path) -> None:
    assert write(tmp_path, 0, append=False) == []
    first = (tmp_path / "forecast.csv").read_bytes()
    assert write(tmp_path, 0, append=False) == []  # the same: nothing to say
    aside = tmp_path / "forecast.2024-02-28T23-00-00.csv"  # after its first date
    assert write(tmp_path, 3, append=False) == [f"An earlier forecast is now in: {aside}"]
    assert aside.read_bytes() == first
    second = (tmp_path / "forecast.csv").read_bytes()
    write(tmp_path, 0, append=False, seed=5)  # another one from the first origin, as after a new training
    other = (tmp_path / "forecast.csv").read_bytes()
    (line,) = write(tmp_path, 1, append=False)
    assert line.endswith("forecast.2024-02-28T23-00-00.1.csv")
    kept = files(tmp_path)
    assert kept.pop("forecast.csv") != other and sorted(kept.values()) == sorted([first, second, other])


@pytest.mark.parametrize("text", ["", "mine\n", "date,x\nsoon,1\n"])
def test_a_forecast_csv_that_is_somebody_elses_is_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "forecast.csv").write_text(text)
    write(tmp_path, 0, append=False)
    assert (tmp_path / "forecast.earlier.csv").read_text() == text


def test_a_file_that_grows_is_forecast_hour_by_hour(tmp_path: Path, backbones, capsys) -> None:
    write_csv(tmp_path / "series.csv", 400)
    rows = (tmp_path / "series.csv").read_text().splitlines(keepends=True)
    (tmp_path / "series.csv").write_text("".join(rows[:360]))
    words = command_line(tmp_path, backbones["qwen2"], model="Ridge", plots=0, torch_checkpoint=0, save_predictions=0)
    train(words, capsys)
    alone = ["--is_training", "0", "--do_predict", "--plots", "0", "--device", "cpu", "--checkpoint", str(run_folder(words))]
    for last in (360, 361, 365):
        (tmp_path / "series.csv").write_text("".join(rows[:last]))
        lines = train([*alone, "--append"], capsys)
        assert not any("Epoch" in line or "aside" in line or "now in" in line for line in lines)
    held = pd.read_csv(run_folder(words) / "forecasts.csv")
    origins = [rows[last - 1].split(",")[0] for last in (360, 361, 365)]
    assert held["origin"].tolist() == [origin for origin in origins for _ in range(PRED_LEN)]
    rolled = train([*alone, "--predict_steps", str(PRED_LEN + 2)], capsys)
    first = pd.Timestamp(origins[-1]) + pd.Timedelta(hours=PRED_LEN + 1)
    assert f"Prediction intervals: from row {PRED_LEN + 1}, {first}, on they are not calibrated, only widened" in rolled
