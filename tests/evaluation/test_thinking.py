"""Models that think first: prompts and answers are those of lm-eval's `HFLM`."""

import copy
from types import SimpleNamespace

import pytest
from lm_eval.models.huggingface import HFLM

import dart_eval
from dart_eval.evaluation.generation import Generator
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.evaluation.rotary import Angles
from dart_eval.pruning.session import Session
from dart_eval.results.store import Store
from dart_eval.sweep import run
from dart_eval.sweep.options import config_from
from dart_eval.util.errors import UserError
from tests.helpers.models import random_tokens, save_tiny, tiny
from tests.helpers.requests import TextRequest, words
from tests.helpers.sessions import open_session

TEMPLATE = (
    "{% for m in messages %}w4 {{ m['content'] }} {% endfor %}"
    "{% if enable_thinking is defined %}{{ 'w5' if enable_thinking else 'w6' }}{% else %}w7{% endif %}"
)


@pytest.fixture
def chatty(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


def _asked(length, until=()):
    return TextRequest(words(random_tokens(length, seed=length)), length, until, tokens=12)


def _answers(lm, requests, session=None):
    if isinstance(lm, PrunedLM):
        lm.begin(session or Session(), {})
    return lm.generate_until(requests, disable_tqdm=True)


def _both(chatty, requests, **given):
    """Answers, which are also those of `HFLM`."""
    model = tiny("llama")
    ours = _answers(PrunedLM(model, chatty, batch_size=2, **given), requests)
    assert ours == _answers(HFLM(pretrained=model, tokenizer=chatty, batch_size=1, **given), requests)
    return ours


def test_answers_begin_after_the_last_end_of_thinking_as_in_hflm(chatty):
    requests = [_asked(n) for n in (5, 20, 11)]
    whole = _both(chatty, requests)
    said, changed = [text.split() for text in whole], 0
    for word in (said[0][0], said[1][len(said[1]) // 2], said[2][-1]):
        for end in (word, str(chatty.convert_tokens_to_ids(word)), "w999"):
            ours = _both(chatty, requests, enable_thinking=True, think_end_token=end)
            if not end.isdigit():
                assert [t.split() for t in ours] == [t.split(end)[-1].split() for t in whole]
            changed += ours != whole
    assert changed >= 4


def test_a_stop_sequence_ends_an_answer_after_the_thoughts_are_gone(chatty):
    said = _both(chatty, [_asked(20)])[0].split()
    stop = next(word for word in said[4:] if word not in said[:4])
    for end in (said[1], str(chatty.convert_tokens_to_ids(said[1]))):
        (ours,) = _both(chatty, [_asked(20, [stop])], think_end_token=end)
        assert stop not in ours.split() and said[0] not in ours.split()[:1]


def test_an_answer_has_no_blanks_before_it(chatty, monkeypatch):
    """Where tokens are words with their blanks."""
    for end in ("w6", "6"):
        lm = PrunedLM(tiny("llama"), chatty, think_end_token=end)
        monkeypatch.setattr(lm, "tok_decode", lambda tokens, **_: "".join(f" w{token}" for token in tokens))
        generator = Generator(lm, Session(), lm.planned, Angles(lm.model), {})
        assert generator._answer([5, 6, 7, 6, 8, 9, 4], ["w9"]) == "w8 "


def test_thoughts_count_as_generated_tokens(chatty):
    model, end = tiny("llama"), None
    for shorter in (False, True):
        lm = PrunedLM(model, chatty, think_end_token=end)
        with open_session(model, "griffin", 0.5) as session:
            (answer,) = _answers(lm, [_asked(20)], session)
        assert (len(answer.split()) < 12) == shorter and lm.costs["t", 20].tokens == 12
        end = end or answer.split()[7]


@pytest.mark.parametrize(("thinks", "word"), [(None, "w7"), (True, "w5"), (False, "w6")])
def test_the_chat_template_is_told(chatty, thinks, word):
    model, chat = tiny("llama"), [{"role": "user", "content": "w8"}]
    given = {"enable_thinking": thinks, "think_end_token": "w9"}
    prompt = PrunedLM(model, chatty, **given).apply_chat_template(chat)
    assert prompt == HFLM(pretrained=model, tokenizer=chatty, **given).apply_chat_template(chat) == f"w4 w8 {word}"


@pytest.mark.parametrize(("given", "word"), [
    ({"enable_thinking": True, "think_end_token": "x"}, "--chat-template"),
    ({"enable_thinking": False}, "--chat-template"), ({"think_end_token": ""}, "at least 1 character"),
    ({"enable_thinking": True, "chat_template": True}, "the token that ends thinking"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(given, word):
    with pytest.raises(UserError, match=word):
        config_from(None, {"tasks": "gsm8k", **given})


@pytest.mark.parametrize("kind", ["multiple_choice", "loglikelihood", "generate_until"])
def test_given_answers_are_no_task_for_a_model_that_thinks(kind, monkeypatch):
    monkeypatch.setattr(run, "leaves", lambda items: [SimpleNamespace(task_name="arc", OUTPUT_TYPE=kind)])
    given = {"tasks": "arc", "chat_template": True, "think_end_token": "x"}
    run.check_answers([], config_from(None, {**given, "enable_thinking": False}))
    thinks = config_from(None, {**given, "enable_thinking": True})
    if kind == "generate_until":
        return run.check_answers([], thinks)
    with pytest.raises(UserError, match="task arc"):
        run.check_answers([], thinks)


@pytest.mark.slow
def test_it_is_part_of_what_a_cell_is_asked(chatty, tmp_path):
    model = save_tiny(tmp_path / "model", chatty)
    asked = {"tasks": "smoke_summary", "method": "griffin", "limit": 1, "gen_kwargs": "max_gen_toks=4"}
    settings = [{}, {"enable_thinking": False}, {"enable_thinking": True, "think_end_token": "w9"}]
    for given in settings:
        dart_eval.evaluate(model, **asked, chat_template=True, output=tmp_path / "out", **given)
    store, found = Store(tmp_path / "out"), {}
    for record in store.load():
        said = {k: v for k, v in record.inputs.items() if k in ("enable_thinking", "think_end_token")}
        (text,) = store.texts(record).values()
        found[text["prompt"].split()[-1]] = said
    assert found == dict(zip(("w7", "w6", "w5"), settings, strict=True))
