"""The Python surface: its names and signatures, the page that shows them, and models that are loaded already."""

import copy
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dart_eval
from dart_eval import UserError
from dart_eval.models import demo_model
from dart_eval.models.loaded import Loaded
from dart_eval.pruning.methods.dart import Dart
from dart_eval.sweep.options import RunConfig
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.sessions import RESTLESS, cache_of, generate, hooked, open_session, prompts_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python.md"
ASKED = {"tasks": "smoke_questions", "limit": 2, "method": "dense,griffin"}


@pytest.fixture
def opened(saved_llama):
    """A model and its tokenizer, loaded by the user."""
    tokenizer = AutoTokenizer.from_pretrained(saved_llama)
    return AutoModelForCausalLM.from_pretrained(saved_llama).train(), tokenizer


@pytest.fixture
def small(saved_llama, tmp_path, monkeypatch):
    """A tiny model in place of the demo model."""
    small = tmp_path / "small"
    shutil.copytree(saved_llama, small)
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(small)
    monkeypatch.setattr(demo_model, "folder", lambda: small)
    monkeypatch.chdir(tmp_path)


def test_the_recipe_of_a_server_runs_as_printed(small, capsys):
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    names = {}
    exec(compile(block, "recipes.md", "exec"), names)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and float(said[-1]) == pytest.approx(0.665, abs=0.02)
    assert not hooked(names["write"].model)


def test_the_page_runs_as_printed(small, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert said.count("\ndart:remask.window=8") == 2
    assert "\ngriffin 0.7 acc " in said and "unknown method 'grifin'; did you mean griffin, grinqh?" in said
    assert names["rows"][0]["method"] == "griffin"
    values = {(row["key"], row["metric"], row["value"]) for row in names["rows"]}
    assert values < {*names["frame"][["key", "metric", "value"]].itertuples(index=False, name=None)}
    assert len(names["documents"]) == 4 * names["frame"].key.nunique() and set(names["documents"].acc) <= {0.0, 1.0}


def test_the_public_names_are_shown():
    assert dir(dart_eval) == sorted(dart_eval.__all__)
    assert all(getattr(dart_eval, name) is not None for name in dart_eval.__all__)
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        dart_eval.evalute  # noqa: B018 - it is looked up


@pytest.mark.process
def test_the_import_needs_no_torch():
    code = "import sys, dart_eval; dir(dart_eval); dart_eval.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_evaluate_has_the_options_of_run_and_their_defaults():
    signature = inspect.signature(dart_eval.evaluate).parameters
    config = vars(RunConfig())
    assert set(signature) == {*config, "name", "progress"}
    for name in set(config) - {"tasks"}:
        assert signature[name].default == config[name], name
    kinds = {p.kind for function in (dart_eval.evaluate, dart_eval.prune) for p in
             inspect.signature(function).parameters.values()}  # fmt: skip
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def test_a_method_is_spelled_as_on_the_command_line_or_made_of_its_class(llama):
    spelled = "dart:remask.window=8:remask.floor=0.2:allocation=uniform"
    for method in (spelled, Dart(remask_window="8", remask_floor=0.2, allocation="uniform")):
        with dart_eval.prune(llama, method, 0.7) as session:
            assert session.method.spec == spelled
            assert session.method == Dart(remask_window=8, remask_floor=0.2, allocation="uniform")
    for method, words in (
        ("dart:allocation=depth:allocation=uniform", "allocation is given twice"),
        ("dart:remask=drif", "dart: remask is 'drif'; did you mean drift"),
        (Dart, "is neither a name nor a Method"),
        (0.7, "method 0.7 is neither a name nor a Method"),
    ):
        with pytest.raises(UserError, match=words), dart_eval.prune(llama, method):
            pass


@pytest.mark.parametrize(
    ("batch", "asked", "ran"), [(1, "auto", "copied"), (2, "auto", "masked"), (1, "masked", "masked")]
)
def test_a_session_says_how_it_runs(llama, batch, asked, ran):
    with open_session(llama, "griffin", execution=asked) as session:
        generate(llama, prompts_of(batch, 8), 2)
        assert session.execution == ran


@pytest.mark.parametrize(("method", "options"), [("griffin", {}), ("dart", RESTLESS), ("cats", {}), ("grinqh", {})])
@torch.no_grad()
def test_tokens_that_were_taken_back_are_decoded_as_at_first(llama, method, options):
    """Two ways on from one prefix, the second after `rewind`; `dart` has made new masks meanwhile."""
    with open_session(llama, method, **options) as session:
        cache = cache_of(llama(prompts_of(2, 12), use_cache=True))

        def decode(tokens):
            return torch.stack([llama(torch.full((2, 1), t), use_cache=True, cache=cache).logits for t in tokens])

        decode([1, 2])
        before = session.rows.select(torch.arange(2)) if session.room() is not None else None
        first, remasks = decode([3, 4, 5, 6, 7]), session.remasks
        session.rewind(5, before)
        assert cache.get_seq_length() == 14
        assert torch.equal(decode([3, 4, 5, 6, 7]), first) and session.remasks == remasks
        assert (max(remasks) > 0) == (method == "dart")
        for tokens, words in ((8, "8 tokens cannot be taken back; decoded since the prompt: 7"), (0, "0 tokens")):
            with pytest.raises(UserError, match=words):
                session.rewind(tokens, before)
        if before is not None:
            with pytest.raises(UserError, match="dart follows the tokens that are taken back; give the rows"):
                session.rewind(1)


# -- loaded models -----------------------------------------------------------------------------------------------------


def test_a_loaded_model_gives_what_its_folder_gives(opened, saved_llama, tmp_path):
    """Its cells are its own, and are found again; the model and the tokenizer stay as they were."""
    model, tokenizer = opened
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    ours = dart_eval.evaluate(model, tokenizer, name="mine", **ASKED, output=tmp_path)
    theirs = dart_eval.evaluate(saved_llama, **ASKED, output=tmp_path)
    values = [[(r["method"], r["metric"], r["value"]) for r in rows] for rows in (ours, theirs)]
    assert values[0] == values[1]
    assert not {r["key"] for r in ours} & {r["key"] for r in theirs}
    assert [m.training for m in model.modules()] == modes
    assert tokenizer.backend_tokenizer.to_str() == AutoTokenizer.from_pretrained(saved_llama).backend_tokenizer.to_str()
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "cells").iterdir()}
    again = dart_eval.evaluate(copy.deepcopy(model), tokenizer, name="mine", **ASKED, output=tmp_path)
    assert again == ours
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cells").iterdir()} == files
    (line,) = {r["command"] for r in ours if r["method"] == "griffin"}
    assert line == (
        "dart_eval.evaluate(model, tokenizer, name='mine', tasks='smoke_questions', method='griffin', sparsity=0.5, "
        "limit=2)"
    )


