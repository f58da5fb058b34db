"""The Python surface: its names and signatures, what it refuses, and models that are loaded already."""

import copy
import datetime
import inspect

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dart_eval
from dart_eval import UserError
from dart_eval.models.loaded import Loaded
from dart_eval.pruning.methods.dart import Dart
from dart_eval.pruning.registry import check_sparsity
from dart_eval.sweep.options import RunConfig, checked
from tests.helpers.models import tiny, word_tokenizer
from tests.helpers.sessions import RESTLESS, cache_of, generate, open_session, prompts_of

ASKED = {"tasks": "smoke_questions", "limit": 2, "method": "dense,griffin"}


@pytest.fixture
def opened(saved_llama):
    """A model and its tokenizer, loaded by the user."""
    tokenizer = AutoTokenizer.from_pretrained(saved_llama)
    return AutoModelForCausalLM.from_pretrained(saved_llama).train(), tokenizer


def test_the_public_names_are_shown():
    assert dir(dart_eval) == sorted(dart_eval.__all__)
    assert all(getattr(dart_eval, name) is not None for name in dart_eval.__all__)
    with pytest.raises(AttributeError, match=r"write dart_eval\.evaluate\(model="):
        _ = dart_eval.simple_evaluate


def test_evaluate_has_the_options_of_run_and_their_defaults():
    signature = inspect.signature(dart_eval.evaluate).parameters
    config = vars(RunConfig())
    assert set(signature) == {*config, "name", "progress"}
    for name in set(config) - {"tasks"}:
        assert signature[name].default == config[name], name
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    assert {p.kind for p in (*signature.values(), *inspect.signature(dart_eval.prune).parameters.values())} == {*kinds}


def test_a_method_is_spelled_as_on_the_command_line_or_made_of_its_class(llama):
    spelled = "dart:remask.window=8:remask.floor=0.2:allocation=uniform"
    for method in (spelled, Dart(remask_window="8", remask_floor=0.2, allocation="uniform")):
        with dart_eval.prune(llama, method, 0.7) as session:
            assert session.method.spec == spelled
            assert session.method == Dart(remask_window=8, remask_floor=0.2, allocation="uniform")
    twice = "dart:allocation=depth:allocation=uniform"
    for method, word in ((twice, "twice"), ("dart:remask=drif", "drift"), (Dart, "name"), (0.7, "name")):
        with pytest.raises(UserError, match=word), dart_eval.prune(llama, method):
            pass


def test_a_sparsity_is_a_number_and_numpys_are_numbers(llama):
    for sparsity in ("0.5", None, True, [0.5], np.array([0.5]), torch.tensor([0.5]), 0.5j):
        with pytest.raises(UserError, match="number"), dart_eval.prune(llama, "griffin", sparsity=sparsity):
            pass
    for sparsity in (0, 0.5, np.float32(0.5), np.int64(0)):
        assert check_sparsity(sparsity) == sparsity
    limit, sparsity = checked("limit", np.int64(5)), checked("sparsity", np.array([0.5, 0.75]))
    assert (limit, type(limit), sparsity) == (5, int, (0.5, 0.75))


def test_a_session_says_how_it_runs(llama):
    for batch, asked, ran in ((1, "auto", "copied"), (2, "auto", "masked"), (1, "masked", "masked")):
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
        for tokens, rows in ((8, before), (0, before), (1, None)):
            if tokens != 1 or before is not None:
                with pytest.raises(UserError, match=rf"{tokens} tokens|rows"):
                    session.rewind(tokens, rows)


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


LOADED = {"model": tiny("llama")}
REFUSED = {
    "tokenizer": [LOADED, {**LOADED, "tokenizer": "llama"}, {"tokenizer": object()}],
    "name": [{"name": "mine"}, {**LOADED, "tokenizer": word_tokenizer()}],
    "type": [{"model": torch.nn.Linear(2, 2)}, {"model": 5}],
    "loaded": [{**LOADED, "tokenizer": "x", "dtype": "float16"}, {**LOADED, "tokenizer": "x", "ray": "local"}],
    "sparsity": [{"sparsity": "half"}, {"sparsity": True}, {"sparsity": [["0.5"]]}],
    "limit": [{"limit": "three"}, {"limit": datetime.date(2024, 1, 1)}],
    "tasks|output|model|method": [{"tasks": [1]}, {"output": ""}, {"model": b"folder"}, {"method": object()}],
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_cannot_be_evaluated_is_refused_and_writes_nothing(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    for options in REFUSED[word]:
        with pytest.raises(UserError, match=word):
            dart_eval.evaluate(**{"tasks": "smoke_questions", **options})
        assert list(tmp_path.iterdir()) == []
