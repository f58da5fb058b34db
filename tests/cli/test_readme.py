"""README and docs/start.md are run as printed: commands of `console` blocks as processes, the Python block.

Blocks marked `sh` need a network or a user's own files; their options are checked, not their results. `make demo` and
`make test` are run by .ci/run. The many commands of docs/start.md take a tiny model for the demo model: README's few
show that the demo model runs.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from dart_eval.models import demo_model
from dart_eval.sweep.options import config_from
from tests.helpers.commands import program

README = Path(__file__).resolve().parents[2] / "README.md"


START = README.parent / "docs" / "start.md"


def _blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


COMMANDS = [
    (page, line) for page in (README, START) for block in _blocks("console", page) for line in block.splitlines()
    if line.startswith("dart-eval ")
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for the commands of all pages; those of a page build on each other."""
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def small(tmp_path_factory, saved_llama):
    """The environment of commands for which a tiny model is the demo model."""
    cache = tmp_path_factory.mktemp("cache")
    shutil.copytree(saved_llama, cache / demo_model.place().name)
    return os.environ | {"DART_EVAL_CACHE": str(cache)}


def _run(line, folder, env=None):
    """Run a line as a shell would: it has nothing in it that a shell would take for more than words."""
    assert not re.search(r"[|&;<>()$`*?\[\]{}~!#\n]", line), line
    name, *words = shlex.split(line)
    assert name == "dart-eval"
    done = program(*words, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done


def test_the_readme_is_one_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 110


def test_the_readme_has_its_commands():
    assert _blocks("console")[0].splitlines() == ["make demo", "make test"]
    assert len(COMMANDS) >= 5


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_command(page, command, folder, small, demo_installed):
    place = folder / page.stem
    place.mkdir(exist_ok=True)
    done = _run(command, place, None if page == README else small)
    assert done.stdout.strip()
    assert not re.search("(?i)error|warning|traceback", done.stderr)  # progress and notes alone


@pytest.mark.process
@pytest.mark.slow
def test_a_second_run_skips_finished_cells(folder, demo_installed):
    folder /= "README"
    first = next(c for _, c in COMMANDS if c.startswith("dart-eval run"))
    cells = {p: p.read_bytes() for p in (folder / "out" / "cells").glob("*.json")}
    done = _run(first, folder)
    assert "5 of 5 cells are finished already" in done.stderr
    assert {p: p.read_bytes() for p in (folder / "out" / "cells").glob("*.json")} == cells


@pytest.mark.process
@pytest.mark.slow
def test_python_block(folder, demo_installed):
    (block,) = _blocks("python")
    (folder / "readme.py").write_text(block)
    done = program(script="readme.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "The history of the bicycle is" in done.stdout
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(
        0.7 * 19 / 20, abs=1e-3
    )  # the first of twenty tokens is the prefill's


def test_yaml_block(tmp_path):
    (block,) = _blocks("yaml", README.parent / "docs" / "options.md")
    (tmp_path / "run.yaml").write_text(block)
    config = config_from(tmp_path / "run.yaml", {"limit": 3})
    assert config.method == ("dense", "dart", "dart:remask=never")
    assert (config.sparsity, config.limit, config.model) == ((0.5, 0.6, 0.7), 3, "./my-model")


@pytest.mark.parametrize("command", [line for b in _blocks("sh") for line in b.strip().splitlines()])
def test_options_of_the_other_commands_exist(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    words = shlex.split(command)
    assert words[:2] == ["dart-eval", "run"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    values = {k.removeprefix("--").replace("-", "_"): int(v) if v.isdigit() else v for k, v in given.items()}
    config_from(None, values)


def test_the_board_of_the_readme_is_one_of_the_results():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.S | re.M)
    (shown,) = [block for language, block in blocks if not language]
    rows = [line.split() for line in shown.splitlines() if "±" in line]
    results = (README.parent / "results" / "board.md").read_text(encoding="utf-8")
    kept = [line.split() for line in results.splitlines()]
    assert len(rows) >= 4 and all(row in kept for row in rows)


def _anchors(page):
    """What a link may name behind `#`: the headings, as GitHub writes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_links_lead_somewhere():
    for page in (README, *DOCS):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            other = page.parent / target if target else page
            assert other.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(other), f"{page.name}: {target}#{anchor}"


def test_the_index_names_every_page():
    index = README.parent / "docs" / "README.md"
    assert "(docs/README.md)" in README.read_text(encoding="utf-8")
    for page in {*index.parent.glob("*.md")} - {index}:
        assert f"({page.name})" in index.read_text(encoding="utf-8"), page.name


def test_docs_name_modules_that_exist():
    text = (README.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = [README.parent / name for name in ("dart_eval", "tests", "scripts")]
    for name in set(re.findall(r"\b([a-z_]+\.py)\b", text)):
        assert any(any(folder.rglob(name)) for folder in folders), name


# -- the other pages ---------------------------------------------------------------------------------------------------

DOCS = [*sorted((README.parent / "docs").glob("*.md")), *sorted((README.parent / "results").rglob("*.md"))]


def _commands(text):
    """`dart-eval` lines of the `sh` blocks and of YAML workflows, continued lines joined."""
    found = []
    for block in re.findall(r"```(?:sh|yaml)\n(.*?)```", text, flags=re.S):
        joined = re.sub(r"\\?\n\s+(?=--)", " ", block)
        found += re.findall(r"(?:^|bin/)(dart-eval .*?)(?:  #.*)?$", joined, flags=re.M)
    return found


COMMANDS_OF_DOCS = [(p.name, c) for p in DOCS for c in _commands(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "command"), COMMANDS_OF_DOCS)
def test_commands_of_the_docs_have_their_options(page, command):
    import typer

    from dart_eval.cli import application

    found, words = typer.main.get_command(application()), shlex.split(command)[1:]
    while hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    if found.name == "lm-eval":  # whose parser knows its own
        from lm_eval._cli.harness import HarnessCLI

        HarnessCLI()._parser.parse_args(["run", *words])
        return
    known = {option for p in found.params for option in p.opts}
    assert {w for w in words if w.startswith("--")} <= known


def test_the_docs_have_commands():
    assert len(COMMANDS_OF_DOCS) >= 4


def test_the_paper_of_the_docs_is_understood(tmp_path):
    from dart_eval.sweep.paper import load

    (block,) = re.findall(
        r"```yaml\n(.*?)```", (README.parent / "docs" / "paper.md").read_text(encoding="utf-8"), flags=re.S
    )
    (tmp_path / "mine.yaml").write_text(block)
    spec = load(str(tmp_path / "mine.yaml"), config_from(None, {"method": "dense", "sparsity": "0"}))
    assert [sheet.name for sheet in spec.sheets] == ["accuracy", "texts"]


def test_the_regression_sweep_fits_its_baseline():
    from dart_eval.results.check import load_baseline

    root = README.parent
    config = config_from(root / "scripts" / "regression.yaml", {})
    cells = load_baseline(root / "results" / "regression-baseline.json")
    asked = {(c.inputs["task"], c.inputs["method"], c.inputs["sparsity"], c.inputs["limit"]) for c in cells}
    assert asked == {
        (task, method, 0.0 if method == "dense" else s, config.limit)
        for task in config.tasks for method in config.method for s in config.sparsity
    }  # fmt: skip
