"""Values of a run's options as users and lm-eval's users type them: what each means, and where it counts."""

import json

import pytest
import typer
import yaml
from transformers import LlamaConfig

from dart_eval.cli import application, run
from dart_eval.cli.options import one_of
from dart_eval.evaluation.documents import number_asked
from dart_eval.evaluation.task_hash import task_hash
from dart_eval.evaluation.tasks import Tasks
from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.pruning.registry import make
from dart_eval.sweep.options import DEFAULTS, RunConfig, checked, config_from, configs_from
from dart_eval.sweep.plan import command, plan
from dart_eval.util.bits import rounding_at
from dart_eval.util.errors import UserError
from tests.helpers.commands import Watch, run_local
from tests.helpers.commands import command as run_command


def cell(**given):
    config = config_from(None, {"tasks": "arc_easy", "method": "dense", **given})
    model = Resolved(ModelSpec(), "", Identity("tiny", None, "f00d"), "float32", config=LlamaConfig())
    (made,) = plan(config, model, {"arc_easy": "h"}, "cpu")
    return made


# -- sparsities and limits ---------------------------------------------------------------------------------------------


TWICE = {
    "tasks": (("arc_easy, arc_challenge", "hellaswag"), ("arc_easy", "arc_challenge", "hellaswag")),
    "method": (("dense", "griffin"), ("dense", "griffin")), "sparsity": ((".5", ".6,.7"), (0.5, 0.6, 0.7)),
    "ffn-bits": (("4", "8:64"), ("4", "8:64")), "include-path": ((".", ".."), (".", "..")),
    "gen-kwargs": (("temperature=0.5", "until=['a,b'],n=1"), "n=1,temperature=0.5,until=['a,b']"),
}  # fmt: skip


@pytest.mark.parametrize("option", list(TWICE))
def test_values_of_an_option_that_is_given_again_add_up(option, tmp_path, monkeypatch):
    ran, empty = [], tmp_path / "empty"  # `.` and `..` are looked through for tasks
    empty.joinpath("inner").mkdir(parents=True)
    monkeypatch.chdir(empty / "inner")
    monkeypatch.setattr(run, "run_cells", lambda configs, verbose: ran.extend(configs))
    typed, meant = TWICE[option]
    others = [] if option == "tasks" else ["--tasks", "arc_easy"]
    words = [word for value in typed for word in (f"--{option}", value)]
    assert run_command("run", *others, *words, "--output", tmp_path).code == 0
    assert getattr(ran[0], option.replace("-", "_")) == meant


def test_every_option_that_takes_a_list_may_be_given_again():
    commands = typer.main.get_command(application()).commands
    many = {p.name for p in commands["run"].params if p.multiple}
    assert many == {name for name, default in DEFAULTS.items() if isinstance(default, tuple)} | {
        "gen_kwargs", "model_args", "seed"
    }  # fmt: skip
    others = [*commands["bench"].commands.items(), *((name, commands[name]) for name in ("tables", "compare"))]
    assert {(name, p.name) for name, one in others for p in one.params if getattr(p, "multiple", False)} == {
        ("decode", "method"), ("decode", "ffn_bits"),
        ("overhead", "method"), ("tables", "tasks"),
        *(("compare", name) for name in ("row", "metric")),
    }  # fmt: skip


def test_a_share_of_the_documents_is_what_lm_eval_makes_of_it():
    tasks = Tasks()
    items = tasks.load("smoke_summary")  # 30 documents
    settings = [config_from(None, {"tasks": "smoke", "limit": limit}) for limit in (0.1, 3, 0.11, None)]
    assert [number_asked(items[0], s.limit) for s in settings] == [3, 3, 4, 30]
    hashes = [task_hash(items, s) for s in settings]
    assert hashes[0] == hashes[1] and len({*hashes}) == 3  # of what is asked
    assert cell(limit=0.1).inputs["limit"] == 0.1 and cell(limit=0.1).key != cell(limit=3).key
    assert type(cell(limit=3).inputs["limit"]) is int


# -- lm-eval's words ---------------------------------------------------------------------------------------------------

GIVEN = {"system_instruction": "Be brief.", "fewshot_as_multiturn": False, "gen_kwargs": "temperature=0.5"}


def test_new_options_are_part_of_the_key_only_where_they_are_given():
    plain = cell().inputs
    assert not {*GIVEN} & {*plain}
    for name, value in GIVEN.items():
        assert cell(**{name: value}).inputs == {**plain, name: value}
    assert (
        cell(gen_kwargs="a=1,b=x").key == cell(gen_kwargs="b='x', a=1").key == cell(gen_kwargs={"b": "x", "a": 1}).key
    )


