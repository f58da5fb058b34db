"""The list of mutants: small ways in which the numeric core could be broken, in the YAML files beside this module."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
KINDS = {
    "sign": "a sign, a comparison or a direction turned round",
    "off by one": "one too many, or one too few",
    "mask": "padding, other sequences or other neurons are not left out",
    "swap": "two matrices, orders or arguments exchanged",
    "precision": "a sum that is not kept in fp32",
    "axis": "the wrong dimension",
    "stale": "state that is kept where it must be made anew, or the reverse",
    "formula": "a factor, a term or a bound that is missing or wrong",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        what: what it breaks, a sentence. kind: a key of `KINDS`.
        file: relative to the repository. old, new: a text that stands in it once, and what takes its place.
        tests: files of tests about that module, which run first.
        survives: why no test can notice it; empty where one must.
    """

    what: str
    kind: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""

    def source(self) -> str:
        """The file with the change.

        Raises:
            ValueError: the text does not stand in it exactly once.
        """
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {found} times, not once: {self.old}")
        return text.replace(self.old, self.new)


def mutants() -> list[Mutant]:
    """All of them, file by file."""
    return [mutant for path in sorted(FOLDER.glob("*.yaml")) for mutant in _read(path)]


def _read(path: Path) -> Iterator[Mutant]:
    for part in yaml.safe_load(path.read_text(encoding="utf-8")):
        for entry in part["mutants"]:
            yield Mutant(file=part["file"], tests=tuple(f"tests/{name}" for name in part["tests"]), **entry)
