"""From options to cells and their keys; the registry of methods."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import shutil
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import lm_eval.api.metrics
import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from dart_eval.cli import application
from dart_eval.evaluation import task_hash as task_hash_module
from dart_eval.evaluation.settings import EvalSettings
from dart_eval.evaluation.task_hash import task_hash
from dart_eval.evaluation.tasks import Tasks
from dart_eval.models.loading import Identity, ModelSpec, Resolved, resolve
from dart_eval.pruning import registry
from dart_eval.pruning.calibration import DEFAULT_TEXT, ROUNDING_TEXT
from dart_eval.pruning.method import option
from dart_eval.pruning.methods.griffin import Griffin, PromptMask
from dart_eval.pruning.registry import make
from dart_eval.sweep import plan as plan_module
from dart_eval.sweep import run
from dart_eval.sweep.options import RunConfig, config_from
from dart_eval.sweep.plan import command, methods_of, plan
from dart_eval.util.errors import UserError
from tests.helpers.commands import CONTEXT, Watch, start

MODEL = Identity("tiny", None, "f00d")


def cells(identity=MODEL, tasks=("arc_easy",), hashes=None, device="cpu", dtype="float32", **given):
    config = RunConfig(**{"method": ("dart",), "tasks": tasks, **given})
    model = Resolved(ModelSpec(), "", identity, dtype, config=LlamaConfig())
    return plan(config, model, hashes or dict.fromkeys(tasks, "h"), device)


def key(**given):
    (cell,) = cells(**given)
    return cell.key


# -- methods -------------------------------------------------------------------------------------------------------


def test_the_runs_seed_reaches_what_is_drawn_unless_it_has_its_own_and_a_method_given_twice_runs_once():
    specs = ("random", "random:score.seed=3", "griffin:draw=sample", "griffin:draw=sample:draw.seed=3", "griffin")
    plain, own, drawn, other, griffin = methods_of(RunConfig(method=(*specs, "griffin"), seed=7))
    assert (plain.score_seed, own.score_seed) == (7, 3)
    assert (drawn.draw_seed, other.draw_seed, griffin) == (7, 3, make("griffin"))


class Mine(PromptMask):
    """A method of another package."""

    summary = "of another package"
    level: int = option(1, "a number", least=0)


def test_a_method_of_another_package_is_made_replaces_none_and_moves_its_keys(monkeypatch, tmp_path):
    offered = {"mine": f"{__name__}:Mine", "griffin": f"{__name__}:Mine", "broken": "no_such_module"}
    entries = EntryPoints(EntryPoint(name, value, "dart_eval.methods") for name, value in offered.items())
    with pytest.raises(UserError, match="'mine'"):
        make("mine")
    found = []
    for level in (1, 2):
        (tmp_path / f"mine_{level}.py").write_text(f"LEVEL = {level}\n")
        monkeypatch.setattr(sys.modules[__name__], "__file__", str(tmp_path / f"mine_{level}.py"))
        registry.offered.cache_clear()  # a process that runs knows of no new packages
        monkeypatch.setattr(registry, "entry_points", entries.select)
        found += cells(method=("mine:level=3",))
    assert make("griffin") == Griffin() and registry.methods()["griffin"] is Griffin
    with pytest.raises(UserError, match="'broken'"):
        make("broken")
    assert (found[0].method, found[0].method.spec) == (Mine(level=3), "mine:level=3")
    assert found[0].inputs["params"] == {"method": "mine", "level": 3}
    assert found[0].key != found[1].key and found[0].inputs["code"] == found[1].inputs["code"]
    assert found[0].inputs["method_code"] != found[1].inputs["method_code"]


# -- cells ---------------------------------------------------------------------------------------------------------


def test_cells_go_task_by_task_and_what_no_sparsity_sets_comes_once():
    made = cells(tasks=("a", "b"), method=("dense", "rounding", "griffin"), sparsity=(0.5, 0.7, 0.5))
    of_task = (("dense", 0.0), ("rounding", 0.0), ("griffin", 0.5), ("griffin", 0.7))
    assert [(c.task, c.method.name, c.sparsity) for c in made] == [(t, *rest) for t in "ab" for rest in of_task]
    assert [c.name for c in made[:4]] == ["a-dense", "a-rounding", "a-griffin-0.5", "a-griffin-0.7"]
    assert len({c.key for c in made}) == 8


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


CHANGES = [
    {}, {"sparsity": (0.6,)}, {"method": ("griffin",)}, {"method": ("griffin:draw=sample",)}, {"method": ("dense",)},
    {"method": ("dart:remask.window=8",)}, {"limit": 5}, {"seed": 1}, {"num_fewshot": 0}, {"chunk": 512},
    {"max_length": 512}, {"chat_template": True}, {"scope": "last"}, {"hashes": {"arc_easy": "other"}},
    {"device": "cuda"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "batch_size": 1},
    {"dtype": "bfloat16", "batch_size": "auto"}, {"identity": dataclasses.replace(MODEL, weights="beef")},
    {"identity": dataclasses.replace(MODEL, revision="c0de")},
]  # fmt: skip
ALIKE = [
    ({"sparsity": (0.6,), "limit": 5}, {"sparsity": (0.6,), "limit": 5}), ({}, {"batch_size": 1}),
    ({}, {"batch_size": "auto"}), ({}, {"output": "elsewhere"}), ({}, {"force": True}), ({}, {"data_dir": "mirror"}),
    ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "batch_size": 8}),
    ({}, {"method": ("dart:remask=drift:remask.window=10",)}), ({}, {"method": ("dart:allocation=depth",)}),
    ({}, {"method": ("dart", "dart:remask=drift:remask.window=10")}),
    ({"method": ("dense",)}, {"method": ("dense",), "sparsity": (0.3, 0.9)}),
    ({"method": ("dense",)}, {"method": ("dense",), "scope": "last"}),
]  # fmt: skip


def test_the_key_changes_with_what_can_change_a_number_and_with_nothing_else(monkeypatch):
    keys = {str(change): key(**change) for change in CHANGES}
    assert len({*keys.values()}) == len(CHANGES), keys
    for one, other in ALIKE:
        assert key(**one) == key(**other), other
    for name, value in (("shared_hash", lambda tasks: "other code"), ("versions", lambda: {"torch": "0"})):
        with monkeypatch.context() as patch:
            patch.setattr(plan_module, name, value)
            assert key() not in keys.values(), name


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
    found = those("griffin", ffn_bits=("gptq4:32",))
    assert found[0] == found[1] and len({*found}) == 3


def test_codes_have_a_shipped_text_of_their_own(tmp_path):
    """And a method that calibrates keeps its own on them; a text that is given is the text of both."""
    method, codes = (hashlib.sha256(file.read_bytes()).hexdigest() for file in (DEFAULT_TEXT, ROUNDING_TEXT))
    assert method != codes
    (tmp_path / "text").write_text("a text")
    given = hashlib.sha256(b"a text").hexdigest()
    for name, bits, read, said, text in (
        ("griffin", "q4_k", None, "", None), ("griffin", "q4_k+imatrix", codes, "the shipped prose", given),
        ("flap", "q4_k", method, "the shipped text", given),
        ("flap", "gptq4:32", f"{method}+{codes}", "the shipped text and prose", given),
    ):  # fmt: skip
        (cell,) = cells(method=(name,), ffn_bits=(bits,))
        assert cell.inputs["calibration"] == read and (read is None or cell.text == said)
        (cell,) = cells(method=(name,), ffn_bits=(bits,), calibration=str(tmp_path / "text"))
        assert cell.inputs["calibration"] == text and cell.text == "text"


def test_what_is_read_of_a_calibration_text_is_recorded_where_it_is_not_all(tmp_path):
    (tmp_path / "text").write_text("a text")
    (tmp_path / "org__name" / "default").mkdir(parents=True)
    (tmp_path / "org__name" / "default" / "train.jsonl").write_text('{"text": "one"}\n')
    local = {"calibration": "org/name", "data_dir": str(tmp_path)}
    asked = (("flap", {"calibration": str(tmp_path / "text")}), ("flap", local), ("griffin", local))
    inputs = [cells(method=(method,), **given)[0].inputs for method, given in asked]
    found = [(each.get("calibration_tokens"), each.get("calibration_seed")) for each in inputs]
    assert found == [(None, None), (16384, 0), (None, None)]


def test_the_command_of_a_cell_can_be_given_again(tmp_path):
    """Options that are off by default come as their name, those that are on and switched off with `no`."""
    (cell,) = cells(method=("griffin",), tasks=("arc",), sparsity=(0.7071068,), limit=0.5)
    given = {"system_instruction": "Be brief.", "gen_kwargs": "temperature=0.5", "include_path": (str(tmp_path),)}
    config = RunConfig(batch_size="auto", kl=False, chat_template=True, fewshot_as_multiturn=False, limit=0.5, **given)
    line = command(config, cell)
    for words in (
        f"--include-path {tmp_path}", "--limit 0.5", "--no-fewshot-as-multiturn", "--gen-kwargs temperature=0.5",
        "--system-instruction 'Be brief.'", "--batch-size auto", "--no-kl", "--chat-template", "--sparsity 0.7071068",
    ):  # fmt: skip
        assert f"{words} " in f"{line} "
    again = line.replace("--system-instruction 'Be brief.'", "").split()
    done = CliRunner().invoke(application(), [*again[1:], "--data-dir", "no/such/folder", "--limit", "0"])
    assert "limit '0'" in str(done.exception) + done.output  # all others were understood


def test_one_row_that_no_model_can_meet_leaves_out_itself_alone(saved_llama, tmp_path):
    """A paper's row with a scope of its own is a configuration of its own."""
    common = {"model": saved_llama, "tasks": "smoke_questions", "limit": 2, "output": str(tmp_path / "out")}
    good = config_from(None, {**common, "method": "griffin", "sparsity": "0.9"})
    bad = config_from(None, {**common, "method": "cats", "sparsity": "0.9", "scope": "all"})
    view = Watch()
    found = run.begin_sweep([good, bad], view).cells
    assert [cell.method.name for cell in found.values()] == ["griffin"]
    assert any("cats at sparsity 0.9" in note for note in view.notes)
    with pytest.raises(UserError, match="cats"):
        run.begin_sweep([bad], view)


