"""Models: one file a model, ``models/X.py`` with ``class Model``, chosen by ``--model X``."""

import ast
import importlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MODELS = sorted(path.stem for path in FOLDER.glob("[A-Z]*.py"))


def model_class(name: str) -> Any:
    """The class of `--model` `name`; its file is imported only now, and with it torch."""
    return importlib.import_module(f"models.{name}").Model


def traits(name: str) -> Any:
    """`uses_llm` and the other switches that `models.base.ForecastModel` has, of `--model` `name`.

    Torch takes seconds to load: before it is, they are read off the text of the model's file. Where the text does not tell,
    for the class is another model's child or computes a switch, it is imported.
    """
    read = None if "torch" in sys.modules else _read_switches(FOLDER / f"{name}.py")
    return model_class(name) if read is None else Namespace(**read)


def _read_switches(file: Path) -> dict[str, bool] | None:
    """The switches of the `Model` in a file; None where its text does not tell."""
    base, own = _class_in(FOLDER / "forecaster.py", "ForecastModel"), _class_in(file, "Model")
    if base is None or own is None or [ast.unparse(parent) for parent in own.bases] != [base.name]:
        return None
    defaults = {name: value for name, value in _attributes(base).items() if isinstance(value, bool)}
    found = {name: _attributes(own).get(name, value) for name, value in defaults.items()}
    return found if all(isinstance(value, bool) for value in found.values()) else None


def _class_in(file: Path, name: str) -> ast.ClassDef | None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _attributes(tree: ast.ClassDef) -> dict[str, Any]:
    """What a class's own lines set: name -> constant, or the tree of what is computed."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            value = node.value.value if isinstance(node.value, ast.Constant) and node in tree.body else node.value
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return found
