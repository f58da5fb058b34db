"""Settings of generation, and draws: their types, what they move in a key, ends of their own, what is drawn again."""

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import DbrxConfig, GenerationConfig, LlamaConfig, MixtralConfig

from dart_eval.evaluation import tasks
from dart_eval.evaluation.generation import Generator
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.rotary import Angles
from dart_eval.models.loading import Identity, ModelSpec, Resolved
from dart_eval.pruning.session import Session
from dart_eval.results.store import Journal
from dart_eval.sweep.options import RunConfig, config_from, config_of
from dart_eval.sweep.plan import plan
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens, tiny
from tests.helpers.requests import TextRequest, words
from tests.helpers.tasks import write_task

KWARGS = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}


def requests(count=5, kwargs=KWARGS, repeats=1):
    made = []
    for i in range(count):
        text = words(random_tokens(5 + i, seed=i))
        made += [Instance("generate_until", {}, (text, dict(kwargs)), 0, metadata=("t", i, repeats))] * repeats
    return made


def answers(tokenizer, asked, batch_size=2, journal=None):
    torch.manual_seed(7)
    lm = PrunedLM(tiny("llama").float(), tokenizer, batch_size, max_length=64)
    lm.begin(Session(), {}, journal)
    return lm.generate_until(asked)


# -- draws -------------------------------------------------------------------------------------------------------------


def keys(batch_size, dtype="float32", method="cats", drawn=(), settings=None):
    config = RunConfig(method=(method,), batch_size=batch_size)
    model = Resolved(ModelSpec(), "", Identity("m", None, "w"), dtype, config=settings or LlamaConfig())
    return [cell.key for cell in plan(config, model, {"t": "h"}, "cpu", drawn)]


@pytest.mark.parametrize(("method", "dtype", "drawn", "settings", "moves"), [
    ("cats", "float32", (), LlamaConfig, True), ("dart", "float32", (), LlamaConfig, False),
    ("dense", "float32", (), LlamaConfig, False), ("dense", "float32", ("t",), LlamaConfig, True),
    ("dart", "float32", ("other",), LlamaConfig, False), ("dart", "bfloat16", (), LlamaConfig, True),
    ("teal", "float32", (), LlamaConfig, True), ("wina", "float32", (), LlamaConfig, True),
    ("rounding", "float32", (), LlamaConfig, False),
    ("dense", "float32", (), MixtralConfig, True), ("dense", "float32", (), DbrxConfig, True),  # a router chooses
])  # fmt: skip
def test_the_batch_size_is_part_of_the_key_where_it_moves_numbers(method, dtype, drawn, settings, moves):
    assert (keys(1, dtype, method, drawn, settings()) != keys(8, dtype, method, drawn, settings())) == moves


def test_what_draws():
    assert all(map(tasks.draws, ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7})))
    assert not any(map(tasks.draws, ({"do_sample": False}, {}, {"temperature": 0.0, "until": ["x"]})))


@pytest.mark.slow
def test_a_stopped_run_draws_what_a_whole_one_does(tokenizer, tmp_path):
    whole = Journal(tmp_path / "whole.jsonl")
    texts = answers(tokenizer, requests(), journal=whole)
    assert texts == answers(tokenizer, requests())
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[:2]))
    part = Journal(tmp_path / "part.jsonl")
    assert 0 < len(part) < 5
    assert answers(tokenizer, requests(), journal=part) == texts
    assert answers(tokenizer, requests(), batch_size=5) != texts  # other prompts share the batch


def test_draws_of_one_prompt_differ(tokenizer):
    texts = answers(tokenizer, requests(2, repeats=4), batch_size=8)
    assert len(set(texts[:4])) > 1 and len(set(texts[4:])) > 1
    greedy = answers(tokenizer, requests(2, {**KWARGS, "do_sample": False, "temperature": 0.0}, repeats=3))
    assert len(set(greedy[:3])) == 1
    (one,) = answers(tokenizer, requests(1, {"max_gen_toks": 3, "do_sample": True, "num_return_sequences": 1}))
    assert one  # where no temperature is given


