"""Values of a run's options as users and lm-eval's users give them: what each means, and where it counts."""

import pytest
import typer
from transformers import LlamaConfig

from dart_eval.cli import application, run
from dart_eval.evaluation import evaluate
from dart_eval.evaluation.documents import number_asked
from dart_eval.evaluation.task_hash import task_hash
from dart_eval.evaluation.tasks import Tasks
from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.pruning.registry import make, parse
from dart_eval.sweep.options import DEFAULTS, RunConfig, checked, config_from, configs_from
from dart_eval.sweep.plan import plan
from dart_eval.util.bits import rounding_at
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.tasks import write_task


def cell(**given):
    config = config_from(None, {"tasks": "arc_easy", "method": "dense", **given})
    model = Resolved(ModelSpec(), "", Identity("tiny", None, "f00d"), "float32", config=LlamaConfig())
    (made,) = plan(config, model, {"arc_easy": "h"}, "cpu")
    return made


# -- from a file, from the command line, under lm-eval's names ---------------------------------------------------------


@pytest.mark.parametrize(("file", "typed", "meant"), [
    (None, {}, {}),
    ("tasks: [arc]\nchunk: null\nseed: null\noutput:\n", {}, {"tasks": ("arc",)}),
    ("limit: 7\nbatch_size: 3\ntasks: [arc, hellaswag]\nsparsity: [0.3, 0.6]", {"limit": 20, "seed": None,
     "sparsity": "0.9"}, {"limit": 20, "batch_size": 3, "tasks": ("arc", "hellaswag"), "sparsity": (0.9,)}),
    ("force: true", {"force": False}, {}),
    ("num-fewshot: 5", {}, {"num_fewshot": 5}),
    ("sparsity: 0.7\ntasks: arc\nmethod: dart", {}, {"sparsity": (0.7,), "tasks": ("arc",), "method": ("dart",)}),
    ("output_path: a", {"output": "b"}, {"output": "b"}),
    ("model_args: pretrained=a", {"model": "b"}, {"model": "b"}),
    ("apply_chat_template: true", {"chat_template": False}, {}),
    (None, {"tasks": "arc, hellaswag,", "sparsity": "0.5, 0.7,0"}, {"tasks": ("arc", "hellaswag"),
     "sparsity": (0.5, 0.7, 0.0)}),
    (None, {"method": "dense,dart:remask.window=8:allocation=uniform"},
     {"method": ("dense", "dart:remask.window=8:allocation=uniform")}),
    (None, {"model_args": "pretrained=org/m,revision=v1,dtype=bfloat16"},
     {"model": "org/m", "revision": "v1", "dtype": "bfloat16"}),
    (None, {"model_args": "pretrained=m,enable_thinking=False,think_end_token=</think>", "apply_chat_template": True},
     {"model": "m", "enable_thinking": False, "think_end_token": "</think>", "chat_template": True}),
    (None, {"model": "hf", "model_args": {"pretrained": "org/m", "trust_remote_code": True, "max_length": 512}},
     {"model": "org/m", "trust_remote_code": True, "max_length": 512}),
    (None, {"model_args": '{"pretrained": "m", "revision": 1, "attn_implementation": "eager"}'},
     {"model": "m", "revision": "1", "attn_implementation": "eager"}),
    (None, {"dtype": "bf16", "seed": "7"}, {"dtype": "bfloat16", "seed": 7}),
    (None, {"dtype": "half"}, {"dtype": "float16"}),
    (None, {"apply_chat_template": True, "output_path": "there"}, {"chat_template": True, "output": "there"}),
])  # fmt: skip
def test_the_command_line_goes_before_the_file_and_the_file_before_defaults(tmp_path, file, typed, meant):
    (tmp_path / "run.yaml").write_text(file or "")
    assert config_from(file and tmp_path / "run.yaml", typed) == RunConfig(**meant)


def test_values_of_an_option_that_is_given_again_add_up(tmp_path, monkeypatch):
    ran, empty = [], tmp_path / "empty"  # `.` and `..` are looked through for tasks
    empty.joinpath("inner").mkdir(parents=True)
    monkeypatch.chdir(empty / "inner")
    monkeypatch.setattr(run, "run_cells", lambda configs, verbose: ran.extend(configs))
    words = "--tasks arc_easy,arc_challenge --tasks hellaswag --method dense --method griffin --sparsity .5 --sparsity"
    words += " .6,.7 --ffn-bits 4 --ffn-bits 8:64 --include-path . --include-path .. --gen-kwargs temperature=0.5"
    assert command("run", *words.split(), "--gen-kwargs", "until=['a,b'],top_k=1", "--output", tmp_path).code == 0
    assert (ran[0].tasks, ran[0].method) == (("arc_easy", "arc_challenge", "hellaswag"), ("dense", "griffin"))
    assert (ran[0].sparsity, ran[0].ffn_bits) == ((0.5, 0.6, 0.7), ("4", "8:64"))
    assert (ran[0].include_path, ran[0].gen_kwargs) == ((".", ".."), "temperature=0.5,top_k=1,until=['a,b']")
    many = {p.name for p in typer.main.get_command(application()).commands["run"].params if p.multiple}
    lists = {name for name, default in DEFAULTS.items() if isinstance(default, tuple)}
    assert many == lists | {"gen_kwargs", "model_args", "seed"}