def test_its_name_and_its_weights_are_a_loaded_models_identity(opened):
    """Whoever trains on and evaluates under the same name gets no old answers."""
    model, tokenizer = opened
    before = Loaded.named("mine", model, tokenizer).identity
    assert (before.name, before.loaded) == ("mine", True)
    assert Loaded.named("mine", copy.deepcopy(model), tokenizer).identity == before
    assert Loaded.named("theirs", model, tokenizer).identity != before
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] += 1e-3
    after = Loaded.named("mine", model, tokenizer).identity
    assert after.weights not in (before.weights, Loaded.named("mine", model.bfloat16(), tokenizer).identity.weights)


def test_the_codes_of_a_quantised_model_are_in_its_identity(opened):
    """Codes within a large matrix: text abbreviates it."""
    quantization = pytest.importorskip("torchao.quantization")
    model, tokenizer = opened
    found = []
    for sign in (1, 1, -1):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.model.layers[1].mlp.up_proj.weight[5:9, 8:24] *= sign
        quantization.quantize_(changed, quantization.Int8WeightOnlyConfig(version=2))
        found.append(Loaded.named("mine", changed, tokenizer).identity.weights)
    assert found[0] == found[1] != found[2]


def test_a_model_under_prune_is_not_evaluated(opened, tmp_path):
    """Its dense cells would be pruned ones."""
    model, tokenizer = opened
    with dart_eval.prune(model, "griffin"), pytest.raises(UserError, match="prune"):
        dart_eval.evaluate(model, tokenizer, name="mine", **ASKED, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "words"), [
    ({"model": tiny("llama")}, "comes without a tokenizer; give evaluate"),
    ({"model": tiny("llama"), "tokenizer": "llama"}, "comes without a tokenizer; give evaluate"),
    ({"tokenizer": object()}, "a loaded tokenizer goes with a loaded model"),
    ({"name": "mine"}, "name is for a loaded model"),
    ({"model": tiny("llama"), "tokenizer": word_tokenizer()}, "needs a name, by which its cells are found again"),
    ({"model": torch.nn.Linear(2, 2)}, "of type Linear, not a model of transformers"),
    ({"model": 5}, "of type int, not a model of transformers"),
    ({"model": tiny("llama"), "tokenizer": "x", "dtype": "float16"}, "dtype is for a model that is to be loaded"),
    ({"model": tiny("llama"), "tokenizer": "x", "ray": "local"}, "ray is for a model that is to be loaded"),
])  # fmt: skip
def test_what_a_loaded_model_cannot_be_is_refused(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        dart_eval.evaluate(**{"tasks": "smoke_questions", **options})
    assert list(tmp_path.iterdir()) == []
