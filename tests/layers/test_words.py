"""What things are called in layers/ and models/: the field's words, and no flag."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FILES = [file.relative_to(REPO) for folder in ("layers", "models") for file in sorted((REPO / folder).rglob("*.py"))]
OLD_WORDS = {
    "Matrix": "FrozenWeight",
    "give_matrices": "prepack_weights",
    "make_lean": "make_twin",
    "_turn": "apply_rotary",
    "describe": "dataset_description",
}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_words_of_the_field(file: Path) -> None:
    text = (REPO / file).read_text(encoding="utf-8")
    for old, new in OLD_WORDS.items():
        assert not re.search(rf"\b(def|class) {old}\b|\b{old}\(", text), f"{old} is called {new}"


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] == "layers"], ids=str)
def test_layers_take_typed_parameters_and_no_namespace(file: Path) -> None:
    assert not re.search(r"\bargparse\b|\bNamespace\b|\bconfigs\b|\bargs\.", (REPO / file).read_text(encoding="utf-8"))
