"""Settings of generation: their types, ends of their own, and cut prompts in plans."""

import pytest

from dart_eval.evaluation import tasks
from dart_eval.evaluation.generation import Generator
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.rotary import Angles
from dart_eval.pruning.session import Session
from dart_eval.sweep.options import config_from, config_of
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens, tiny, word_tokenizer
from tests.helpers.requests import TextRequest, words


def _asked(lm, session=None, **settings):
    """Ask three prompts in one batch; return the token ids and the counted tokens of each."""
    lm.begin(session or Session(), {})
    requests = [TextRequest(words(random_tokens(5 + i, seed=i)), i) for i in range(3)]
    for request in requests:
        request.args = (request.args[0], {**request.args[1], **settings})
    lm.generate_until(requests)
    return [lm.token_ids["t", i] for i in range(3)], [lm.costs["t", i].tokens for i in range(3)]


@pytest.mark.parametrize("several", [False, True])
def test_an_end_among_the_settings_ends_what_is_counted(several):
    """What pads a row after `eos_token_id` of --gen-kwargs is no token of its text."""
    lm = PrunedLM(tiny("llama").float(), word_tokenizer(), batch_size=3, max_length=64)
    whole, _ = _asked(lm)
    end = whole[0][2]
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in whole]
    assert len(expected[0]) < len(whole[0]) and expected[1:] == whole[1:]
    found, counts = _asked(lm, eos_token_id=[end] if several else end)
    assert found == expected
    assert counts == [len(ids) for ids in expected]


def test_the_tokens_of_a_cut_prompt_are_those_that_are_read():
    """A prompt longer than the model is cut from the left, so most of its tokens never run."""
    lm = PrunedLM(tiny("llama"), word_tokenizer(), max_length=64)
    generator = Generator(lm, Session(), lm.planned, Angles(lm.model), {})
    (unit,) = generator.units([("a", TextRequest(words(random_tokens(200)), 0, tokens=8))])
    assert [(p.tokens, p.cut) for p in unit.prompts] == [(56, True)]


@pytest.mark.parametrize(("given", "message"), [
    ("do_sample=no", "do_sample='no'; it must be true or false"),
    ({"do_sample": "off"}, "do_sample='off'; it must be true or false"),
    ("max_gen_toks=abc", "max_gen_toks='abc'; it must be a whole number"),
    ("max_new_tokens=10.5", "max_new_tokens=10.5; it must be a whole number"),
    ("temperature=high,do_sample=true", "temperature='high'; it must be a number"),
    ("until=5", "until=5; it must be a text or a list of texts"),
    ("until={'a', 'b'}", "it must be a text or a list of texts"),
])  # fmt: skip
def test_settings_of_other_types_are_refused_before_anything_is_loaded(given, message):
    """`do_sample=no` is a text, and so true: it drew tokens. Others ended in tracebacks of their libraries."""
    with pytest.raises(UserError, match=message):
        config_of({"gen_kwargs": given})


@pytest.mark.parametrize(("given", "expected"), [
    ("do_sample=False", "do_sample=false"),
    ("until=None", "until=None"), ("until=a", "until=a"),
    ('{"temperature": 0.5, "until": ["a=b"]}', "temperature=0.5,until=['a=b']"),
    ({"until": ["\n", "b"], "temperature": 1}, "temperature=1,until=['\\n', 'b']"), ("temperature=None", None),
])  # fmt: skip
def test_settings_of_their_types_pass(given, expected):
    """lm-eval takes JSON, too."""
    assert config_of({"gen_kwargs": given}).gen_kwargs == (expected or given)


def test_draws_at_a_tasks_own_temperature_of_0_are_refused_with_what_helps():
    """gsm8k has temperature 0.0 itself: the user who types do_sample=true cannot leave it out."""
    own = {"do_sample": False, "temperature": 0.0}
    with pytest.raises(UserError, match="temperature 0 draws none; add temperature=1"):
        tasks.overridden(own, {"do_sample": True})
    assert tasks.overridden(own, {"do_sample": True, "temperature": 0.5})["temperature"] == 0.5
    assert tasks.overridden(own, {"do_sample": False}) == own


@pytest.mark.parametrize(("name", "remedy"), [("num_return_sequences", "leave it out"), ("stop", "use until")])
def test_settings_that_the_harness_gives_itself_are_refused(name, remedy):
    lm = PrunedLM(tiny("llama"), word_tokenizer(), max_length=64)
    with pytest.raises(UserError, match=f"{name} is no setting of a task's generation; {remedy}"):
        _asked(lm, **{name: 0})


def test_groups_of_rounded_weights_are_no_times_of_day(tmp_path):
    """YAML 1.1 reads 4:16 as 256, and the error named a number that nobody had typed."""
    file = tmp_path / "run.yaml"
    file.write_text("ffn_bits: 4:16\ntasks: arc\nlimit: 30\n", encoding="utf-8")
    config = config_from(file, {"output": str(tmp_path / "out")})
    assert (config.ffn_bits, config.limit) == (("4:16",), 30)
