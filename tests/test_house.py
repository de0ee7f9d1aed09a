"""The house: imports run downward, the fast path is chosen in one place, and one function makes the errors."""

import ast

from tests.realdata import ROOT

# A room imports its own files and those of the rooms after it.
ROOMS = ["scripts", "run_pretrain", "run_m4", "run_main", "utils", "models", "data_provider", "layers"]
FILES = [*ROOT.glob("run_*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
PROGRAM = {".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text("utf-8")) for file in FILES}
IMPORTS = {
    name: {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    | {f"{node.module}.{alias.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    for name, tree in PROGRAM.items()
}


def test_imports_run_downward() -> None:
    assert {name.split(".")[0] for name in PROGRAM} == set(ROOMS) and len(PROGRAM) > 60
    for name, imported in IMPORTS.items():
        rooms = {module.split(".")[0] for module in imported}
        assert not rooms & set(ROOMS[: ROOMS.index(name.split(".")[0])]), f"{name} imports {rooms}"
        assert "argparse" not in rooms or not name.startswith("layers."), f"{name} knows the command line"


def test_the_fast_path_is_imported_where_it_is_chosen() -> None:
    users = {name for name, imported in IMPORTS.items() if any(module.startswith("layers.fast") for module in imported)}
    assert {name for name in users if not name.startswith(("layers.", "scripts."))} == {"models.TimeLLM"}


def test_one_function_makes_the_errors() -> None:
    for name, tree in PROGRAM.items():
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert name == "layers.errors" or not any(getattr(call, "id", "") == "InputError" for call in calls), name


def test_every_module_says_what_it_holds() -> None:
    for name, tree in PROGRAM.items():
        assert not tree.body or ast.get_docstring(tree), f"{name} has no docstring"
