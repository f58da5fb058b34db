"""Wrong input of every kind: one line with the cause, status 2, no traceback, nothing written."""

import datetime

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dart_eval
from dart_eval.pruning.registry import check_sparsity
from dart_eval.pruning.session import prune
from dart_eval.sweep.options import DEFAULTS, checked, config_from
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.models import tiny

LONG, DEEP = "x" * 300, "deep/" * 900 + "x"


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs a command that must fail where nothing stands, and returns its message."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*args):
        shown = command(*args)
        assert (shown.code, shown.out) == (2, ""), shown.err
        assert len(shown.err.splitlines()) == 1 and shown.err.startswith("error: "), shown.err
        assert "Traceback" not in shown.err and len(shown.err) < 6000
        assert list(folder.iterdir()) == []
        return shown.err.removeprefix("error: ").rstrip("\n")

    return run


# -- configuration files -------------------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
WORDS = {  # what a message names beside the option -> values that it refuses
    "number": [
        "sparsity: true", "sparsity: false", "sparsity: [0.5, [0.7]]", "sparsity: 2024-01-01", "sparsity: {a: 0.5}",
        "sparsity: 0.5:0.9:0.1",
    ],
    "outside [0, 1)": ["sparsity: .nan"],
    "string": [
        "tasks: [[arc, hellaswag]]", "tasks: {arc: 1}", "tasks: &a [*a]", "method: no",
        "method: [dense, ~]", "method: 2024-01-01", "output: [out]", "ray: [auto]", "method: {dart: {remask: never}}",
    ],
    "at least 1 character": ["model: ''", "output: ''"],
    "path": [
        f"output: {LONG}", f"output: {DEEP}", f"data-dir: {LONG}", f"calibration: {LONG}", f"model: {LONG}",
        'model: "a\\0b"', 'output: "a\\0b"',
    ],
    "share": ["limit: true", "limit: 2.5", "limit: [3]"],
    "4294967296": ["limit: " + "9" * 30, "limit: 0x" + "f" * 5000, "batch_size: 0x" + "f" * 5000],
    "greater than": ["limit: -" + "9" * 30],
    "integer": ["seed: 1.0", "batch_size: true", "batch_size: [8]", "gpus_per_cell: .inf"],
    "boolean": ["chat_template: 'yes'"],
    "given twice": ["chat_template: true\napply_chat_template: false"],
}  # fmt: skip
CONFIGS = {
    f"tasks: smoke\nmethod: 'dart:allocation=table:{LONG}'": "allocation table xxx",
    **{text: word for word, texts in WORDS.items() for text in texts},
    "tasks: arc\ntasks: hellaswag": "'tasks' is given twice in \"the file\", line 2",
    "1: 2": "unknown key '1'",
    "? [a, b]\n: c": "is not YAML",
    "2024-13-45: x": "is not YAML (month must be in 1..12)",
    "limit: 2024-13-45": "is not YAML (month must be in 1..12)",
    "limit: !!int ''": "is not YAML (string index out of range)",
    "limit: !!python/name:os.system x": "is not YAML (could not determine a constructor",
    "a: " + "[" * 5000: "is not YAML (maximum recursion depth exceeded",
    "a: b\n---\nc: d": "is not YAML",
    "tasks: \x07": "is not YAML",
    "": "must contain keys and values; for example `tasks: [arc, hellaswag]`",
    "- a": "must contain keys and values",
    BOMB: "unknown key 'a'",
    BOMB.replace("i: ", "tasks: "): "unknown key 'a'",
}


@pytest.mark.parametrize("text", list(CONFIGS), ids=range(len(CONFIGS)))
def test_a_configuration_with_a_wrong_value_is_refused_with_the_value(refused, tmp_path, text):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert CONFIGS[text] in refused("run", "--config", tmp_path / "run.yaml")


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
    | st.dates() | st.datetimes() | st.sampled_from([10**30, -1, 0, 0.5, "auto", "dart", "0.5,0.7", "", "a\0b", LONG])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6
)
KEYS = st.sampled_from([*DEFAULTS]) | st.text(max_size=4)


@pytest.mark.slow
@given(st.dictionaries(KEYS, VALUES, max_size=3))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_configuration_is_understood_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    file = folder / "any.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    try:
        config = config_from(file, {})
    except UserError as error:
        config, said = None, str(error)
    if config is None:
        assert "\n" not in said and len(said) < 2000
        return
    for key, default in DEFAULTS.items():
        value = getattr(config, key)
        assert value == default or type(value) in (str, int, float, bool, tuple)
    assert all(type(s) is float and 0 <= s < 1 for s in config.sparsity)
    assert config.output