# -- models and tasks in a key -------------------------------------------------------------------------------------


def test_everything_a_model_folder_holds_is_in_its_identity(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    others = "generation_config.json", "chat_template.jinja", "tokenizer.model", "model.safetensors", "own.py"
    for name in others:
        (tmp_path / name).touch()
    found = [resolve(ModelSpec(str(tmp_path))).identity]
    for name in ("config.json", *others):
        with (tmp_path / name).open("a") as file:
            file.write(" ")
        found.append(resolve(ModelSpec(str(tmp_path))).identity)
    assert len({*found}) == 7


def test_another_tokenizer_makes_another_model(saved_llama, tmp_path):
    own = Path(shutil.copytree(saved_llama, tmp_path / "tok"))
    found = [resolve(ModelSpec(saved_llama, device="cpu", tokenizer=t)).identity.weights for t in (None, str(own))]
    (own / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    found.append(resolve(ModelSpec(saved_llama, device="cpu", tokenizer=str(own))).identity.weights)
    assert len({*found}) == 3


def _hashes(data, names, pipe=None):
    tasks, settings = Tasks(data), EvalSettings(limit=3, num_fewshot=1)
    found = [task_hash(tasks.load(name), settings) for name in names]
    return found if pipe is None else pipe.send(found)


@pytest.mark.process
@pytest.mark.slow
def test_task_hashes_are_the_same_in_every_process(data_dir):
    """Functions inside configurations must not be hashed by their address."""
    names, (ours, theirs) = ["hellaswag", "winogrande", "smoke_drift"], CONTEXT.Pipe()
    start(_hashes, data_dir, names, theirs)
    found = _hashes(data_dir, names)
    assert ours.recv() == found and len({*found}) == len(names)


def score(text, how):
    return f"{how}: {text}"


def test_functions_with_arguments_are_hashed_by_these_and_not_by_their_address():
    """MMLU-Pro's: the address of a partial differs between processes, and its arguments between tasks."""

    def wrapped(how):
        inner = functools.partial(score, how=how)

        @functools.wraps(score)
        def outer(*args):
            return inner(*args)

        outer.__wrapped__ = inner
        return outer

    for how in ("short", "long"):
        found = [task_hash_module._beyond(made) for made in (functools.partial(score, how=how), wrapped(how))]
        assert found[0] == found[1] and " at 0x" not in json.dumps(found, default=str)
        assert found[0] != task_hash_module._beyond(functools.partial(score, how="else"))


def test_a_helper_of_a_users_task_is_part_of_its_hash_and_lm_evals_version_stands_for_its_own(tmp_path, monkeypatch):
    found = []
    for sign in ("+", "-"):
        file = tmp_path / "utils.py"
        file.write_text(f"def helper(x):\n    return {sign}x\n\n\ndef score(x):\n    return helper(x)\n")
        spec = importlib.util.spec_from_file_location(f"utils_{len(found)}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(task_hash_module._beyond(module.score))
    assert None not in found and found[0] != found[1]
    space = {}
    exec("def score(x):\n    return x", space)  # it has no file
    own = (lm_eval.api.metrics.mean, space["score"], len)
    assert [task_hash_module._beyond(function) for function in own] == [None] * 3
    # `.venv` as a link: the interpreter's own path has it, and a task's file has none.
    (tmp_path / "linked").symlink_to(Path(lm_eval.__file__).parent)
    monkeypatch.setattr(lm_eval, "__file__", str(tmp_path / "linked" / "__init__.py"))
    assert task_hash_module._beyond(lm_eval.api.metrics.mean) is None
