"""Foreign texts (names, notes, prompts) on their way to a terminal, a table, a CSV or an XML file."""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

Json = dict[str, Any]  # an object of JSON or YAML: inputs of a cell, a sample, settings of a checkpoint
# Names of a text's greatest length, as lm-eval ranks them.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

# Characters that act on a display instead of being visible: controls (C0, C1), marks of the writing direction,
# invisible letters, surrogates and noncharacters.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ufdd0-\ufdef\ud800-\udfff\U000e0000-\U000e0fff]"
)
_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"


def printable(text: str, lines: bool = False) -> str:
    """Return the text without characters that a terminal, a browser or an XML reader would act on.

    Tabs, line breaks and the like become spaces; other hidden characters become escapes (`\\x1b`, `\\u202e`).

    Args:
        lines: whether line feeds stay.
    """

    def escaped(match: re.Match[str]) -> str:
        c = match.group()
        if c in _SPACES:
            return c if lines and c == "\n" else " "
        return c.encode("unicode_escape").decode("ascii")

    return _HIDDEN.sub(escaped, text)


def counted(number: int, thing: str) -> str:
    """`1 cell`, `1,200 documents`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def bits_text(text: str) -> str:
    """Return a rounding in words: `4 bits`, `q4_k`. text: the user's spelling."""
    return f"{text} bits" if text[:1].isdigit() else text


def items_of(value: object) -> list[Any]:
    """A list that was given as one, as text with commas, as several such texts, or as a single value.

    Items are stripped, and empty texts dropped.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    pieces = (piece for item in values for piece in (item.split(",") if isinstance(item, str) else [item]))
    items = (piece.strip() if isinstance(piece, str) else piece for piece in pieces)
    return [item for item in items if not (isinstance(item, str) and item == "")]


def json_text(data: object, sort_keys: bool = False, allow_nan: bool = True) -> str:
    """Return readable JSON in UTF-8; hidden characters of its texts are escaped, so that nothing is lost."""
    text = json.dumps(data, ensure_ascii=False, indent=1, sort_keys=sort_keys, allow_nan=allow_nan)
    return _HIDDEN.sub(lambda c: c.group() if c.group() == "\n" else json.dumps(c.group())[1:-1], text)


def short_repr(value: object) -> str:
    """Return a short repr of any value, for messages."""
    try:
        return reprlib.repr(value)
    except Exception:  # integers of thousands of digits have no text
        return f"a value of kind {type(value).__name__}"