@pytest.mark.parametrize(("text", "place"), [
    ("tables: [{name: n, title: t, methods: {a: [x, y]}, sparsity: 0.5, columns: {a: {task: x}}}]", "methods.a"),
    ("tables: [{name: n, title: t, methods: {a: dart}, sparsity: [x], columns: [a]}]", "tables.0.sparsity"),
    ("tables: [{name: n, title: t, methods: {a: dart}, sparsity: 0.5, columns: {a: 5}}]", "tables.0.columns.a"),
    ("tables: 5", "tables"), ("tables: [{}]", "tables.0"), ("tables: [[a]]", "tables.0"), ("claims: [5]", "tables"),
])  # fmt: skip
def test_a_paper_with_a_wrong_value_is_refused_with_its_place(refused, tmp_path, text, place):
    (tmp_path / "paper.yaml").write_text(text)
    message = refused("paper", tmp_path / "paper.yaml")
    assert "paper.yaml, " in message and place in message


# -- paths in every option -----------------------------------------------------------------------------------------

PLACES = {
    "run --config": ("run", "--config", "{}"),
    "run --output": ("run", "--tasks", "smoke_questions", "--output", "{}"),
    "run --data-dir": ("run", "--tasks", "smoke_questions", "--data-dir", "{}"),
    "run --model": ("run", "--tasks", "smoke_questions", "--model", "{}"),
    "run --calibration": ("run", "--tasks", "smoke_questions", "--calibration", "{}"),
    "run --method": ("run", "--tasks", "smoke_questions", "--method", "dart:allocation=table:{}"),
    "paper": ("paper", "{}"),
    "paper --output": ("paper", "smoke", "--output", "{}"),
    "tables": ("tables", "{}"),
    "tables --save": ("tables", "out", "--save", "{}"),
    "compare": ("compare", "{}", "out"),
    "compare --row": ("compare", "{}", "--row", "a,b"),
    "compare --save": ("compare", "a", "b", "--save", "{}"),
    "check": ("check", "{}", "--baseline", "none"),
    "check --baseline": ("check", "out", "--baseline", "{}"),
    "check --thresholds": ("check", "out", "--baseline", "none", "--thresholds", "{}"),
    "check --junit": ("check", "out", "--baseline", "none", "--junit", "{}"),
    "report": ("report", "{}"),
    "report --output": ("report", "out", "--output", "{}"),
    "trace --file": ("trace", "--file", "{}"),
    "trace --output": ("trace", "--output", "{}"),
    "trace --plot": ("trace", "--plot", "{}/a.png"),
    "trace --model": ("trace", "--model", "{}"),
    "bench decode --model": ("bench", "decode", "--model", "{}"),
    "bench decode --output": ("bench", "decode", "--shape", "llama-3.2-1b", "--layers", "1", "--output", "{}"),
}  # fmt: skip


@pytest.mark.parametrize("path", [LONG, DEEP, "loop", "file/below", ""],
                         ids=["long", "deep", "loop", "file", "empty"])  # fmt: skip
@pytest.mark.parametrize("place", list(PLACES))
def test_no_possible_path_is_refused_in_every_option(refused, tmp_path, place, path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "loop.png").symlink_to("loop.png")
    if path in ("loop", "file/below"):
        path = f"{tmp_path}/{path}"
    if place == "trace --plot":
        path = path or f"{tmp_path}/file"
    refused(*(word.format(path) for word in PLACES[place]))


# -- Python --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["0.5", None, True, [0.5], np.array([0.5]), torch.tensor([0.5]), 0.5j])
def test_prune_takes_a_number_as_sparsity(sparsity):
    with pytest.raises(UserError, match="is not a number"), prune(tiny("llama"), "griffin", sparsity=sparsity):
        pass


@pytest.mark.parametrize("sparsity", [0, 0.5, np.float32(0.5), np.int64(0)])
def test_every_real_number_is_one(sparsity):
    assert check_sparsity(sparsity) == sparsity


@pytest.mark.parametrize("options", [
    {"sparsity": "half"}, {"sparsity": True}, {"sparsity": [["0.5"]]}, {"tasks": [1]}, {"output": ""},
    {"limit": "three"},
    {"limit": datetime.date(2024, 1, 1)}, {"model": b"folder"}, {"method": object()},
])  # fmt: skip
def test_evaluate_refuses_in_one_line(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        dart_eval.evaluate(**{"tasks": ["smoke_questions"], **options})
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_are_numbers():
    limit, sparsity = checked("limit", np.int64(5)), checked("sparsity", np.array([0.5, 0.75]))
    assert (limit, type(limit), sparsity) == (5, int, (0.5, 0.75))