@pytest.mark.parametrize(("typed", "kept"), [
    ("temperature=0,do_sample=True", "do_sample=true,temperature=0"),
    ('until=["a", "b,c"],n=1', "n=1,until=['a', 'b,c']"),
    ("until=Let's,do_sample=true,temperature=0.7", "do_sample=true,temperature=0.7,until=Let's"),
    ({"until": "it's", "use_cache": False}, "until=it's,use_cache=false"),
    ("until=[INST]", "until=[INST]"), ("until=### (end),n=1", "n=1,until=### (end)"), ("until=a,b", "until='a,b'"),
    ({"until": ['say "it\'s"', "b"]}, """until=['say "it\\'s"', 'b']"""),
    ("until='1'", "until='1'"), ("x=None", "x=None"), ({"until": ["\n"]}, "until=['\\n']"), ("", None),
])  # fmt: skip
def test_settings_of_generation_have_one_spelling(typed, kept):
    assert checked("gen_kwargs", typed) == kept
    assert checked("gen_kwargs", kept) == kept


def test_settings_of_generation_reach_the_task_and_its_hash():
    plain, changed = Tasks(), Tasks(gen_kwargs={"max_gen_toks": 7})
    (before,), (after,) = plain.load("smoke_summary"), changed.load("smoke_summary")
    assert after.config.generation_kwargs == {**before.config.generation_kwargs, "max_gen_toks": 7}
    settings = RunConfig()
    assert task_hash([before], settings) != task_hash([after], settings)
    same = [task_hash(tasks.load("smoke_questions"), settings) for tasks in (plain, changed)]
    assert same[0] == same[1]


@pytest.mark.parametrize(("given", "meant"), [
    ({"model_args": "pretrained=org/m,revision=v1,dtype=bfloat16"},
     {"model": "org/m", "revision": "v1", "dtype": "bfloat16"}),
    ({"model_args": "pretrained=m,enable_thinking=False,think_end_token=</think>", "apply_chat_template": True},
     {"model": "m", "enable_thinking": False, "think_end_token": "</think>", "chat_template": True}),
    ({"model": "hf", "model_args": {"pretrained": "org/m", "trust_remote_code": True, "max_length": 512}},
     {"model": "org/m", "trust_remote_code": True, "max_length": 512}),
    ({"model_args": '{"pretrained": "m", "revision": 1, "attn_implementation": "eager"}'},
     {"model": "m", "revision": "1", "attn_implementation": "eager"}),
    ({"dtype": "bf16"}, {"dtype": "bfloat16"}), ({"dtype": "half"}, {"dtype": "float16"}),
    ({"seed": "7"}, {"seed": 7}),
    ({"apply_chat_template": True, "output_path": "there"}, {"chat_template": True, "output": "there"}),
])  # fmt: skip
def test_a_model_may_be_told_as_to_lm_eval(given, meant):
    assert config_from(None, given) == RunConfig(**meant)