# -- settings ----------------------------------------------------------------------------------------------------------


def _asked(lm, **settings):
    """Ask three prompts in one batch; return the token ids and the counted tokens of each."""
    lm.begin(Session(), {})
    requests = [TextRequest(words(random_tokens(5 + i, seed=i)), i) for i in range(3)]
    for request in requests:
        request.args = (request.args[0], {**request.args[1], **settings})
    lm.generate_until(requests)
    return [lm.texts["t", i].token_ids for i in range(3)], [lm.costs["t", i].tokens for i in range(3)]


@pytest.mark.parametrize("several", [False, True])
def test_an_end_among_the_settings_ends_what_is_counted(several, tokenizer):
    """What pads a row after `eos_token_id` of --gen-kwargs is no token of its text."""
    lm = PrunedLM(tiny("llama").float(), tokenizer, batch_size=3, max_length=64)
    whole, _ = _asked(lm)
    end = whole[0][2]
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in whole]
    assert len(expected[0]) < len(whole[0]) and expected[1:] == whole[1:]
    found, counts = _asked(lm, eos_token_id=[end] if several else end)
    assert found == expected
    assert counts == [len(ids) for ids in expected]


def test_the_tokens_of_a_cut_prompt_are_those_that_are_read(tokenizer):
    """A prompt longer than the model is cut from the left, so most of its tokens never run."""
    lm = PrunedLM(tiny("llama"), tokenizer, max_length=64)
    generator = Generator(lm, Session(), lm.planned, Angles(lm.model), {})
    (unit,) = generator.units([("a", TextRequest(words(random_tokens(200)), 0, tokens=8))])
    assert [(p.tokens, p.cut) for p in unit.prompts] == [(56, True)]


