"""Mutants of the numeric core: small ways in which it could be broken, made by operators on its syntax tree.

Nothing of the code is listed here but its folders, so that a refactoring edits nothing. There are some two thousand; a
hundred of them, the first by a hash of function and change, are those that `make mutations` runs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE = (
    "pruning/masks/*.py", "pruning/choices/*.py", "pruning/inputs/*.py", "pruning/experts/*.py", "pruning/cost.py",
    "pruning/session/layer.py", "pruning/session/state.py", "pruning/session/log.py", "layers/ffn.py",
    "layers/shape.py", "kernels/top.py", "weights/grids.py", "weights/rounding.py", "evaluation/batching.py",
    "evaluation/costs.py", "evaluation/distance.py", "evaluation/logits.py", "evaluation/scopes.py",
    "evaluation/scoring.py", "results/estimates.py", "results/pairing.py", "results/ratio.py", "results/stats.py",
)  # fmt: skip
RUN = 100  # of them
# No test can notice these: function and change -> why.
EQUIVALENT: dict[str, str] = {
    "_least: x.device.type == \"cpu\" and x.dtype in (torch.float32, tor... -> (x.device.type == \"cpu\")":
        "another way to the same number, which is only faster",
    "DriftDetector.observe: self.prompt_sum[row : row + 1] / size -> (self.prompt_sum[row : row + 1])":
        "a cosine does not depend on the length of a window's mean",
    "Layer._best: sums.mean(0, keepdim=True) -> sums.sum(0, keepdim=True)":
        "a mask depends on the order of scores alone",
    "tango.solve: end + (estimate - end) * 1e-12 -> (end - (estimate - end) * 1e-12)":
        "beyond the end the score is as large, and the root lies inside",
    "share_of_inputs: f.size * f.width -> (f.size)":
        "all FFNs of a model have its width",
}  # fmt: skip
KINDS = {
    "sign": "a sum for a difference, a comparison turned round",
    "off by one": "one too many, or one too few",
    "mask": "what is to be left out is not, or the other way round",
    "formula": "a factor, a root or a square that is missing",
    "swap": "the least for the largest, any for all, a mean for a sum",
    "stale": "state that is not set anew",
    "branch": "the other branch",
}
TURNED = {ast.Lt: ">", ast.Gt: "<", ast.LtE: ">", ast.GtE: "<", ast.Eq: "!=", ast.NotEq: "=="}
EXCHANGED = {"min": "max", "max": "min", "any": "all", "all": "any", "mean": "sum", "amin": "amax", "amax": "amin"}
DROPPED = {"square", "sqrt", "abs", "cumsum", "flip", "half"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: relative to the repository. line: where. within: the function.
        kind: a key of `KINDS`. old, new: the text that stands there, and what takes its place. start: where, in bytes.
    """

    file: str
    line: int
    within: str
    kind: str
    old: str
    new: str
    start: int

    @property
    def what(self) -> str:
        """What it does, in a line."""
        return f"{self.within}: {_short(self.old)} -> {_short(self.new)}"

    @property
    def survives(self) -> str:
        """Why no test can notice it; empty where one must."""
        return EQUIVALENT.get(self.what, "")

    @property
    def order(self) -> str:
        """A hash of function and change, which no other code changes."""
        return hashlib.sha256(self.what.encode()).hexdigest()

    def source(self) -> str:
        """The file with the change."""
        text, old = (ROOT / self.file).read_bytes(), self.old.encode()
        assert text[self.start : self.start + len(old)] == old
        return (text[: self.start] + self.new.encode() + text[self.start + len(old) :]).decode()

    @property
    def tests(self) -> tuple[str, ...]:
        """The files of tests that import the module: these run first."""
        module = self.file.removesuffix(".py").replace("/", ".")
        return tuple(test for test, imported in _imports().items() if module in imported)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


