"""Spelling: the token ids of statistics texts, for tokenizers that take numbers character by character.

Nearly all of a statistics text is digits, which a tokenizer looks up one by one, slowly. Where each character of a number
is a token of its own (Qwen2.5's tokenizer, SmolLM's), the ids of a text are those of its words, which are always the
same few, and one for each character of its numbers. The ids are those that the tokenizer gives.
"""

import re
from collections.abc import Callable
from itertools import product

# Python's floats and whole numbers, with the space before them; words never hold a digit.
NUMBER = re.compile(r"( ?-?\d[\d.e+-]*)")
DIGITS = "0123456789"
INNER = DIGITS + ".e-+"  # what may follow a number's first character
# What may follow a digit, with the digit after it: 12, 1.2, 1e-2, 1e+2.
NEIGHBOURS = [mark + digit for mark, digit in product(("", ".", "e-", "e+"), DIGITS)]

Encode = Callable[[list[str]], list[list[int]]]


class Spelling:
    """Ids of texts, put together from those of words and characters."""

    def __init__(self, encode: Encode, starts: dict[str, list[int]], inner: dict[str, int]):
        """Args:
        encode: the tokenizer's ids of texts.
        starts: of a number's first characters: "-", " -", and the space before a digit.
        inner: of the characters of INNER.
        """
        self._encode, self._starts, self._inner = encode, starts, inner
        self._words: dict[str, list[int]] = {}

    @classmethod
    def of(cls, encode: Encode, text: Callable[[str, str], str]) -> "Spelling | None":
        """The spelling of a tokenizer; None where numbers are not taken character by character.

        A byte-pair tokenizer joins characters pair by pair: where no two neighbours of a number join, none of it does.
        Every pair is tried, and every start and end of a number among the words around it.

        Args:
            encode: ids of texts, without special tokens.
            text: makes a text of the kind that is to be spelled, around a value and a lag.
        """
        signs, characters = encode(["-", " -", " "]), encode(list(INNER))
        if any(len(ids) != 1 for ids in characters):
            return None
        inner = {c: ids[0] for c, ids in zip(INNER, characters, strict=True)}
        spelling = cls(encode, dict(zip(("-", " -", " "), signs, strict=True)), inner)
        heads = [sign + digit for sign, digit in product(("", "-", " ", " -"), DIGITS)]
        pairs = [head + rest for head, rest in product(heads, NEIGHBOURS)]
        whole = [text(f"{sign}{a}.{b}", b + a) for sign, a, b in product(("", "-"), DIGITS, DIGITS)]
        same = encode(pairs) == [spelling._spell(pair) for pair in pairs] and encode(whole) == spelling(whole)
        return spelling if same else None

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        rows = []
        for text in texts:
            parts = NUMBER.split(text)  # words, number, words, ...
            row: list[int] = []
            for words, number in zip(parts[::2], parts[1::2] + [""], strict=True):
                row += self._known(words)
                row += self._spell(number)
            rows.append(row)
        return rows

    def _known(self, words: str) -> list[int]:
        """The ids of words, kept once they have come up."""
        if words not in self._words:
            self._words[words] = self._encode([words])[0] if words else []
        return self._words[words]

    def _spell(self, number: str) -> list[int]:
        """The ids of a number, character by character."""
        sign = number[: 2 if number.startswith(" -") else 1]
        if sign in self._starts:
            return self._starts[sign] + [self._inner[c] for c in number[len(sign) :]]
        return [self._inner[c] for c in number]
