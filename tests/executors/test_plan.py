"""From defaults, file and command line to cells and their keys; the registry of methods."""

import dataclasses
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval.api.metrics
import pytest
from transformers import LlamaConfig

from dart_eval.evaluation import task_hash as task_hash_module
from dart_eval.evaluation.settings import EvalSettings
from dart_eval.evaluation.task_hash import task_hash
from dart_eval.evaluation.tasks import Tasks
from dart_eval.models.loading import Identity, ModelSpec, Resolved, resolve
from dart_eval.pruning import registry
from dart_eval.pruning.method import Method, option
from dart_eval.pruning.methods.griffin import Griffin, PromptMask
from dart_eval.pruning.registry import make
from dart_eval.sweep import plan as plan_module
from dart_eval.sweep import run
from dart_eval.sweep.options import RunConfig, config_from
from dart_eval.sweep.plan import command, methods_of, plan
from dart_eval.util.errors import UserError
from tests.helpers.commands import Watch

MODEL = Identity("tiny", None, "f00d")


def yaml_file(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


def cells(identity=MODEL, tasks=("arc_easy",), hashes=None, device="cpu", dtype="float32", **given):
    config = RunConfig(**{"method": ("dart",), "tasks": tasks, **given})
    model = Resolved(ModelSpec(), "", identity, dtype, config=LlamaConfig())
    return plan(config, model, hashes or dict.fromkeys(tasks, "h"), device)


def key(**given):
    (cell,) = cells(**given)
    return cell.key


# -- configuration -------------------------------------------------------------------------------------------------


def test_without_anything_the_defaults_hold():
    assert config_from(None, {}) == RunConfig()


def test_the_file_wins_over_defaults_and_the_command_line_over_the_file(tmp_path):
    file = yaml_file(tmp_path, "limit: 7\nbatch_size: 3\ntasks: [arc, hellaswag]\nsparsity: [0.3, 0.6]\n")
    made = config_from(file, {"limit": 20, "seed": None, "sparsity": "0.9"})
    assert made == RunConfig(limit=20, batch_size=3, tasks=("arc", "hellaswag"), sparsity=(0.9,))


def test_a_command_line_false_wins_over_the_file(tmp_path):
    assert config_from(yaml_file(tmp_path, "force: true"), {"force": False}).force is False


def test_keys_of_the_file_may_be_written_as_options_are(tmp_path):
    given = config_from(yaml_file(tmp_path, f"num-fewshot: 5\ndata-dir: {tmp_path}"), {})
    assert given == RunConfig(num_fewshot=5, data_dir=str(tmp_path))


@pytest.mark.parametrize(("key", "text", "value"), [
    ("tasks", "arc, hellaswag,", ("arc", "hellaswag")),
    ("method", "dense,dart:remask.window=8:allocation=uniform", ("dense", "dart:remask.window=8:allocation=uniform")),
    ("sparsity", "0.5, 0.7,0", (0.5, 0.7, 0.0)),
])  # fmt: skip
def test_lists_may_be_comma_separated_text(key, text, value):
    assert getattr(config_from(None, {key: text}), key) == value


def test_a_single_value_in_the_file_is_a_list_of_one(tmp_path):
    made = config_from(yaml_file(tmp_path, "sparsity: 0.7\ntasks: arc\nmethod: dart"), {})
    assert (made.sparsity, made.tasks, made.method) == ((0.7,), ("arc",), ("dart",))


@pytest.mark.parametrize(("given", "message"), [
    ({"max_length": -1}, "max_length -1"),
    ({"num_fewshot": -1}, "num_fewshot -1"),
    ({"chunk": 3}, "chunk 3"),
    ({"method": ","}, "at least 1 item"),
    ({"sparsity": ","}, "at least 1 item"),
    ({"sparsity": "0.5,1"}, r"sparsity 1 is outside \[0, 1\)"),
])  # fmt: skip
def test_values_that_no_run_could_use_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        config_from(None, given)


def test_an_output_that_is_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        config_from(None, {"output": str(yaml_file(tmp_path, "text"))})


# -- methods -------------------------------------------------------------------------------------------------------


def test_a_method_given_twice_runs_once():
    made = methods_of(RunConfig(method=("griffin", "dart", "griffin", "dart:remask.window=10")))
    assert made == [make("griffin"), make("dart")]


def test_the_runs_seed_reaches_what_is_drawn_unless_it_has_its_own():
    specs = ("random", "random:score.seed=3", "griffin:draw=sample", "griffin:draw=sample:draw.seed=3", "griffin")
    plain, own, drawn, other, griffin = methods_of(RunConfig(method=specs, seed=7))
    assert (plain.score_seed, own.score_seed) == (7, 3)
    assert (drawn.draw_seed, other.draw_seed, griffin) == (7, 3, make("griffin"))


class Mine(PromptMask):
    """A method of another package."""

    summary = "of another package"
    level: int = option(1, "a number", least=0)


class Entry:
    """What `importlib.metadata.entry_points` gives."""

    def __init__(self, name, target):
        self.name, self.target = name, target

    def load(self):
        return self.target


@pytest.fixture
def installed(monkeypatch):
    """Entry points of other packages; a test adds to them."""

    class Groups(dict):
        def __setitem__(self, group, entries):
            super().__setitem__(group, entries)
            registry.offered.cache_clear()  # a process that runs knows of no new packages

    groups = Groups()
    monkeypatch.setattr(registry, "entry_points", lambda group: groups.get(group, []))
    return groups


def test_a_method_of_another_package_is_found_and_made(installed):
    with pytest.raises(UserError, match="unknown method 'mine'"):
        make("mine")
    installed["dart_eval.methods"] = [Entry("mine", Mine)]
    assert registry.methods()["mine"] is Mine
    (cell,) = cells(method=("mine:level=3",))
    assert (cell.method, cell.method.spec) == (Mine(level=3), "mine:level=3")
    assert cell.inputs["params"] == {"method": "mine", "level": 3}


def test_what_another_package_offers_and_is_no_method_is_left_out_with_a_word(installed, caplog):
    installed["dart_eval.methods"] = [Entry("odd", dict), Entry("made", Mine()), Entry("base", Method())]
    assert [*registry.methods()] == [*registry.BUILT_IN]
    assert {r.getMessage().split(" of another package")[0] for r in caplog.records} == {
        "method odd", "method made", "method base"
    }  # fmt: skip


def test_another_package_cannot_replace_a_built_in_method(installed):
    installed["dart_eval.methods"] = [Entry("griffin", Mine)]
    assert make("griffin") == Griffin() and registry.methods()["griffin"] is Griffin


# -- cells ---------------------------------------------------------------------------------------------------------


def test_cells_go_task_by_task_and_dense_comes_once_whatever_the_sparsities():
    made = cells(tasks=("a", "b"), method=("dense", "griffin"), sparsity=(0.5, 0.7, 0.5))
    assert [(c.task, c.method.name, c.sparsity) for c in made] == [
        (task, *rest) for task in "ab" for rest in (("dense", 0.0), ("griffin", 0.5), ("griffin", 0.7))
    ]
    assert [c.name for c in made[:3]] == ["a-dense", "a-griffin-0.5", "a-griffin-0.7"]
    assert len({c.key for c in made}) == 6


def test_two_spellings_of_one_method_are_one_cell():
    spelled = ("dart", "dart:remask=drift:remask.window=10", "dart:allocation=depth")
    assert len({key(method=(spec,)) for spec in spelled}) == 1 == len(cells(method=spelled))
    assert key(method=("griffin",)) != key(method=("griffin:draw=sample",)) != key(method=("dart",))


def test_a_method_that_no_sparsity_sets_comes_once():
    made = cells(method=("rounding", "cats", "griffin"), sparsity=(0.3, 0.5))
    assert [(c.method.name, c.sparsity) for c in made] == [
        ("rounding", 0.0), ("cats", 0.3), ("cats", 0.5), ("griffin", 0.3), ("griffin", 0.5)
    ]  # fmt: skip
    assert made[0].name == "arc_easy-rounding"


def test_the_key_of_dense_does_not_depend_on_the_sparsities():
    assert key(method=("dense",), sparsity=(0.5,)) == key(method=("dense",), sparsity=(0.3, 0.9))


def test_the_key_of_dense_does_not_depend_on_the_scope():
    assert key(method=("dense",), scope="last") == key(method=("dense",))


def test_inputs_of_options_that_are_gone_keep_their_defaults():
    """A cell of an earlier version has the key of today's, but for the digests of the code."""
    code = ("code", "method_code", "versions", "params")
    (dense,), (half,) = cells(method=("dense",)), cells(method=("griffin",), dtype="bfloat16")
    assert {name: value for name, value in dense.inputs.items() if name not in code} == {
        "model": MODEL.to_json(), "dtype": "float32", "device": "cpu", "method": "dense", "sparsity": 0.0,
        "scope": "scored", "num_fewshot": None, "limit": None, "seed": 0, "max_length": None, "chunk": 2048,
        "chat_template": False, "cue": None, "execution": "masked", "task": "arc_easy", "task_hash": "h",
        "batch_size": None, "share_prefix": None, "calibration": None, "method_files": [],
    }  # fmt: skip
    assert half.inputs.keys() == dense.inputs.keys()
    assert (half.inputs["batch_size"], half.inputs["share_prefix"], half.inputs["cue"]) == (8, True, None)


def test_the_same_question_has_the_same_key():
    assert key(sparsity=(0.6,), limit=5) == key(sparsity=(0.6,), limit=5)


@pytest.mark.parametrize("change", [
    {"sparsity": (0.6,)}, {"method": ("griffin",)}, {"method": ("dart:remask.window=8",)}, {"limit": 5}, {"seed": 1},
    {"dtype": "bfloat16"}, {"num_fewshot": 0}, {"chunk": 512}, {"max_length": 512},
    {"chat_template": True}, {"scope": "last"}, {"hashes": {"arc_easy": "other"}}, {"device": "cuda"},
    {"identity": dataclasses.replace(MODEL, weights="beef")}, {"identity": dataclasses.replace(MODEL, revision="c0de")},
], ids=str)  # fmt: skip
def test_the_key_changes_with_what_can_change_a_number(change):
    assert key(**change) != key()


@pytest.mark.parametrize("change", [
    {"batch_size": 1}, {"batch_size": "auto"}, {"output": "elsewhere"}, {"force": True},
    {"data_dir": "mirror"},
], ids=str)  # fmt: skip
def test_the_key_does_not_change_with_what_cannot_change_a_number(change):
    assert key(**change) == key()


def test_the_key_changes_with_the_code(monkeypatch):
    before = key()
    monkeypatch.setattr(plan_module, "shared_hash", lambda tasks: "other code")
    assert key() != before


def test_the_key_changes_with_the_versions_of_the_libraries(monkeypatch):
    before = key()
    monkeypatch.setattr(plan_module, "versions", lambda: {"torch": "0"})
    assert key() != before


def test_the_key_changes_with_the_calibration_texts_content_not_with_its_path(tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for file, text in ((one, "a text"), (same, "a text"), (other, "another text")):
        file.write_text(text)

    def those(method, **more):
        return [key(method=(method,), calibration=path, **more) for path in (str(one), str(same), str(other), None)]

    for method in ("flap", "wanda-sp", "static"):
        found = those(method)
        assert found[0] == found[1] and len({*found}) == 3
    for method in ("dense", "griffin", "magnitude"):  # no text changes a number of theirs
        assert len({*those(method)}) == 1


def test_what_is_read_of_a_calibration_text_is_recorded_where_it_is_not_all(tmp_path):
    (tmp_path / "text").write_text("a text")
    (tmp_path / "org__name" / "default").mkdir(parents=True)
    (tmp_path / "org__name" / "default" / "train.jsonl").write_text('{"text": "one"}\n')
    file, local = {"calibration": str(tmp_path / "text")}, {"calibration": "org/name", "data_dir": str(tmp_path)}

    def read(method="flap", **given):
        (cell,) = cells(method=(method,), **given)
        return cell.inputs.get("calibration_tokens"), cell.inputs.get("calibration_seed")

    assert read(**file) == (None, None)
    assert read(**local) == (16384, 0)
    assert read("griffin", **local) == (None, None)


def test_null_in_the_file_means_not_given(tmp_path):
    (tmp_path / "run.yaml").write_text("tasks: [arc]\nchunk: null\nseed: null\noutput:\n")
    assert config_from(tmp_path / "run.yaml", {}) == RunConfig(tasks=("arc",))


def test_a_broken_plugin_does_not_stop_the_others(monkeypatch):
    class Broken:
        name = "broken"

        def load(self):
            raise ImportError("no such module")

    monkeypatch.setattr("dart_eval.pruning.registry.entry_points", lambda group: [Broken()])
    assert make("griffin").name == "griffin"
    with pytest.raises(UserError, match="'broken' of another package cannot be used"):
        make("broken")


def test_a_changed_third_party_method_changes_the_key(installed, monkeypatch, tmp_path):
    found = []
    for level in (1, 2):
        (tmp_path / f"mine_{level}.py").write_text(f"LEVEL = {level}\n")
        monkeypatch.setattr(sys.modules[__name__], "__file__", str(tmp_path / f"mine_{level}.py"))
        installed["dart_eval.methods"] = [Entry("mine", Mine)]
        found.append(*cells(method=("mine",)))
    assert found[0].key != found[1].key and found[0].inputs["code"] == found[1].inputs["code"]
    assert found[0].inputs["method_code"] != found[1].inputs["method_code"]


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "chat_template.jinja", "tokenizer.model", "model.safetensors", "own.py"],
)
def test_everything_a_model_folder_holds_is_in_its_identity(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    (tmp_path / "model.safetensors").touch()
    (tmp_path / name).touch()
    before = resolve(ModelSpec(str(tmp_path))).identity
    with (tmp_path / name).open("a") as file:
        file.write(" ")
    assert resolve(ModelSpec(str(tmp_path))).identity != before


def test_batch_size_is_in_the_key_where_it_moves_digits():
    def keys(dtype, batch_size):
        return [c.key for c in cells(dtype=dtype, batch_size=batch_size)]

    assert keys("float32", 1) == keys("float32", 8)
    assert keys("bfloat16", 1) != keys("bfloat16", 8)
    assert keys("float32", "auto") == keys("float32", 8)
    assert keys("bfloat16", "auto") != keys("bfloat16", 8)


HASHER = "import sys; from tests.executors.test_plan import hashes; print(*hashes(*sys.argv[1:]))"


def hashes(data_dir, *names):
    """A hash of each task."""
    tasks = Tasks(data_dir)
    return [task_hash(tasks.load(name), EvalSettings(limit=3, num_fewshot=1)) for name in names]


@pytest.mark.process
@pytest.mark.slow
def test_task_hashes_are_the_same_in_every_process(data_dir):
    """Functions inside configurations must not be hashed by their address."""
    names = ["arc_easy", "hellaswag", "winogrande", "medmcqa", "wikitext", "cnn_dailymail", "xsum", "smoke_drift"]
    root = Path(__file__).resolve().parents[2]
    other = subprocess.run(
        [sys.executable, "-c", HASHER, data_dir, *names], cwd=root, capture_output=True, text=True, check=True
    )
    found = hashes(data_dir, *names)
    assert other.stdout.split() == found
    assert len(set(found)) == len(names)


def test_the_command_of_a_cell_can_be_given_again():
    """Options that are off by default come as their name, those that are on and switched off with `no`."""
    (cell,) = cells(method=("dense",), tasks=("arc",), batch_size="auto")
    config = RunConfig(batch_size="auto", kl=False, chat_template=True)
    words = command(config, cell).split()
    assert words[-4:] == ["--batch-size", "auto", "--no-kl", "--chat-template"]
    from typer.testing import CliRunner

    from dart_eval.cli import application

    done = CliRunner().invoke(application(), [*words[1:], "--data-dir", "no/such/folder", "--limit", "0"])
    assert "limit '0' must be" in str(done.exception) + done.output  # all others were understood


def test_a_cells_command_has_all_digits_of_its_sparsity():
    (cell,) = cells(method=("griffin",), tasks=("arc",), sparsity=(0.7071068,))
    assert "--sparsity 0.7071068 " in f"{command(RunConfig(), cell)} "


def score(text, how):
    return f"{how}: {text}"


@pytest.mark.parametrize("how", ["short", "long"])
def test_functions_with_arguments_are_hashed_by_these_and_not_by_their_address(how):
    """MMLU-Pro's: the address of a partial differs between processes, and its arguments between tasks."""

    def wrapped():
        inner = functools.partial(score, how=how)

        @functools.wraps(score)
        def outer(*args):
            return inner(*args)

        outer.__wrapped__ = inner
        return outer

    found = [task_hash_module._beyond(make()) for make in (lambda: functools.partial(score, how=how), wrapped)]
    assert found[0] == found[1] and " at 0x" not in json.dumps(found, default=str)
    assert found[0] != task_hash_module._beyond(functools.partial(score, how="else"))


def test_an_environment_that_is_reached_through_a_link_gives_the_same_hash(tmp_path, monkeypatch):
    """`.venv` as a link: the interpreter's own path has it, and a task's file has none."""
    (tmp_path / "linked").symlink_to(Path(lm_eval.__file__).parent)
    monkeypatch.setattr(lm_eval, "__file__", str(tmp_path / "linked" / "__init__.py"))
    assert task_hash_module._beyond(lm_eval.api.metrics.mean) is None


def test_a_helper_of_a_users_task_is_part_of_its_hash(tmp_path):
    found = []
    for sign in ("+", "-"):
        file = tmp_path / "utils.py"
        file.write_text(f"def helper(x):\n    return {sign}x\n\n\ndef score(x):\n    return helper(x)\n")
        spec = importlib.util.spec_from_file_location(f"utils_{len(found)}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(task_hash_module._beyond(module.score))
    assert None not in found and found[0] != found[1]
    assert task_hash_module._beyond(lm_eval.api.metrics.mean) is None  # the version covers lm-eval's own


def test_a_function_without_a_file_has_its_text_alone():
    space = {}
    exec("def score(x):\n    return x", space)
    assert task_hash_module._beyond(space["score"]) is None and task_hash_module._beyond(len) is None


def test_one_row_that_no_model_can_meet_leaves_out_itself_alone(saved_llama, tmp_path):
    """A paper's row with a scope of its own is a configuration of its own."""
    common = {"model": saved_llama, "tasks": "smoke_questions", "limit": 2, "output": str(tmp_path / "out")}
    good = config_from(None, {**common, "method": "griffin", "sparsity": "0.9"})
    bad = config_from(None, {**common, "method": "cats", "sparsity": "0.9", "scope": "all"})
    view = Watch()
    found = run.begin_sweep([good, bad], view).cells
    assert [cell.method.name for cell in found.values()] == ["griffin"]
    assert any(note.startswith("left out: cats at sparsity 0.9") for note in view.notes)
    with pytest.raises(UserError, match=r"cats at sparsity 0\.9"):
        run.begin_sweep([bad], view)


def test_another_tokenizer_makes_another_model(saved_llama, tmp_path):
    own = Path(shutil.copytree(saved_llama, tmp_path / "tok"))
    found = [resolve(ModelSpec(saved_llama, device="cpu", tokenizer=t)).identity.weights for t in (None, str(own))]
    (own / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    found.append(resolve(ModelSpec(saved_llama, device="cpu", tokenizer=str(own))).identity.weights)
    assert len({*found}) == 3
