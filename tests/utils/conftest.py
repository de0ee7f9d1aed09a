"""The command line of a small run, which the tests of a run's rooms share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_run import command_line


@pytest.fixture
def argv(backbones: dict[str, Path], tmp_path: Path) -> Callable[..., list[str]]:
    """`argv(**flags)`: the command line of a small run in this test's folder."""
    return lambda **flags: command_line(tmp_path, backbones["qwen2"], **flags)
