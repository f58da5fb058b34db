"""A hash of Python source: it changes with what code does, not with its layout, nor with the places of files."""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from token import tok_name

PACKAGE = "dart_eval"
SILENT = ("ENCODING", "COMMENT", "NL", "ENDMARKER")  # tokens that say nothing
PLAIN_TEXT = re.compile(r"[rRuU]?['\"]")  # begins a text that may be a docstring: not bytes, no f-string


def source_hash(source: str) -> str:
    """sha256 over the tokens of Python source; over the text where that is none, such as half a call around a lambda.

    Args:
        source: of a module or a part of one, such as a method with its indentation.
    """
    try:
        said = "\0".join(_said(source))
    except (tokenize.TokenError, SyntaxError):
        said = source
    return sha256(said.encode())


def sha256(content: bytes) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()


def _said(source: str) -> list[str]:
    """Tokens without comments, docstrings and what only wraps a line; a block's begin and end by their names.

    Names that are imported from this package come last, sorted, without the modules that have them.
    """
    kept: list[str] = []
    imported: list[str] = []
    statement: list[str] = []
    defines, first = False, True  # the last statement begins a class or function; this is the first one of a body
    for kind, text in _tokens(source):
        if kind in ("INDENT", "DEDENT"):
            kept.append(kind)
            first = defines and kind == "INDENT"
        elif kind != "NEWLINE":
            statement.append(text)
        else:
            if statement[:2] == ["from", PACKAGE]:
                names = " ".join(t for t in statement[statement.index("import") + 1 :] if t not in "()")
                imported += names.removesuffix(" ,").split(" , ")
            elif not (first and all(PLAIN_TEXT.match(t) for t in statement)):
                kept += [*statement, kind]
            defines, first = _defines(statement), False
            statement = []
    return [*kept, *sorted(imported)]


def _defines(statement: list[str]) -> bool:
    return statement[:1] in (["class"], ["def"]) or statement[:2] == ["async", "def"]


def _tokens(source: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of each token that says something.

    An f-string is one token. Since Python 3.12 it comes in pieces, and the hash must not move with Python's version.
    """
    lines = list(io.StringIO(source))
    open_texts, begin = 0, (0, 0)
    for token in tokenize.generate_tokens(iter(lines).__next__):
        kind = tok_name[token.type]
        if kind == "FSTRING_START":
            begin = begin if open_texts else token.start
            open_texts += 1
        elif kind == "FSTRING_END":
            open_texts -= 1
            if not open_texts:
                yield "STRING", _between(lines, begin, token.end)
        elif not open_texts and kind not in SILENT:
            yield kind, token.string


def _between(lines: list[str], begin: tuple[int, int], end: tuple[int, int]) -> str:
    found = lines[begin[0] - 1 : end[0]]
    found[-1] = found[-1][: end[1]]
    found[0] = found[0][begin[1] :]
    return "".join(found)


def text_of(file: Path) -> str:
    """The text of a Python file, in the encoding that it names."""
    with tokenize.open(file) as opened:
        return opened.read()