@pytest.mark.parametrize(("given", "message"), [
    ({"model_args": "tokeniser=m"}, "unknown key 'tokeniser'; did you mean tokenizer"),
    ({"model_args": "m"}, "model_args is not KEY=VALUE"),
    ({"model": "a", "model_args": "pretrained=b"}, "model is given twice: 'a' and 'b'"),
    ({"fewshot_as_multiturn": True}, "--fewshot-as-multiturn needs --chat-template; give both"),
    ({"include_path": "nowhere"}, "include path nowhere is not a folder"),
    ({"gen_kwargs": "temperature=high"}, "temperature='high'; it must be a number"),
    ({"gen_kwargs": 5}, "gen_kwargs 5 is not KEY=VALUE"), ({"ffn_bits": ","}, "ffn_bits .* at least 1 item"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        config_from(None, given)


def test_lm_evals_words_are_understood_on_the_command_line():
    words = "--tasks smoke --model_args pretrained=./none --apply_chat_template --fewshot_as_multiturn"
    words += " --gen_kwargs temperature=0 --system_instruction Brief. --limit 0.5 --output_path o"
    assert run_command("run", *words.split()).err.startswith("error: model ./none is neither a folder nor a GGUF file")
    words = "-t smoke -m ./none -b 4 -o out -f 5 -L 3"
    assert run_command("run", *words.split()).err.startswith("error: model ./none is neither a folder nor a GGUF file")


def test_several_seeds_are_several_cells():
    assert [config.seed for config in configs_from(None, {"seed": "3,1", "method": "dart"})] == [3, 1]
    assert [config.seed for config in configs_from(None, {"seed": [0, 1], "method": "dart"})] == [0, 1]


@pytest.mark.parametrize("name", ["GRIFFIN", "Dart", "m_countdown", "GRIFFIN:draw=best"])
def test_names_of_methods_may_have_capitals(name):
    from dart_eval.pruning.registry import make, parse

    assert make(*parse(name)).name == name.partition(":")[0].lower().replace("_", "-")


def test_the_command_of_a_cell_has_the_new_options(tmp_path):
    config = config_from(None, {**GIVEN, "tasks": "arc_easy", "include_path": str(tmp_path), "limit": 0.5})
    line = command(config, cell())
    for words in (
        f"--include-path {tmp_path}",
        "--limit 0.5",
        "--no-fewshot-as-multiturn",
        "--gen-kwargs temperature=0.5",
        "--system-instruction 'Be brief.'",
    ):
        assert words in line


def test_lm_eval_is_told_how_to_ask_only_where_that_was_said(monkeypatch):
    from dart_eval.evaluation import evaluate as ours

    told = []
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **given: told.append(given))
    tasks = Tasks()
    for given in ({}, {**GIVEN, "chat_template": True, "fewshot_as_multiturn": False, "limit": 0.5}):
        settings = config_from(None, given)
        ours._simple_evaluate(None, tasks, tasks.load("smoke_questions"), settings)
    assert told[0]["system_instruction"] is None and "fewshot_as_multiturn" not in told[0]
    assert told[1]["system_instruction"] == "Be brief." and told[1]["fewshot_as_multiturn"] is False
    assert (told[1]["apply_chat_template"], told[1]["limit"]) == (True, 0.5)


@pytest.mark.slow
def test_a_system_instruction_is_asked(saved_llama, tmp_path):
    config = config_from(None, {
        "model": saved_llama, "method": "dense", "output": str(tmp_path), "limit": 1, "tasks": "smoke_questions",
        "system_instruction": "Be brief.",
    })  # fmt: skip
    (record,) = run_local(config, Watch()).records
    (file,) = (tmp_path / "texts").iterdir()
    text = json.loads(file.read_text().splitlines()[0])
    assert text["prompt"].startswith("Be brief.") and record.inputs["system_instruction"] == "Be brief."


# -- folders of tasks --------------------------------------------------------------------------------------------------

TASK = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: {text}
doc_to_choice: [a, b]
doc_to_target: 0
{more}
"""
CODE = "from pathlib import Path\nPath({mark!r}).touch()\ndef same(x):\n    return x\n"


@pytest.fixture
def mine(tmp_path):
    """Writes a task into a folder of its own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"q": "Which?"}\n')
    (folder / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))

    def write(more="", text="'{{q}}'"):
        (folder / "mine.yaml").write_text(TASK.format(data=folder / "data.jsonl", text=text, more=more))
        return folder

    return write


def test_a_task_of_another_folder_is_found_by_its_name(mine):
    folder = mine()
    run = run_command("run", "--tasks", "mine,smok_stories", "--include-path", folder)
    assert run.err.startswith("error: unknown task 'smok_stories'; did you mean smoke_stories")
    (task,) = Tasks(include_path=[folder]).load("mine")
    assert task.doc_to_text(task.eval_docs[0]) == "Which?"


@pytest.mark.slow  # the index of all tasks
def test_a_group_of_another_folder_may_have_any_task(mine, tmp_path):
    folder = mine()
    (folder / "ours.yaml").write_text("group: ours\ntask: [hellaswag]\n")
    with pytest.raises(UserError, match=f"task hellaswag has no data in {tmp_path}"):
        Tasks(tmp_path, include_path=[folder]).load("ours")


BASE = "include: base.yaml"


@pytest.mark.parametrize(("more", "what"), [
    ("process_docs: !function code.same", "the function code.same"), (BASE, "the function code.same"),
    ("metric_list: [{metric: /tmp/own.py}]", "the metric /tmp/own.py"),
    ("x: {dataset_kwargs: {trust_remote_code: true}}", "a data set's script"),
])  # fmt: skip
def test_code_of_another_folder_does_not_run_unless_told(mine, tmp_path, more, what):
    folder = mine(more)
    (folder / "base.yaml").write_text("process_docs: !function code.same\n")
    with pytest.raises(UserError, match=f"task mine would run {what}.*; add --confirm-run-unsafe-code"):
        Tasks(include_path=[folder]).load("mine")
    assert not (tmp_path / "ran").exists()
    if "code.same" in what:
        Tasks(include_path=[folder], unsafe_code=True).load("mine")
        assert (tmp_path / "ran").exists()