@functools.cache
def _imports() -> dict[str, frozenset[str]]:
    """Of each file of fast tests, the modules that it imports."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        found[path.relative_to(ROOT).as_posix()] = frozenset(names)
    return found


def mutants(every: bool = False) -> list[Mutant]:
    """Those that are run, or all of them, file by file."""
    files = sorted({path for pattern in CORE for path in (ROOT / "dart_eval").glob(pattern)})
    found = [mutant for path in files for mutant in _of_file(path)]
    chosen = {mutant.order for mutant in sorted(found, key=lambda m: m.order)[:RUN]}
    return [mutant for mutant in found if every or mutant.order in chosen]


def _of_file(path: Path) -> Iterator[Mutant]:
    text = path.read_bytes()
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        start = lines[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        return start, lines[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def code(node: ast.AST) -> str:
        start, end = span(node)
        return text[start:end].decode()

    for within, node in _nodes(ast.parse(text)):
        for kind, new in _changes(node, within, code):
            start, end = span(node)
            old = text[start:end].decode()
            yield Mutant(path.relative_to(ROOT).as_posix(), node.lineno, within, kind, old, new, start)  # type: ignore[attr-defined]


def _nodes(node: ast.AST, within: str = "", inside: bool = False) -> Iterator[tuple[str, ast.AST]]:
    """What functions compute: no defaults, hints, assertions, errors and their texts.

    Args:
        within: the function or class that the node stands in. inside: it is a function.
    """
    if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
        name = f"{within}.{getattr(node, 'name', '')}".strip(".")
        for statement in node.body:
            yield from _nodes(statement, name, isinstance(node, ast.FunctionDef))
        return
    skipped = isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)) or _is_error(node)
    if not inside or skipped or within.endswith(("__repr__", ".files", ".title")):
        return
    yield within, node
    for name, child in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for one in child if isinstance(child, list) else [child]:
                if isinstance(one, ast.AST):
                    yield from _nodes(one, within, inside)


def _is_error(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("UserError", "warn")


def _changes(node: ast.AST, within: str, code: Callable[[ast.AST], str]) -> Iterator[tuple[str, str]]:
    """The kinds of changes of a node, and what takes its place."""
    text = code(node) if hasattr(node, "lineno") else ""
    if ":=" in text and not isinstance(node, ast.Compare):
        return
    match node:
        case ast.UnaryOp(op=ast.Invert() | ast.Not()):
            yield "mask", f"({code(node.operand)})"
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            yield "mask", f"({code(node.left)})"
        case ast.BinOp(op=ast.Add() | ast.Sub(), right=ast.Constant(value=1)):
            yield "off by one", f"({code(node.left)})"
        case ast.BinOp(op=ast.Add(), left=left, right=right) if not _is_sequence(left) and not _is_sequence(right):
            yield "sign", f"({code(left)} - {code(right)})"
        case ast.BinOp(op=ast.Sub(), left=left, right=right):
            yield "sign", f"({code(left)} + {code(right)})"
        case ast.BinOp(op=ast.Mult() | ast.Div(), left=left) if not _is_sequence(left):
            yield "formula", f"({code(left)})"
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in TURNED:
            yield "sign", f"{code(left)} {TURNED[type(op)]} {code(right)}"
        case ast.Call(func=ast.Name(id=name)) if name in EXCHANGED:
            yield "swap", EXCHANGED[name] + text[len(name) :]
        case ast.Call(func=ast.Attribute(attr=name) as func) if name in EXCHANGED:
            end = len(code(func))
            yield "swap", text[: end - len(name)] + EXCHANGED[name] + text[end:]
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in DROPPED:
            yield "formula", f"({code(value)})"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign() if "__init__" not in within:
            yield "stale", "pass"
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield "branch", f"({code(orelse)} if {code(test)} else {code(body)})"
        case ast.BoolOp(op=op, values=[left, *_]):
            yield "branch", f"({code(left)})"


def _is_sequence(node: ast.AST) -> bool:
    return isinstance(node, (ast.List, ast.Tuple, ast.ListComp, ast.JoinedStr)) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
