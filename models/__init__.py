"""Models: one file a model, ``models/X.py`` with ``class Model``, chosen by ``--model X``."""

from pathlib import Path

MODELS = sorted(path.stem for path in Path(__file__).parent.glob("[A-Z]*.py"))
