"""The command line of a small run, which the tests of a run's rooms share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_run import command_line, write_csv

SHORT_ROWS = 200  # 140 train, 20 validation, 40 test


@pytest.fixture
def argv(backbones: dict[str, Path], tmp_path: Path) -> Callable[..., list[str]]:
    """`argv(**flags)`: the command line of a small run in this test's folder."""
    return lambda **flags: command_line(tmp_path, backbones["qwen2"], **flags)


@pytest.fixture
def small(argv, tmp_path: Path):
    """`small(**flags)`: as `argv`, on a shorter file, without pictures and copies."""
    write_csv(tmp_path / "series.csv", SHORT_ROWS)
    return lambda **flags: argv(**{"plots": 0, "torch_checkpoint": 0, "save_predictions": 0} | flags)