def test_a_tilde_is_the_home_in_every_path(tmp_path, monkeypatch):
    """A shell leaves it alone behind `=`, and in a file nothing else reads it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("data", "tasks"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.txt").write_text("a text")
    given = {"output": "~/out", "data_dir": "~/data", "calibration": "~/text.txt", "include_path": "~/tasks"}
    found = config_from(None, given)
    assert (found.output, found.data_dir, found.calibration, *found.include_path) == tuple(
        str(tmp_path / name) for name in ("out", "data", "text.txt", "tasks")
    )


def test_names_of_methods_may_have_capitals():
    for name in ("GRIFFIN", "Dart", "m_countdown", "GRIFFIN:draw=best"):
        assert make(*parse(name)).name == name.partition(":")[0].lower().replace("_", "-")


# -- what is asked -----------------------------------------------------------------------------------------------------

GIVEN = {"system_instruction": "Be brief.", "fewshot_as_multiturn": False, "gen_kwargs": "temperature=0.5"}


def test_a_share_of_the_documents_is_what_lm_eval_makes_of_it():
    items = Tasks().load("smoke_summary")  # 30 documents
    settings = [config_from(None, {"tasks": "smoke", "limit": limit}) for limit in (0.1, 3, 0.11, None)]
    assert [number_asked(items[0], s.limit) for s in settings] == [3, 3, 4, 30]
    hashes = [task_hash(items, s) for s in settings]
    assert hashes[0] == hashes[1] and len({*hashes}) == 3  # of what is asked
    assert cell(limit=0.1).inputs["limit"] == 0.1 and cell(limit=0.1).key != cell(limit=3).key
    assert type(cell(limit=3).inputs["limit"]) is int


def test_new_options_are_part_of_the_key_only_where_they_are_given():
    plain = cell().inputs
    assert not {*GIVEN} & {*plain}
    for name, value in GIVEN.items():
        assert cell(**{name: value}).inputs == {**plain, name: value}
    assert len({cell(gen_kwargs=same).key for same in ("top_k=1,until=x", "until='x', top_k=1")}) == 1
    assert cell(gen_kwargs="top_k=1,until=x").key == cell(gen_kwargs={"until": "x", "top_k": 1}).key != cell().key


@pytest.mark.parametrize(("typed", "kept"), [
    ("temperature=0,do_sample=True", "do_sample=true,temperature=0"),
    ('until=["a", "b,c"],top_k=1', "top_k=1,until=['a', 'b,c']"),
    ("until=Let's,do_sample=true,temperature=0.7", "do_sample=true,temperature=0.7,until=Let's"),
    ({"until": "it's", "use_cache": False}, "until=it's,use_cache=false"),
    ("until=[INST]", "until=[INST]"), ("until=### (end),top_k=1", "top_k=1,until=### (end)"),
    ("until=a,b", "until='a,b'"),
    ({"until": ['say "it\'s"', "b"]}, """until=['say "it\\'s"', 'b']"""),
    ("until='1'", "until='1'"), ("top_k=None", "top_k=None"), ({"until": ["\n"]}, "until=['\\n']"), ("", None),
])  # fmt: skip
def test_settings_of_generation_have_one_spelling(typed, kept):
    assert checked("gen_kwargs", typed) == kept == checked("gen_kwargs", kept)


def test_settings_of_generation_reach_the_task_and_its_hash():
    plain, changed = Tasks(), Tasks(gen_kwargs={"max_gen_toks": 7})
    (before,), (after,) = plain.load("smoke_summary"), changed.load("smoke_summary")
    assert after.config.generation_kwargs == {**before.config.generation_kwargs, "max_gen_toks": 7}
    settings = RunConfig()
    assert task_hash([before], settings) != task_hash([after], settings)
    same = [task_hash(tasks.load("smoke_questions"), settings) for tasks in (plain, changed)]
    assert same[0] == same[1]


