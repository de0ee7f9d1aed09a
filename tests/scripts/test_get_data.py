"""Getting the data: each source in its turn, and never a silent substitute."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from data_provider import synthetic
from data_provider.synthetic import is_synthetic, write_synthetic
from data_provider.table import read_table
from scripts import get_data
from tests.realdata import ROOT, real_data


def run(folder, *arguments, data=None):
    """The script's printed lines, run from another folder."""
    environment = {key: value for key, value in os.environ.items() if key not in ("TIMELLM_DATA", "PYTHONPATH")}
    if data is not None:
        environment["TIMELLM_DATA"] = str(data)
    command = [sys.executable, str(ROOT / "scripts" / "get_data.py"), "--offline", "--out", "out", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def know(monkeypatch, name, **contents):
    """Let the script take these files for the public ones."""
    known = {file.replace("_", "-") + ".csv": hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    monkeypatch.setitem(get_data.FILES, name, get_data.FILES[name] | known)


def test_offline_writes_synthetic_series_and_says_so(tmp_path):
    lines = run(tmp_path, "--name", "ETTh1", "ETTm1", "m4")
    assert lines[-3:] == [f"data: out/synthetic/{n}" for n in ("ETTh1-synthetic.csv", "ETTm1-synthetic.csv", "m4")]
    for name in ("ETTh1", "ETTm1", "M4"):
        assert any("IS SYNTHETIC" in line and f"NOTHING about {name} " in line for line in lines[:-3])
    path = tmp_path / "out/synthetic/ETTh1-synthetic.csv"
    table = read_table(path)
    assert table.values.shape == (17420, 7)
    assert table.columns == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    assert (table.dates == pd.date_range("2016-07-01", periods=17420, freq="h")).all()
    assert path.read_bytes() == write_synthetic("ETTh1", tmp_path / "again").read_bytes()
    quarter = pd.read_csv(tmp_path / "out/synthetic/ETTm1-synthetic.csv")
    assert len(quarter) == 69680 and quarter["date"][1] == "2016-07-01 00:15:00"
    assert len(list((tmp_path / "out/synthetic/m4").glob("*-train.csv"))) == 6
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["synthetic"]


def test_made_up_names_are_made_up_without_asking_anyone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(get_data, "fetch", None)
    monkeypatch.setitem(synthetic.WIDE, "ECL", (400, 60))
    rates, drift, ecl = (read_table(get_data.get(name, tmp_path, offline=False)) for name in ("rates", "drift", "ECL"))
    assert capsys.readouterr().out.count("it is synthetic (made up, not measured)") == 3
    assert rates.values.shape == (7588, 8) and (rates.values > 0).all()
    assert rates.dates[1] - rates.dates[0] == pd.Timedelta("1D")
    # wild days come in groups, and their direction says nothing of the next one's
    steps = np.diff(np.log(rates.values), axis=0)
    after = [[np.corrcoef(v[1:, n], v[:-1, n])[0, 1] for n in range(8)] for v in (steps, np.abs(steps))]
    assert np.abs(np.mean(after[0])) < 0.05 < 0.1 < np.mean(after[1])
    # a day of 24 rows, then of 27
    power = [np.abs(np.fft.rfft(part[:1944, 0])) for part in (drift.values, drift.values[8000:])]
    assert [round(1944 / (1 + spectrum[1:].argmax())) for spectrum in power] == [24, 27]
    assert ecl.values.shape == (400, 60) and ecl.columns == [*map(str, range(59)), "OT"]
    assert ecl.dates[1] - ecl.dates[0] == pd.Timedelta("1h") and np.ptp(ecl.values, axis=0).min() > 0
    assert (get_data.WIDE["Traffic"], synthetic.ROWS_PER_HOUR["ETTm2"]) == ((17544, 862), 4)


def test_synthetic_is_known_by_name_and_by_content(tmp_path):
    path = write_synthetic("ETTh2", tmp_path)
    renamed = path.rename(tmp_path / "ETTh2.csv")
    assert is_synthetic(path) and is_synthetic(renamed)
    renamed.write_bytes(b"\xef\xbb\xbf" + renamed.read_bytes().replace(b"\n", b"\r\n"))
    assert is_synthetic(renamed)
    (tmp_path / "own.csv").write_text("date,x\n2020-01-01,1\n")
    assert not is_synthetic(tmp_path / "own.csv") and not is_synthetic(tmp_path / "none.csv")


@pytest.mark.parametrize("below", [".", "ETT-small"])
def test_copies_from_the_data_folder_then_uses_the_copy(tmp_path, below):
    real = real_data("ETTh1")
    source = tmp_path / "source" / below
    source.mkdir(parents=True)
    (source / "ETTh1.csv").write_bytes(real.read_bytes())
    assert run(tmp_path, "--name", "ETTh1", data=tmp_path / "source")[-1] == "data: out/ETT-small/ETTh1.csv"
    assert (tmp_path / "out/ETT-small/ETTh1.csv").read_bytes() == real.read_bytes()
    again = run(tmp_path, "--name", "ETTh1")
    assert "is there, SHA-256 right" in again[0] and again[-1] == "data: out/ETT-small/ETTh1.csv"
    assert not is_synthetic(tmp_path / "out/ETT-small/ETTh1.csv")


def test_what_differs_from_the_public_file_is_not_taken_and_an_own_file_is_kept(tmp_path):
    (tmp_path / "ETTh1.csv").write_text("date,OT\n")
    lines = run(tmp_path, "--name", "ETTh1", data=tmp_path)
    assert "not used" in lines[0] and lines[-1].endswith("synthetic.csv")
    own = tmp_path / "out/ETT-small/ETTh1.csv"
    own.parent.mkdir(parents=True)
    own.write_text("date,x\n2020-01-01,1\n")
    lines = run(tmp_path, "--name", "ETTh1")
    assert "WARNING" in lines[0] and "another SHA-256" in lines[0] and lines[-1] == "data: out/ETT-small/ETTh1.csv"
    assert own.read_text() == "date,x\n2020-01-01,1\n"


def test_a_download_is_checked_and_whole(tmp_path, monkeypatch, capsys):
    served = tmp_path / "served.csv"
    monkeypatch.setattr(get_data, "ETT_URL", served.as_uri())
    monkeypatch.delenv("TIMELLM_DATA", raising=False)
    assert is_synthetic(get_data.get("ETTh1", tmp_path, offline=False)) and "no download" in capsys.readouterr().out
    served.write_bytes(b"served")
    assert is_synthetic(get_data.get("ETTh1", tmp_path, offline=False)) and "not used" in capsys.readouterr().out
    know(monkeypatch, "ETTh1", ETTh1=b"served")
    path = get_data.get("ETTh1", tmp_path, offline=False)
    assert path == tmp_path / "ETT-small/ETTh1.csv" and path.read_bytes() == b"served"
    assert [entry.name for entry in path.parent.iterdir()] == ["ETTh1.csv"]


def test_m4_comes_file_by_file_from_the_data_folder_then_from_the_public_one_until_one_is_missing(
    tmp_path, monkeypatch, capsys
):
    public, own = tmp_path / "public", tmp_path / "own" / "m4"
    for folder in (public / "Train", public / "Test", own):
        folder.mkdir(parents=True)
    (public / "Test" / "Hourly-test.csv").write_bytes(b"test")
    (public / "Train" / "Hourly-train.csv").write_bytes(b"train")
    (public / "Test" / "Daily-test.csv").write_bytes(b"daily")  # is not asked for any more
    (own / "Weekly-train.csv").write_bytes(b"weekly")
    know(monkeypatch, "m4", Hourly_test=b"test", Hourly_train=b"train", Weekly_train=b"weekly", Daily_test=b"daily")
    monkeypatch.setattr(get_data, "M4_URL", public.as_uri() + "/{part}/{file}")
    monkeypatch.setenv("TIMELLM_DATA", str(own.parent))
    folder = get_data.get("m4", tmp_path / "out", offline=False)
    names = ["Hourly-test.csv", "Hourly-train.csv", "Weekly-train.csv"]
    assert folder == tmp_path / "out/m4" and sorted(path.name for path in folder.iterdir()) == names
    printed = capsys.readouterr().out
    assert "Hourly; WARNING Weekly, Daily, Yearly, Quarterly, Monthly could not be had" in printed
    assert printed.count("no download") == 1
    (folder / "Hourly-train.csv").write_bytes(b"changed")
    get_data.get("m4", tmp_path / "out", offline=True)
    assert "Hourly-train.csv is there, WARNING: another SHA-256" in capsys.readouterr().out
