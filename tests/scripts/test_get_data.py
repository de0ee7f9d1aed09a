"""Getting the data: each source in its turn, and never a silent substitute."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest

from data_provider import synthetic
from data_provider.synthetic import is_synthetic, write_synthetic
from data_provider.table import read_table
from tests.realdata import ROOT, real_data

SCRIPT = ROOT / "scripts" / "get_data.py"


@pytest.fixture(scope="module")
def get_data():
    spec = importlib.util.spec_from_file_location("get_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder, *arguments, data=None):
    """The script's printed lines, run from another folder."""
    environment = {key: value for key, value in os.environ.items() if key not in ("TIMELLM_DATA", "PYTHONPATH")}
    if data is not None:
        environment["TIMELLM_DATA"] = str(data)
    command = [sys.executable, str(SCRIPT), "--offline", "--out", "out", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_offline_writes_a_synthetic_series_and_says_so(tmp_path):
    lines = run(tmp_path, "--name", "ETTh1")
    assert lines[-1] == "data: out/synthetic/ETTh1-synthetic.csv"
    assert any("SYNTHETIC" in line and "NOTHING about ETTh1" in line for line in lines[:-1])
    path = tmp_path / "out/synthetic/ETTh1-synthetic.csv"
    table = read_table(path)
    assert table.values.shape == (17420, 7)
    assert table.columns == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    assert (table.dates == pd.date_range("2016-07-01", periods=17420, freq="h")).all()
    assert path.read_bytes() == write_synthetic("ETTh1", tmp_path / "again").read_bytes()
    assert not (tmp_path / "out/ETT-small").exists()


def test_all_four_names(tmp_path):
    lines = run(tmp_path)
    names = ("ETTh1", "ETTh2", "ETTm1", "ETTm2")
    assert lines[-4:] == [f"data: out/synthetic/{name}-synthetic.csv" for name in names]
    quarter = pd.read_csv(tmp_path / "out/synthetic/ETTm1-synthetic.csv")
    assert len(quarter) == 69680 and quarter["date"][1] == "2016-07-01 00:15:00"


def test_made_up_names_are_made_up_without_asking_anyone(tmp_path):
    lines = run(tmp_path, "--name", "rates", "drift")
    assert lines[-2:] == [f"data: out/synthetic/{name}-synthetic.csv" for name in ("rates", "drift")]
    rates, drift = (read_table(tmp_path / "out/synthetic" / f"{name}-synthetic.csv") for name in ("rates", "drift"))
    assert (
        rates.values.shape == (7588, 8)
        and (rates.values > 0).all()
        and str(rates.dates[1] - rates.dates[0]) == "1 days 00:00:00"
    )
    # wild days come in groups, and their direction says nothing of the next one's
    steps = np.diff(np.log(rates.values), axis=0)
    after = [[np.corrcoef(v[1:, n], v[:-1, n])[0, 1] for n in range(8)] for v in (steps, np.abs(steps))]
    assert np.abs(np.mean(after[0])) < 0.05 < 0.1 < np.mean(after[1])
    # a day of 24 rows, then of 27
    power = [np.abs(np.fft.rfft(part[:1944, 0])) for part in (drift.values, drift.values[8000:])]
    assert [round(1944 / (1 + spectrum[1:].argmax())) for spectrum in power] == [24, 27]


def test_wide_files_are_made_up_in_the_shape_of_the_familys(tmp_path, monkeypatch, get_data, capsys):
    assert synthetic.WIDE == {"ECL": (26304, 321), "Traffic": (17544, 862)}
    monkeypatch.setitem(synthetic.WIDE, "ECL", (400, 60))
    path = get_data.get("ECL", tmp_path, offline=True)
    assert path.name == "ECL-synthetic.csv" and "it is synthetic" in capsys.readouterr().out
    table = read_table(path)
    assert table.values.shape == (400, 60) and table.columns == [*map(str, range(59)), "OT"]
    assert str(table.dates[1] - table.dates[0]) == "0 days 01:00:00" and np.ptp(table.values, axis=0).min() > 0
    assert is_synthetic(path.rename(tmp_path / "electricity.csv"))  # by its first row, too


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


def test_a_changed_file_is_kept_and_reported(tmp_path):
    own = tmp_path / "out/ETT-small/ETTh1.csv"
    own.parent.mkdir(parents=True)
    own.write_text("date,x\n2020-01-01,1\n")
    lines = run(tmp_path, "--name", "ETTh1")
    assert "WARNING" in lines[0] and "another SHA-256" in lines[0] and lines[-1] == "data: out/ETT-small/ETTh1.csv"
    assert own.read_text() == "date,x\n2020-01-01,1\n"


def test_a_damaged_copy_in_the_data_folder_is_not_used(tmp_path):
    (tmp_path / "ETTh1.csv").write_text("date,OT\n")
    lines = run(tmp_path, "--name", "ETTh1", data=tmp_path)
    assert "not used" in lines[0] and lines[-1].endswith("synthetic.csv")


def test_download_is_checked(get_data, tmp_path, monkeypatch, capsys):
    served = tmp_path / "served.csv"
    served.write_bytes(b"not the data")
    monkeypatch.setattr(get_data, "URL", served.as_uri())
    monkeypatch.delenv("TIMELLM_DATA", raising=False)
    path = get_data.get("ETTh1", tmp_path, offline=False)
    assert is_synthetic(path) and "not used" in capsys.readouterr().out
    monkeypatch.setitem(get_data.SHA256, "ETTh1", get_data._checksum(b"not the data"))
    path = get_data.get("ETTh1", tmp_path, offline=False)
    assert path == tmp_path / "ETT-small/ETTh1.csv" and path.read_bytes() == b"not the data"
    assert [entry.name for entry in path.parent.iterdir()] == ["ETTh1.csv"]


def test_a_slow_or_closed_server_ends_in_time(get_data):
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]

    def trickle():
        connection, _ = server.accept()
        connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n")
        time.sleep(3)
        connection.close()

    threading.Thread(target=trickle, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(get_data.Unreachable, match="nothing within"):
        get_data.fetch(f"http://127.0.0.1:{port}/x", seconds=0.5)
    server.close()
    with pytest.raises(get_data.Unreachable, match="refused"):
        get_data.fetch(f"http://127.0.0.1:{port}/x", seconds=5)
    assert time.monotonic() - start < 2


def test_m4_comes_from_the_data_folder_file_by_file_with_its_checksums(get_data, tmp_path, monkeypatch, capsys):
    source = tmp_path / "source" / "m4"
    source.mkdir(parents=True)
    for part in ("train", "test"):
        name = f"Weekly-{part}.csv"
        (source / name).write_bytes(part.encode())
        monkeypatch.setitem(get_data.M4_SHA256, name, get_data._checksum(part.encode()))
        (source / f"Hourly-{part}.csv").write_bytes(b"damaged")
    monkeypatch.setenv("TIMELLM_DATA", str(tmp_path / "source"))
    folder = get_data.get("m4", tmp_path / "out", offline=True)
    assert folder == tmp_path / "out" / "m4" and sorted(path.name for path in folder.iterdir()) == [
        "Weekly-test.csv",
        "Weekly-train.csv",
    ]
    assert "Weekly; WARNING Yearly, Quarterly, Monthly, Daily, Hourly could not be had" in capsys.readouterr().out
    (folder / "Weekly-test.csv").write_bytes(b"changed")
    get_data.get("m4", tmp_path / "out", offline=True)
    assert "Weekly-test.csv is there, WARNING: another SHA-256" in capsys.readouterr().out


def test_m4_without_a_source_is_synthetic_and_says_so(tmp_path):
    lines = run(tmp_path, "--name", "m4")
    assert lines[-1] == "data: out/synthetic/m4" and "IS SYNTHETIC" in lines[-2] and "NOTHING about M4" in lines[-2]
    assert len(list((tmp_path / "out/synthetic/m4").glob("*-train.csv"))) == 6
    assert not (tmp_path / "out/m4").exists()


def test_m4_downloads_are_checked_and_the_first_failure_ends_them(get_data, tmp_path, monkeypatch, capsys):
    asked = []

    def fetch(url, seconds):
        asked.append(url)
        if len(asked) > 2:
            raise get_data.Unreachable("gone")
        return b"served"

    monkeypatch.delenv("TIMELLM_DATA", raising=False)
    monkeypatch.setattr(get_data, "fetch", fetch)
    for part in ("train", "test"):
        monkeypatch.setitem(get_data.M4_SHA256, f"Hourly-{part}.csv", get_data._checksum(b"served"))
    folder = get_data.get("m4", tmp_path, offline=False)
    assert [url.rsplit("Dataset", 1)[1] for url in asked] == [
        "/Test/Hourly-test.csv",
        "/Train/Hourly-train.csv",
        "/Test/Daily-test.csv",
    ]
    assert {path.name for path in folder.iterdir()} == {"Hourly-train.csv", "Hourly-test.csv"}
    asked.clear()
    monkeypatch.setitem(get_data.M4_SHA256, "Hourly-test.csv", "0" * 64)
    folder = get_data.get("m4", tmp_path / "other", offline=False)
    assert folder == tmp_path / "other/synthetic/m4" and len(asked) == 1
    assert "expected " + "0" * 64 + "; not used" in capsys.readouterr().out
