"""The one dialect of errors: what: got X, expected Y."""

import ast
from pathlib import Path

import pytest

from tests.realdata import ROOT

MODULES = sorted((ROOT / "data_provider").glob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_every_error_says_what_it_got_and_what_it_expected(module: Path) -> None:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Raise):
            continue
        raised = node.exc
        assert isinstance(raised, ast.Call), f"line {node.lineno}: an error without a message"
        if ast.unparse(raised.func) == "input_error":
            continue
        words = ast.unparse(raised.args[0])
        assert ": got " in words and ", expected " in words, f"line {node.lineno}: {words}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_no_message_says_what_is_needed(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert "InputError(" not in text and "needed" not in text