KINDS = {  # what a setting must be, and settings that are something else; `do_sample=no` is a text, and so true
    "true or false": ["do_sample=no", {"do_sample": "off"}],
    "whole number": ["max_gen_toks=abc", "max_new_tokens=10.5"],
    "number": ["temperature=high,do_sample=true"],
    "list of texts": ["until=5", "until={'a', 'b'}"],
    "a list of them": ["num_beams={1, 2}", {"sequence_bias": {"x": 1.0}}, {"streamer": object}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_other_types_are_refused_before_anything_is_loaded(kind):
    for given in KINDS[kind]:
        with pytest.raises(UserError, match=f"must be .*{kind}"):
            config_of({"gen_kwargs": given})


# Code that `generate` would fetch and run, models, objects; and a slip of the pen, whatever the tasks are.
NONE = ("custom_generate", "assistant_model", "trust_remote_code", "streamer", "cache_config", "tempxerature", "", "_x")


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_setting_of_generation_is_refused_wherever_it_is_given(name, tokenizer):
    with pytest.raises(UserError, match="no setting of generation"):
        config_of({"gen_kwargs": {name: "a/b"}})
    request = TextRequest("w5 w6", 0)
    request.args[1][name] = "a/b"
    lm = PrunedLM(tiny("llama"), tokenizer)
    lm.begin(Session(), {})
    with pytest.raises(UserError, match="no setting of generation"):
        lm.generate_until([request])


def test_a_task_with_code_for_a_setting_of_generation_is_refused_before_it_is_asked(tmp_path):
    more = "generation_kwargs: {custom_generate: a/b}"
    write_task(tmp_path, {"q": "w5"}, kind="generate_until", target='"{{q}}"', more=more)
    with pytest.raises(UserError, match=r"task mine: .*custom_generate.* no setting of generation"):
        tasks.Tasks(include_path=[tmp_path]).load("mine")


def test_a_new_field_of_transformers_is_a_setting(monkeypatch):
    fields = {**GenerationConfig().to_dict(), "tomorrow": None}
    monkeypatch.setattr(GenerationConfig, "to_dict", lambda self: fields)
    assert config_of({"gen_kwargs": "tomorrow=2"}).gen_kwargs == "tomorrow=2"


def test_settings_of_their_types_pass():
    """lm-eval takes JSON, too."""
    for given, kept in (
        ("do_sample=False", "do_sample=false"), ("until=None", None), ("until=a", None), ("temperature=None", None),
        ('{"temperature": 0.5, "until": ["a=b"]}', "temperature=0.5,until=['a=b']"),
        ({"until": ["\n", "b"], "temperature": 1}, "temperature=1,until=['\\n', 'b']"),
    ):  # fmt: skip
        assert config_of({"gen_kwargs": given}).gen_kwargs == (kept or given)


OWN = {"max_gen_toks": 48, "do_sample": False, "until": ["x"]}


@pytest.mark.parametrize(("own", "given", "expected"), [
    (OWN, {"max_new_tokens": 8}, {"max_new_tokens": 8, "do_sample": False, "until": ["x"]}),
    (OWN, {"max_tokens": 8, "until": ["y"]}, {"max_tokens": 8, "do_sample": False, "until": ["y"]}),
    (OWN, {"temperature": 0.7, "do_sample": True}, {**OWN, "do_sample": True, "temperature": 0.7}),
    (OWN, {"temperature": None}, {**OWN, "temperature": None}),
    (OWN, {"temperature": 0.7}, "has no effect"),
    # gsm8k has temperature 0.0 itself: the user who types do_sample=true cannot leave it out.
    ({"do_sample": False, "temperature": 0.0}, {"do_sample": True}, "add temperature=1"),
    ({"temperature": 0.0}, {"do_sample": True, "temperature": 0.5}, {"do_sample": True, "temperature": 0.5}),
    ({"temperature": 0.0}, {"do_sample": False}, {"do_sample": False, "temperature": 0.0}),
])  # fmt: skip
def test_what_a_user_sets_has_its_effect_whatever_name_the_tasks_length_has_or_is_refused(own, given, expected):
    if isinstance(expected, dict):
        settings = tasks.overridden(own, given)
        assert settings == expected and tasks.draws(settings) == bool(given.get("do_sample"))
    else:
        with pytest.raises(UserError, match=expected):
            tasks.overridden(own, given)


@pytest.mark.parametrize(("settings", "word"), [
    ({"max_length": 512}, "use max_gen_toks"), ({"do_sample": True, "num_return_sequences": 2}, "leave it out"),
    ({"do_sample": True, "temperature": 0.0}, "draws none"), ({"max_gen_toks": 0}, "no text"),
    ({"stop": 0}, "use until"),
])  # fmt: skip
def test_settings_that_would_give_texts_to_other_prompts_are_refused(tokenizer, settings, word):
    with pytest.raises(UserError, match=word):
        _asked(PrunedLM(tiny("llama"), tokenizer, max_length=64), **settings)


def test_a_text_has_the_tasks_length_whatever_the_checkpoint_says(tokenizer, monkeypatch):
    lm = PrunedLM(tiny("llama"), tokenizer, max_length=64)
    monkeypatch.setattr(lm.model.generation_config, "max_new_tokens", 2)
    assert _asked(lm, max_gen_toks=5, until=None)[1] == [5, 5, 5]


def test_groups_of_rounded_weights_are_no_times_of_day(tmp_path):
    """YAML 1.1 reads 4:16 as 256, and the error named a number that nobody had typed."""
    file = tmp_path / "run.yaml"
    file.write_text("ffn_bits: 4:16\ntasks: arc\nlimit: 30\n", encoding="utf-8")
    config = config_from(file, {"output": str(tmp_path / "out")})
    assert (config.ffn_bits, config.limit) == (("4:16",), 30)
