"""A hash of Python source that changes with what code does, not with its layout or the places of files."""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
from collections.abc import Iterator
from token import tok_name

PACKAGE = "dart_eval"
SILENT = ("ENCODING", "COMMENT", "NL", "ENDMARKER")  # tokens without meaning
PLAIN_TEXT = re.compile(r"[rRuU]?['\"]")  # begins a possible docstring: not bytes, not an f-string


def source_hash(source: str) -> str:
    """Return the sha256 of the tokens of Python source, or of text that is not complete source (half a call).

    Args:
        source: of a module or a part of one, such as a method with its indentation.
    """
    try:
        text = "\0".join(_significant(source))
    except (tokenize.TokenError, SyntaxError):
        text = source
    return sha256(text.encode())


def sha256(content: bytes) -> str:
    """Return the sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def _significant(source: str) -> list[str]:
    """Return tokens without comments, docstrings and line wraps; a block's begin and end by their names.

    Names imported from this package come last, sorted, without their modules.
    """
    tokens: list[str] = []
    imported: list[str] = []
    statement: list[str] = []
    defines, first = False, True  # the last statement begins a class or function; this is the first one of a body
    for kind, text in _tokens(source):
        if kind in ("INDENT", "DEDENT"):
            tokens.append(kind)
            first = defines and kind == "INDENT"
        elif kind != "NEWLINE":
            statement.append(text)
        else:
            if statement[:2] == ["from", PACKAGE]:
                names = " ".join(t for t in statement[statement.index("import") + 1 :] if t not in "()")
                imported += names.removesuffix(" ,").split(" , ")
            elif not (first and all(PLAIN_TEXT.match(t) for t in statement)):
                tokens += [*statement, kind]
            defines, first = _defines(statement), False
            statement = []
    return [*tokens, *sorted(imported)]


def _defines(statement: list[str]) -> bool:
    return statement[:1] in (["class"], ["def"]) or statement[:2] == ["async", "def"]


def _tokens(source: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of each token with a meaning.

    An f-string is one token. Since Python 3.12 it comes in pieces, and the hash must not change with Python's version.
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
    part = lines[begin[0] - 1 : end[0]]
    part[-1] = part[-1][: end[1]]
    part[0] = part[0][begin[1] :]
    return "".join(part)


def text_of(source: bytes) -> str:
    """Return the text of a Python file, in the encoding that it names."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    return io.TextIOWrapper(io.BytesIO(source), encoding).read()
