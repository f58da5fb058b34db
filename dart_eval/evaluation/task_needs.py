"""Further packages of some lm-eval tasks, and data of NLTK.

Checked before a task's own code is imported, so that one line names what to install. Imports neither lm-eval nor torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from dart_eval.util.errors import UserError

# A folder of tasks -> the modules that its Python code imports. All of them are in the extra [tasks].
MODULES: dict[str, tuple[str, ...]] = {
    "ifeval": ("langdetect", "immutabledict", "nltk"),
    "ruler": ("wonderwords", "nltk"),
    "longbench": ("jieba", "fuzzywuzzy", "rouge"),
    "minerva_math": ("sympy", "math_verify", "antlr4"),
    "leaderboard/math": ("sympy", "math_verify", "antlr4"),
}
EXTRA = {module for modules in MODULES.values() for module in modules}
# Tasks that cut texts into sentences or words by NLTK's data; in the folder of RULER some do not.
SENTENCES = ("ifeval", "leaderboard_ifeval", "ruler", "niah_single_2", "niah_single_3", "niah_multi")
NO_SENTENCES = ("niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa")
PUNKT = "punkt_tab"


def check_needs(task: str, path: str) -> None:
    """Refuse a task whose code could not be imported, or would fail after all answers.

    Args:
        task: its name, or that of a group.
        path: of its YAML file.

    Raises:
        UserError: with the package or the data that is missing, and what to do.
    """
    folder = Path(path).parent
    for module in MODULES.get(folder.name) or MODULES.get(f"{folder.parent.name}/{folder.name}", ()):
        if find_spec(module) is None:
            raise missing(task, module)
    if task.startswith(SENTENCES) and not task.startswith(NO_SENTENCES):
        _check_punkt(task)


def missing(task: str, module: str) -> UserError:
    """Return the error for a module that is not installed."""
    remedy = "pip install 'dart-eval[tasks]'" if module in EXTRA else f"pip install {module}"
    return UserError(f"task {task} needs the package {module}", remedy)


def _check_punkt(task: str) -> None:
    """Download NLTK's data for sentences if it is missing. See `check_needs`."""
    import nltk

    try:
        nltk.data.find(f"tokenizers/{PUNKT}")
    except LookupError:
        if not nltk.download(PUNKT, quiet=True, raise_on_error=False):
            raise UserError(
                f"task {task} needs NLTK's data {PUNKT}, which could not be downloaded",
                f"run python -m nltk.downloader {PUNKT} with a network; NLTK_DATA names its folder",
            ) from None
