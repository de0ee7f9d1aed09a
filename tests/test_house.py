"""The house: which room may import which, what stands in one place alone, and what every flag's role makes of it."""

import ast
from pathlib import Path

from tests.realdata import ROOT
from utils import flags
from utils.flags import FLAGS

# A room imports those below it and its own.
ROOMS = ["run_pretrain", "run_main", "utils", "models", "data_provider", "layers"]
# Within utils: what is above imports what is below.
FLOORS = [
    "utils.study.pictures", "utils.study.table", "utils.study.queue", "utils.study.slurm", "utils.study.statistics",
    "utils.study.cells", "utils.study.grid", "utils.study.devices",
    "utils.run", "utils.forecaster", "utils.setup", "utils.begin",
    "utils.results.past", "utils.results.forecast_files",
    "utils.results.inside", "utils.results.ensemble", "utils.results.plots", "utils.results.forecast",
    "utils.training.train", "utils.results.calibration", "utils.results.m4_pass", "utils.results.test_pass",
    "utils.results.comparison", "utils.results.m4_scores", "utils.results.baselines", "utils.training.evaluate",
    "utils.training.losses", "utils.training.trial", "utils.training.memory",
    "utils.training.session", "utils.training.reduction", "utils.training.step", "utils.training.precision",
    "utils.results.journal",
    "utils.results.predictions", "utils.results.interval_metrics", "utils.results.metrics", "utils.results.log",
    "utils.training.optimizer", "utils.saving.folder", "utils.validate", "utils.saving.saver", "utils.saving.checkpoint",
    "utils.intervals", "utils.saving.state", "utils.saving.shares", "utils.saving.asks",
    "utils.flags", "utils.processes.group", "utils.processes.watch", "utils.saving.interrupt",
    "utils.flags",
    "utils.saving.record", "utils.saving.tensors", "utils.saving.array_file", "utils.saving.files",
    "utils.errors",
]  # fmt: skip
NAMES = {flag.name for flag in FLAGS}


def program() -> dict[str, ast.Module]:
    """Module name -> its syntax tree, for all of the program that is no script."""
    files = [
        ROOT / "run_pretrain.py",
        ROOT / "run_main.py",
        *(file for room in ROOMS[2:] for file in (ROOT / room).rglob("*.py")),
    ]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): ast.parse(file.read_text("utf-8")) for name, file in modules.items()}


PROGRAM = program()


def imports(tree: ast.Module) -> set[str]:
    """The modules that a tree imports, at any depth; `from utils import checks` counts as utils.checks."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in PROGRAM else node.module for a in node.names}
    return found


def test_imports_run_downward() -> None:
    for name, tree in PROGRAM.items():
        room = ROOMS.index(name.split(".")[0])
        for imported in imports(tree):
            other = imported.split(".")[0]
            assert other not in ROOMS or ROOMS.index(other) >= room, f"{name} imports {imported}"


def test_imports_run_downward_within_utils() -> None:
    assert {
        n
        for n in PROGRAM
        if n.startswith("utils.") and n.split(".")[-1] not in ("training", "saving", "results", "study", "processes")
    } == set(FLOORS)
    for name in FLOORS:
        above = {m for m in imports(PROGRAM[name]) if m in FLOORS and FLOORS.index(m) <= FLOORS.index(name)}
        assert not above, f"{name} imports {above}"


def test_the_fast_path_is_imported_where_it_is_chosen_alone() -> None:
    users = {
        name
        for name, tree in PROGRAM.items()
        if not name.startswith("layers.fast") and any(m.startswith("layers.fast") for m in imports(tree))
    }
    assert users == {"models.TimeLLM"}


def test_one_helper_makes_the_messages() -> None:
    for name, tree in PROGRAM.items():
        makes = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError"
        ]
        assert not makes or name == "layers.errors", f"{name}, line {makes[0].lineno if makes else 0}"
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not any(words in node.value for words in ("needed is", "is needed", "needed are", ", need ")), name


def collections(tree: ast.Module):
    """Literals that are nothing but text: lists, tuples, sets, and the keys of dicts."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            parts, least = node.elts, 2
        elif isinstance(node, ast.Dict):
            parts, least = [key for key in node.keys if key is not None], 3
        else:
            continue
        words = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        if len(words) == len(parts) >= least:
            yield node, set(words)


def test_no_other_module_holds_a_collection_of_flag_names() -> None:
    trees = PROGRAM | {file.stem: ast.parse(file.read_text("utf-8")) for file in (ROOT / "scripts").glob("*.py")}
    for name, tree in trees.items():
        for node, words in collections(tree):
            assert name == "utils.flags" or not words <= NAMES, f"{name}, line {node.lineno}: {words}"


def test_modules_say_what_is_inside_and_fit_a_head() -> None:
    modules = [ROOT / (name.replace(".", "/") + ".py") for name in PROGRAM]
    scripts = list((ROOT / "scripts").rglob("*.py"))
    assert len(scripts) > 10
    for file in [file for file in modules if file.is_file()] + scripts:
        text = file.read_text("utf-8")
        assert ast.get_docstring(ast.parse(text)), file
        assert len(text.splitlines()) <= 400, file


def test_root_is_the_repository() -> None:
    assert (ROOT / "run_main.py").is_file() and Path(flags.__file__).is_relative_to(ROOT)
