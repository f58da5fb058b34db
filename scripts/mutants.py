"""Break the code at random in a hundred small ways: do the tests notice?

    python -m scripts.mutants numbers                       # the numeric core, under the fast lane
    python -m scripts.mutants data --count 50 --least 96    # store, resume, statistics and session, and their own tests

mutmut makes the mutants and runs on each the tests that call the broken function, in a copy of the tree (`mutants/`).
A mutant of the words of an error or an event, or of `strict=`, which asserts, breaks nothing and is not drawn. Those
that no test noticed are printed as differences.
Exit status: 0; 1 (fewer were noticed than asked); 2 (wrong arguments).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import os
import random
import shutil
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # as `make test`: tiny products take four times as long in two threads

import libcst as cst
from mutmut import __main__ as mutmut
from mutmut import configuration
from mutmut.mutation.diff_apply import find_mutant, get_diff_for_mutant, read_functions_from_index

CORE = [
    "layers/*", "kernels/*", "pruning/methods/*", "results/stats.py", "results/sums.py",
    *(f"pruning/{name}.py" for name in ("rows", "counts", "cost", "calibration")),
    *(f"weights/{name}.py" for name in ("codes", "decoded", "k_quants", "rounding")),
    *(f"evaluation/{name}.py" for name in ("batching", "scoring", "rotary", "costs")),
]  # fmt: skip
KEPT = ["results/store.py", "results/stats.py", "pruning/session.py", "sweep/run.py"]
# Without what calls the code in other processes, which mutmut does not see, or takes a model, data or a browser.
KINDS = {
    "numbers": (CORE, ["-m", "fast"]),
    "data": (
        KEPT,
        [
            "-m",
            "not (ray or demo or data or browser or process)",
            "--ignore=tests/cli",
            "--ignore=tests/matrix/test_matrix.py",
        ],
    ),
}
COPIED = ("scripts", "tasks", "docs", "results", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")
NOTICED = {"killed", "timeout", "segfault"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--count", type=int, default=100, help="mutants (100)")
    parser.add_argument("--seed", type=int, default=60, help="which ones (60)")
    parser.add_argument("--least", type=float, default=90, help="percent that must be noticed (90)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    given = parser.parse_args()
    files, args = KINDS[given.kind]
    shutil.rmtree("mutants", ignore_errors=True)
    known = configuration.config()
    configuration._config = dataclasses.replace(
        known,
        only_mutate=[f"dart_eval/{file}" for file in files],
        track_dependencies=False,  # which takes minutes
        pytest_add_cli_args=args,
        also_copy=[*known.also_copy, *map(Path, COPIED)],
    )
    names = sample(given.count, given.seed, given.jobs)
    mutmut._run(names, given.jobs)
    found, _ = mutmut.collect_source_file_mutation_data(mutant_names=names)
    status = {name: mutmut.status_by_exit_code[code] for _, name, code in found}
    survived = sorted(name for name, said in status.items() if said not in NOTICED)
    for name in survived:
        print(f"\n{name}: {status[name]}\n{get_diff_for_mutant(name)}")
    noticed = len(status) - len(survived)
    print(f"\n{noticed} of {len(status)} mutants ({given.kind}, seed {given.seed}) were noticed")
    return int(100 * noticed < given.least * len(status))


def sample(count: int, seed: int, jobs: int) -> list[str]:
    """Names of mutants drawn from all that the files have."""
    Path("mutants").mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.create_mutants(jobs)
    made, _ = mutmut.collect_source_file_mutation_data(mutant_names=())
    names = sorted(name for _, name, _ in made)
    random.Random(seed).shuffle(names)
    return list(itertools.islice(filter(breaks, names), count))


def breaks(name: str) -> bool:
    """Whether a mutant differs in more than the words of errors and events, and `strict=`."""
    found = read_functions_from_index(name, find_mutant(name).path)
    assert found, name
    before, after = (ast.dump(Bare().visit(ast.parse(cst.Module([each]).code))) for each in found)
    return before != after


class Bare(ast.NodeTransformer):
    """Takes the words out of errors, what is told of a run, and `strict=` out of calls."""

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        return ast.Raise()

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        told = isinstance(node.value, ast.Call) and getattr(node.value.func, "attr", "") in ("tell", "debug")
        return ast.Pass() if told else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
        return self.generic_visit(node)


if __name__ == "__main__":
    raise SystemExit(main())