def test_lm_eval_is_told_how_to_ask_only_where_that_was_said(monkeypatch):
    told, tasks = [], Tasks()
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **given: told.append(given))
    for given in ({}, {**GIVEN, "chat_template": True, "fewshot_as_multiturn": False, "limit": 0.5}):
        evaluate._simple_evaluate(None, tasks, tasks.load("smoke_questions"), config_from(None, given))
    assert told[0]["system_instruction"] is None and "fewshot_as_multiturn" not in told[0]
    assert told[1]["system_instruction"] == "Be brief." and told[1]["fewshot_as_multiturn"] is False
    assert (told[1]["apply_chat_template"], told[1]["limit"]) == (True, 0.5)


# -- folders of tasks --------------------------------------------------------------------------------------------------

CODE = "from pathlib import Path\nPath({mark!r}).touch()\ndef same(x):\n    return x\n"


@pytest.fixture
def mine(tmp_path):
    """Writes a task into a folder of its own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    (folder / "base.yaml").write_text("process_docs: !function code.same\n")

    def write(more="", text="'{{q}}'"):
        return write_task(folder, {"q": "Which?"}, text=text, more=more)

    return write


def test_a_task_of_another_folder_is_found_by_its_name(mine):
    (task,) = Tasks(include_path=[mine()]).load("mine")
    assert task.doc_to_text(task.eval_docs[0]) == "Which?"


@pytest.mark.slow  # the index of all tasks
def test_a_group_of_another_folder_may_have_any_task(mine, tmp_path):
    folder = mine()
    (folder / "ours.yaml").write_text("group: ours\ntask: [hellaswag]\n")
    with pytest.raises(UserError, match=f"hellaswag has no data in {tmp_path}"):
        Tasks(tmp_path, include_path=[folder]).load("ours")


@pytest.mark.parametrize(("more", "text", "word"), [
    ("process_docs: !function code.same", "q", "code.same"), ("include: base.yaml", "q", "code.same"),
    ("metric_list: [{metric: /tmp/own.py}]", "q", "/tmp/own.py"),
    ("x: {dataset_kwargs: {trust_remote_code: true}}", "q", "script"),
    ("", '"{{ q.__class__.__mro__[1].__subclasses__() }}"', "__class__"),  # a template reaches its document alone
])  # fmt: skip
def test_code_of_another_folder_does_not_run_unless_told(mine, tmp_path, monkeypatch, more, text, word):
    import lm_eval.utils

    monkeypatch.setattr(lm_eval.utils, "env", lm_eval.utils.env)
    folder, linked = mine(more, text), tmp_path / "linked"
    linked.mkdir()
    (linked / "mine.yaml").symlink_to(folder / "mine.yaml")
    for place in (folder, linked):
        with pytest.raises(UserError, match=word):
            Tasks(include_path=[place]).load("mine")
    assert not (tmp_path / "ran").exists() and Tasks(include_path=[tmp_path]).load("smoke_drift")
    if word == "code.same":
        Tasks(include_path=[folder], unsafe_code=True).load("mine")
        assert (tmp_path / "ran").exists()


# -- dense beside methods that read as much ----------------------------------------------------------------------------


def test_the_rounding_of_a_read():
    """8 bits with a scale for 128 weights read 50.8 %; 2 bits and their scales 15.6 %, and nothing reads less."""
    found = {read: rounding_at(read) for read in (0.7, 0.5, 0.4, 0.3, 0.25, 0.16)}
    assert [f.text for f in found.values()] == ["8:128", "8:128", "6:128", "q4_k", "q3_k", "2"]
    assert all(f.weight_bits(4096) / 16 <= read + 0.02 for read, f in found.items()) and rounding_at(0.1) is None


def test_dense_runs_in_a_rounding_of_each_read_where_neither_methods_nor_bits_are_given(tmp_path):
    (tmp_path / "run.yaml").write_text("sparsity: [0.5, 0.7, 0.9]\n")
    for file, given in ((None, {"sparsity": "0.5,0.7,0.9"}), (tmp_path / "run.yaml", {})):
        plain, rounded = configs_from(file, given)
        assert plain == RunConfig(sparsity=(0.5, 0.7, 0.9))
        assert (rounded.method, rounded.ffn_bits) == (("dense",), ("8:128", "q4_k"))
    for given in ({"method": "griffin"}, {"ffn_bits": "16"}, {"sparsity": "0.9"}, {"sparsity": "0"}):
        assert len(configs_from(None, given)) == 1
    both = configs_from(None, {"seed": "1,2", "sparsity": "0.5,0.7"})
    assert [(c.seed, len(c.ffn_bits)) for c in both] == [(1, 1), (2, 1), (1, 2), (2, 2)]
    assert [c.seed for c in configs_from(None, {"seed": [3, 1], "method": "dart"})] == [3, 1]
