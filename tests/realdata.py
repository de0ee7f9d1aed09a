"""Where tests find the measured data sets, which the project does not carry."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def real_data(name: str) -> Path:
    """The CSV `name` (ETTh1, …, weather); skips the test where it is not at hand."""
    folders = [ROOT.parent / "shared" / "data", ROOT / "dataset"]
    if os.environ.get("TIMELLM_DATA"):
        folders.insert(0, Path(os.environ["TIMELLM_DATA"]))
    for folder in folders:
        for below in (".", "ETT-small", name):
            path = folder / below / f"{name}.csv"
            if path.is_file():
                return path
    pytest.skip(f"{name}.csv is not at hand: set TIMELLM_DATA or run python scripts/get_data.py")
