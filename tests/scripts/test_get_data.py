"""Getting the data: each source in its turn, and never a silent substitute."""

import hashlib
import os
import subprocess
import sys

import pandas as pd

from data_provider.synthetic import is_synthetic, write_synthetic
from data_provider.table import read_table
from scripts import get_data
from tests.realdata import ROOT


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
    assert "m4: WARNING Weekly, Daily, Yearly, Quarterly, Monthly could not be had" in printed
    assert printed.count("no download") == 1
    (folder / "Hourly-train.csv").write_bytes(b"changed")
    get_data.get("m4", tmp_path / "out", offline=True)
    assert "Hourly-train.csv is there, WARNING: another SHA-256" in capsys.readouterr().out
