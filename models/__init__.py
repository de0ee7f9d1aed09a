"""Models: one file a model, ``models/X.py`` with ``class Model``, chosen by ``--model X``."""

import importlib
from pathlib import Path
from typing import Any

MODELS = sorted(path.stem for path in Path(__file__).parent.glob("[A-Z]*.py"))


def model_class(name: str) -> Any:
    """The class of `--model` `name`; its file is imported only now, and with it torch."""
    return importlib.import_module(f"models.{name}").Model