def test_a_link_in_a_folder_of_tasks_runs_no_code(mine, tmp_path):
    folder = mine("process_docs: !function code.same")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "mine.yaml").symlink_to(folder / "mine.yaml")
    with pytest.raises(UserError, match="task mine would run the function code"):
        Tasks(include_path=[tmp_path / "linked"]).load("mine")
    assert not (tmp_path / "ran").exists()


def test_a_template_reaches_nothing_but_its_document(mine, monkeypatch):
    import lm_eval.utils

    monkeypatch.setattr(lm_eval.utils, "env", lm_eval.utils.env)
    folder = mine(text='"{{ q.__class__.__mro__[1].__subclasses__() }}"')
    with pytest.raises(UserError, match="SecurityError: access to attribute '__class__' of 'str' object is unsafe"):
        Tasks(include_path=[folder]).load("mine")


def test_shipped_tasks_need_no_word(tmp_path):
    assert Tasks(include_path=[tmp_path]).load("smoke_drift")


@pytest.mark.parametrize(("of_file", "typed", "name", "value"), [
    ({"output_path": "a"}, {"output": "b"}, "output", "b"),
    ({"model_args": "pretrained=a"}, {"model": "b"}, "model", "b"),
    ({"apply_chat_template": True}, {"chat_template": False}, "chat_template", False),
])  # fmt: skip
def test_the_command_line_goes_before_the_file_under_lm_evals_names_too(tmp_path, of_file, typed, name, value):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(of_file))
    assert getattr(config_from(file, typed), name) == value


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


# -- dense beside methods that read as much ----------------------------------------------------------------------------


@pytest.mark.parametrize(("read", "text"), [
    (0.7, "8:128"), (0.5, "8:128"), (0.4, "6:128"), (0.3, "q4_k"), (0.25, "q3_k"), (0.16, "2"), (0.1, None),
])  # fmt: skip
def test_the_rounding_of_a_read(read, text):
    """8 bits with a scale for 128 weights read 50.8 %; 2 bits and their scales 15.6 %, and nothing reads less."""
    found = rounding_at(read)
    assert (found and found.text) == text
    assert found is None or found.weight_bits(4096) / 16 <= read + 0.02


def test_dense_runs_in_a_rounding_of_each_read_where_neither_methods_nor_bits_are_given(tmp_path):
    (tmp_path / "run.yaml").write_text("sparsity: [0.5, 0.7, 0.9]\n")
    for file, given in ((None, {"sparsity": "0.5,0.7,0.9"}), (tmp_path / "run.yaml", {})):
        plain, rounded = configs_from(file, given)
        assert plain == RunConfig(sparsity=(0.5, 0.7, 0.9))
        assert (rounded.method, rounded.ffn_bits) == (("dense",), ("8:128", "q4_k"))
    for given in ({"method": "griffin"}, {"ffn_bits": "16"}, {"sparsity": "0.9"}, {"sparsity": "0"}):
        assert len(configs_from(None, given)) == 1
    assert [len(c.ffn_bits) for c in configs_from(None, {"seed": "1,2", "sparsity": "0.5,0.7"})] == [1, 1, 2, 2]


# -- words that have left ----------------------------------------------------------------------------------------------


def test_words_that_have_left_are_answered_wherever_they_are_given(tmp_path):
    (tmp_path / "run.yaml").write_text("share_prefix: false\n")
    said = "share-prefix left in"
    assert f"error: {said}" in run_command("run", "--no-share-prefix").err
    assert f"error: {said}" in run_command("run", "--share_prefix").err
    for file, given in ((tmp_path / "run.yaml", {}), (None, {"share_prefix": True})):
        with pytest.raises(UserError, match=said):
            configs_from(file, given)
    for name, params, word in (("fewer-experts", {}, "fewer-experts"), ("griffin", {"remask": "drift"}, "remask'")):
        with pytest.raises(UserError, match=f"{word} left in"):
            make(name, params)
    with pytest.raises(UserError, match="frontier left in"):
        one_of(("board",), "view", "").callback("frontier")
