"""A hash of the code that makes a cell's numbers. It changes with what code does, not with its layout.

It is taken over Python's tokens. Comments, docstrings, blank lines, the width of indentations and where a line inside
brackets breaks do not count. Nor do the names of files and folders, and the places from which code imports what is
this package's own. All else does: names, numbers, operators, texts (f-strings too), and what belongs to which block.
So does a trailing comma that a formatter adds, which changes a tuple elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from token import tok_name

PACKAGE = Path(__file__).parent
# Files and folders that `dart-eval run` executes and that have a say in a number. Left out is what hands on what it was
# given (plan, jobs, files, journal, record), what refuses (errors, finite, checkpoint), and what finds or converts a
# model, whose weights are hashed themselves. A test holds this against what a run executes.
NUMERIC_CODE = (
    "acts.py", "adapters.py", "allocation.py", "bits.py", "codes.py", "cost.py", "expert_forms.py", "expert_pool.py",
    "experts.py", "families.py", "ffn.py", "gguf.py", "gguf_codes.py", "grids.py", "k_quants.py", "models.py",
    "quantised.py", "rounding.py", "stored.py", "trial.py", "pruning", "evaluation", "executors/worker.py",
)  # fmt: skip
# Ways to decode faster with the same masks: `run` always multiplies by masks (`"execution": "masked"` in `plan.plan`).
NOT_RUN = (
    "pruning/permuted.py", "pruning/slices.py", "pruning/inplace.py", "pruning/gather.py", "pruning/kernels.py",
    "pruning/image_kernels.py", "pruning/previewed.py", "pruning/products.py",
)  # fmt: skip
SILENT = ("ENCODING", "COMMENT", "NL", "ENDMARKER")  # tokens that say nothing
PLAIN_TEXT = re.compile(r"[rRuU]?['\"]")  # begins a text that may be a docstring: not bytes, no f-string


@functools.cache  # a process runs the code that it has loaded, whatever becomes of the files
def code_hash(tasks: Path) -> str:
    """`hash_of` this package, read once a process.

    Args:
        tasks: the folder of the project's own tasks.
    """
    return hash_of(PACKAGE, tasks)


def hash_of(package: Path, tasks: Path) -> str:
    """sha256 over the tokens of the numeric code. A file that is moved or renamed does not change it.

    Args:
        package: the folder in which `NUMERIC_CODE` lies.
        tasks: the folder of tasks. Their YAML files count as they are.
    """
    files = [*numeric_files(package), *(f for f in tasks.rglob("*") if f.suffix in (".py", ".yaml"))]
    contents = [source_hash(_text(f)) if f.suffix == ".py" else _sha256(f.read_bytes()) for f in files]
    return _sha256("\n".join(sorted(contents)).encode())


def numeric_files(package: Path) -> list[Path]:
    """The files of `NUMERIC_CODE` that `run` executes, sorted.

    Args:
        package: the folder in which they lie.
    """
    found = {f for part in NUMERIC_CODE for f in [package / part, *(package / part).rglob("*.py")] if f.is_file()}
    return sorted(found - {package / name for name in NOT_RUN})


def source_hash(source: str) -> str:
    """sha256 over the tokens of Python source; over the text where that is none, such as half a call around a lambda.

    Args:
        source: of a module or a part of one, such as a method with its indentation.
    """
    try:
        said = "\0".join(_said(source))
    except (tokenize.TokenError, SyntaxError):
        said = source
    return _sha256(said.encode())


def _sha256(content: bytes) -> str:
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
            if statement[:2] == ["from", PACKAGE.name]:
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


def _text(file: Path) -> str:
    with tokenize.open(file) as opened:
        return opened.read()
