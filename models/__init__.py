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
    """`uses_llm` and the other switches that `models.forecaster.Forecaster` names, of `--model` `name`.

    Torch takes seconds to load: before it is, they are read off the text of the model's file. Of a class that takes
    them from elsewhere than from Forecaster alone, the text does not tell, and it is imported.
    """
    own = None if "torch" in sys.modules else _class_of(FOLDER / f"{name}.py", "Model")
    if own is None or [ast.unparse(base) for base in own.bases] != ["Forecaster"]:
        return model_class(name)
    base = _class_of(FOLDER / "forecaster.py", "Forecaster")
    assert base is not None
    return Namespace(**_switches(base) | _switches(own))


def _class_of(file: Path, name: str) -> ast.ClassDef | None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _switches(tree: ast.ClassDef) -> dict[str, bool]:
    """The attributes of a class that are True or False."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
