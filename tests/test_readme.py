"""The README is run as printed: `console` blocks in a shell, the Python block, the YAML block.

Blocks marked `sh` need a network or a user's own files; their options are checked, not their results. `make demo` and
`make test` are run by .ci/run.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dart_eval.plan import config_from

README = Path(__file__).resolve().parent.parent / "README.md"


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


CONSOLE = [line.split("  #")[0].strip() for block in _blocks("console") for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in CONSOLE if line.startswith("dart-eval ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all commands, which build on each other."""
    return tmp_path_factory.mktemp("readme")


def _run(command, folder, code=0):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    return done


def test_the_readme_has_its_commands():
    assert CONSOLE[:2] == ["make demo", "make test"]
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder, demo):
    done = _run(command, folder)
    assert done.stdout.strip()
    assert not done.stderr.strip()  # quiet: nothing but results


def test_a_second_run_skips_finished_cells(folder, demo):
    first = next(c for c in COMMANDS if c.startswith("dart-eval run"))
    cells = {p: p.read_bytes() for p in (folder / "out" / "cells").glob("*.json")}
    done = _run(first, folder)
    assert "3 of 3 cells are finished already" in done.stdout
    assert {p: p.read_bytes() for p in (folder / "out" / "cells").glob("*.json")} == cells


def test_python_block(folder, demo):
    (block,) = _blocks("python")
    (folder / "readme.py").write_text(block)
    done = _run(f"{shlex.quote(sys.executable)} readme.py", folder)
    assert "The history of the bicycle is" in done.stdout
    effective, remasks, state = done.stdout.splitlines()[-1].split()
    assert float(effective) == pytest.approx(0.5 * 19 / 20)  # the first of twenty tokens comes from the prefill
    assert remasks == "[0]"
    assert int(state) > 1_000_000


def test_yaml_block(tmp_path):
    (block,) = _blocks("yaml")
    (tmp_path / "run.yaml").write_text(block)
    config = config_from(tmp_path / "run.yaml", {"limit": 3})
    assert config.method == ("dense", "griffin", "dart:allocation=uniform:detect=off")
    assert (config.sparsity, config.limit, config.model) == ((0.5, 0.7), 3, "./my-model")


@pytest.mark.parametrize("command", [line for b in _blocks("sh") for line in b.strip().splitlines()])
def test_options_of_the_other_commands_exist(command):
    words = shlex.split(command)
    assert words[:2] == ["dart-eval", "run"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    values = {k.removeprefix("--").replace("-", "_"): int(v) if v.isdigit() else v for k, v in given.items()}
    config_from(None, values)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target


def test_docs_name_modules_that_exist():
    text = (README.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = README.parent / "dart_eval"
    for name in set(re.findall(r"\b([a-z_]+\.py)\b", text)):
        assert list(package.rglob(name)) or (README.parent / "tests" / name).exists(), name
