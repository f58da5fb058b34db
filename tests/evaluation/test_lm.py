"""The lm-eval model: generation, what it costs, prompts that must be cut, and answers of an earlier run."""

import copy
import json
import math
import zlib
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from dart_eval.evaluation.costs import Cost
from dart_eval.evaluation.evaluate import _stderr
from dart_eval.evaluation.generation import GenerationLog, Generator, fit
from dart_eval.evaluation.lm import PrunedLM, truncated
from dart_eval.evaluation.requests import Request, Score
from dart_eval.evaluation.rotary import Angles
from dart_eval.evaluation.states import States
from dart_eval.evaluation.tasks import Tasks, whole_tokens
from dart_eval.pruning.session import Session
from dart_eval.results.store import Journal
from dart_eval.util.errors import UserError
from tests.helpers.matrices import in_turn
from tests.helpers.models import random_tokens, tiny
from tests.helpers.requests import TextRequest, words
from tests.helpers.sessions import RESTLESS, open_session


@pytest.fixture
def lm(tokenizer):
    return PrunedLM(tiny("llama"), tokenizer, batch_size=2)


def test_dense_generation_equals_stock_hflm(lm, tokenizer):
    requests = [TextRequest(words(random_tokens(n, seed=n)), n) for n in (5, 20, 11)]
    lm.begin(Session(), {})
    stock = HFLM(pretrained=lm.model, tokenizer=tokenizer, batch_size=2)
    assert lm.generate_until(requests) == stock.generate_until(requests, disable_tqdm=True)
    assert {d: lm.costs["t", d].tokens for d in (5, 20, 11)} == dict.fromkeys((5, 20, 11), 8)


def test_texts_after_scored_answers_cost_what_they_cost_alone(lm):
    asked, requests = TextRequest("", 0), [TextRequest(words(random_tokens(7, seed=n)), n) for n in range(2)]
    asked.args = (words(random_tokens(5)), " w9 w8")
    lm.begin(Session(), {})
    texts = lm.generate_until(requests)
    cost = lm.costs["t", 1]
    lm.begin(Session(), {})
    lm.loglikelihood([asked])
    assert lm.generate_until(requests) == texts and lm.costs["t", 1] == cost


def test_a_token_over_the_end_of_a_context_begins_the_answers_of_drift():
    """Stock loses it. Qwen's tokenizer has such ones: a full stop and the empty line behind it."""
    pieces = ("<unk>", "He", " said", ".", ".\n\n", "\n\n", "It", " rained")
    raw = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    raw.pre_tokenizer = Split(Regex(r"[^\s\w]+\n*|\n+| ?\w+"), "isolated")
    raw.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<unk>")
    model = tiny("llama")
    lm, stock = PrunedLM(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer)

    def pair(one, *texts):
        return tuple(tokenizer.decode(part) for part in one._encode_pair(*texts))

    merged, apart = ("He said.", "\n\nIt rained."), ("He said", "\n\nIt rained.")
    assert pair(stock, *merged) == pair(lm, *merged) == ("He said.", "It rained.")
    lm.begin(Session(), {}, whole_tokens=True)
    assert pair(lm, *merged) == ("He said", ".\n\nIt rained.")
    assert pair(stock, *apart) == pair(lm, *apart) == apart
    asked = {name: whole_tokens(Tasks().load(name)) for name in ("drift_smoke", "smoke_drift", "smoke_stories")}
    assert asked == {"drift_smoke": True, "smoke_drift": True, "smoke_stories": False}


def test_generation_does_not_depend_on_the_batch_size(tokenizer):
    """Nor does `auto`, which runs prompts together up to their tokens and the new ones."""
    model, rows = tiny("llama"), []
    requests = [TextRequest(words(random_tokens(n, seed=n)), n) for n in (5, 20, 11, 12, 13, 14, 15)]
    texts = []
    for batch_size in (1, 4, "auto"):
        lm = PrunedLM(model, tokenizer, batch_size=batch_size)
        lm.begin(Session(), {})
        with mock.patch.object(lm, "_model_generate", wraps=lm._model_generate) as step:  # lm-eval's, of one batch
            texts.append(lm.generate_until(requests))
        rows += [len(call.kwargs["context"]) for call in step.call_args_list]
    assert texts[0] == texts[1] == texts[2]
    assert rows == [1] * 7 + [3, 4] + [7] or rows == [1] * 7 + [4, 3] + [7]


def test_generated_tokens_but_the_first_are_pruned(lm):
    requests = [TextRequest(words(random_tokens(n, seed=n)), n) for n in (5, 20, 11)]
    with open_session(lm.model, "dart", 0.7, **RESTLESS) as session:
        lm.begin(session, {})
        lm.generate_until(requests)
    for doc in (5, 20, 11):
        used = lm.costs["t", doc]
        assert (used.tokens, used.pruned_tokens, used.context_tokens) == (8, 7, doc)
        assert used.effective_sparsity == pytest.approx(0.7 * 7 / 8)
        assert used.mask_sparsity == pytest.approx(0.7)
        # re-masks after decoding forwards 3 and 6 of the 7, where the prompt has windows to compare with
        assert used.remasks == (2 if doc > 3 else 0)
    assert lm.journal.state_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flap", "griffin"])
def test_a_sequence_adds_as_much_side_by_side_with_others_as_alone(method, tokenizer):
    kept = []
    for rows in (1, 4):
        lm = PrunedLM(tiny("llama"), tokenizer, batch_size=rows)
        requests = [TextRequest(words(random_tokens(9, seed=n)), n) for n in range(4)]
        with open_session(lm.model, method, 0.5) as session:
            lm.begin(session, {})
            lm.generate_until(requests)
        kept.append(lm.journal.state_bytes)
    assert kept[1] == kept[0] > 0


def test_tokens_after_a_stop_sequence_do_not_count(lm):
    prompt = words(random_tokens(20, seed=20))
    lm.begin(Session(), {})
    (whole,) = lm.generate_until([TextRequest(prompt, 1)])
    third = whole.split()[2]
    first = whole.split().index(third)
    with open_session(lm.model, "griffin", 0.0) as session:
        lm.begin(session, {})
        (cut,) = lm.generate_until([TextRequest(prompt, 1, until=[third])])
    assert cut.split() == whole.split()[:first]
    assert lm.costs["t", 1].tokens == first + 1


@pytest.mark.parametrize(("tokens", "until", "count"), [
    ([5, 6, 2, 0, 0], [], 3), ([5, 6, 7], [], 3), ([5, 50, 0], [], 2),  # an end of two
    ([5, 57, 49, 49], ["w57"], 2), ([5, 57, 49, 49], ["w49"], 3),  # a special one, as <|im_end|>
])  # fmt: skip
def test_what_ends_a_text_counts_and_what_follows_does_not(tokenizer, tokens, until, count):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["w57"]})
    model = tiny("llama")
    model.generation_config.eos_token_id = [2, 50]
    lm = PrunedLM(model, tokenizer)
    # Which tokens count, apart from a model that would have to write them.
    assert Generator(lm, Session(), lm.planned, Angles(model), {}).counted(tokens, until) == count


@pytest.mark.parametrize(("before", "length", "most"), [
    ("w4 w5 w6", 60, 30), ("w4 w5 w6", 60, 65), ("{} w9 w4", 20, 39), (words(random_tokens(40)), 20, 30),
])  # fmt: skip
def test_the_document_is_cut_where_it_is_asked_about_never_the_cue_or_the_instruction(lm, before, length, most):
    """An example may have it, too."""
    document = words(random_tokens(length, seed=1))
    before = before.format(document)
    prompt = f"{before} {document} w7 w8"
    around = len(before.split()) + 2
    if around > most:
        with pytest.raises(UserError, match="no room"):
            fit(lm, TextRequest(prompt, 0, doc={"text": document}), most, "text")
        return
    short, cut = fit(lm, TextRequest(prompt, 0, doc={"text": document}), most, "text")
    assert cut == (around + length > most)
    assert short.split() == [*before.split(), *document.split()[: most - around], "w7", "w8"]


def test_other_prompts_keep_their_last_tokens_as_in_lm_eval(tokenizer):
    model = tiny("llama")
    lm = PrunedLM(model, tokenizer, batch_size=1, max_length=40)
    request = TextRequest(words(random_tokens(60, seed=3)), 0)
    lm.begin(Session(), {})
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=40)
    assert lm.generate_until([request]) == stock.generate_until([request], disable_tqdm=True)


def test_contexts_are_cut_from_the_left_as_in_hflm(tokenizer):
    model = tiny("llama").float()
    pairs = [(("", ""), list(random_tokens(50, seed=1)), list(random_tokens(6, seed=2)))]
    ours = PrunedLM(model, tokenizer, max_length=30)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=30)
    # lm-eval's public call takes texts; these are tokens.
    (a, _), (b, _) = ours._loglikelihood_tokens(pairs)[0], theirs._loglikelihood_tokens(pairs, disable_tqdm=True)[0]
    assert a == pytest.approx(b, abs=1e-4)
    with pytest.raises(UserError, match="does not fit"):
        ours._loglikelihood_tokens([(("", ""), [4], list(random_tokens(40)))])


def test_what_a_row_writes_after_its_end_is_no_part_of_its_text(tokenizer):
    """In a batch it goes on until all have ended, where the model's own settings name no end."""
    model, tokens = tiny("llama"), random_tokens(20, seed=20)
    lm = PrunedLM(model, tokenizer, batch_size=2)
    # A model that would go on after its end, as rows of a batch do.
    lm._model_generate = lambda context, *_, **__: torch.cat([context, torch.tensor([[5, 2, 7, 8], [5, 6, 7, 8]])], 1)
    lm.begin(Session(), {})
    texts = lm.generate_until([TextRequest(words(tokens), 1), TextRequest(words(tokens[1:]), 2)])
    assert texts == ["w5", "w5 w6 w7 w8"]


def test_an_answer_may_fill_the_context_and_has_a_token_of_its_own(lm):
    answer = list(random_tokens(30))
    found = truncated([4, 5, 6], answer, 30)  # its last token is only predicted, so one of the context fits too
    assert (found.context, found.continuation) == ((6,), tuple(answer))
    with pytest.raises(UserError, match="no token of its own"):
        truncated([1, 2], [], 8)
    lm.begin(Session(), {})
    scores = lm._loglikelihood_tokens([(None, [], [5, 6]), (None, [lm.prefix_token_id], [5, 6])])
    assert scores[0] == scores[1]  # a context without one begins the text


def test_shares_are_means_over_the_tokens_that_they_speak_of():
    counts = {"tokens": 4, "pruned_tokens": 2, "remasks": 1, "context_tokens": 10, "contexts": 1}
    one = Cost(**counts, not_read_sum=1.0, outside_sum=0.6, trace={"window": 10})
    other = Cost(tokens=6, pruned_tokens=3, not_read_sum=1.4, outside_sum=0.9, context_tokens=5, contexts=1)
    total = one + other
    assert (total.trace, (one + Cost()).trace) == (None, one.trace)  # what a detector saw is of one context
    assert total.effective_sparsity == pytest.approx(2.4 / 10)
    assert total.read == pytest.approx(1 - 2.4 / 5)
    assert total.mask_sparsity == pytest.approx(1.5 / 5)
    assert (total.remasks, total.mean_context) == (1, 7.5)


def test_a_text_that_begins_with_the_prefix_token_has_it_once(lm):
    lm.begin(Session(), {})
    text = words(random_tokens(20, seed=4))
    requests = [TextRequest(text, 0), TextRequest(f"<bos> {text}", 1)]
    for request in requests:
        request.args = request.args[:1]
    plain, begun = lm.loglikelihood_rolling(requests)
    assert plain == begun
    assert plain.coverage == begun.coverage


def test_re_masks_count_with_the_first_token_that_is_decoded_after_them(lm):
    """Windows of three: re-masks follow the decoding forwards 3 and 6, which make tokens 4 and 7."""
    with open_session(lm.model, "dart", 0.5, **RESTLESS) as session:
        log = GenerationLog(session)
        with log.watching(lm.model):
            lm.model.generate(torch.tensor([random_tokens(20)]), max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert [log.cost(0, n).remasks for n in range(1, 9)] == [0, 0, 0, 1, 1, 1, 2, 2]


# -- answers of an earlier run -----------------------------------------------------------------------------------------

SCORED = [Request(random_tokens(9, seed=i), random_tokens(2, seed=10 + i)) for i in range(3)]
WRITTEN = [TextRequest(words(random_tokens(5 + i, seed=i)), i, tokens=3) for i in range(3)]
ASKED = {"scores": lambda lm: lm._score(SCORED), "texts": lambda lm: lm.generate_until(WRITTEN)}


def _answers(lm, kind, path=None):
    """What a call gives that goes on with a journal, and what its tokens cost."""
    journal = Journal(path)
    lm.begin(Session(), {}, journal)
    found = ASKED[kind](lm)
    return found, [c for _, c in sorted(lm.costs.items())], journal


def _sealed(lines):
    texts = [json.dumps(line).encode() for line in lines]
    return b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)


@pytest.fixture
def earlier(lm, tmp_path):
    """A call, its journal's path, its lines, and what it gave."""

    def make(kind):
        path = tmp_path / "cell.jsonl"
        found, costs, _ = _answers(lm, kind, path)
        return path, [json.loads(line.partition(b" ")[2]) for line in path.read_bytes().splitlines()], found, costs

    return make


def _with_trace(answer, **trace):
    return {**answer, "cost": {**answer["cost"], "trace": trace}}


FORGED = {
    "null": lambda a: None, "a text": lambda a: "x", "two kinds": lambda a: {**a, "text": "x", "logprob": -1.0},
    "a number as text": lambda a: {**a, "logprob": "-1", "text": 1}, "NaN": lambda a: {**a, "logprob": math.nan},
    "nothing": lambda a: {}, "no cost": lambda a: {**a, "cost": None}, "an old cost": lambda a: {**a, "cost": {"t": 1}},
    "NaN read": lambda a: {**a, "cost": {**a["cost"], "not_read_sum": math.nan}},
    "tokens below none": lambda a: {**a, "cost": {**a["cost"], "tokens": -1}},
    "a further field": lambda a: _with_trace(a, signal=[0.5], window=4, schema=1),
    "a trace in words": lambda a: _with_trace(a, signal=["low"], window=4),
    "unusable": lambda a: {**a, "usable": False, "logprob": math.inf},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "forged"), in_turn([*ASKED], [*FORGED]))
def test_an_answer_in_a_journal_that_is_none_is_computed_anew(lm, earlier, kind, forged):
    path, lines, found, costs = earlier(kind)
    name = next(iter(lines[0][0]))
    lines[0][0][name] = FORGED[forged](lines[0][0][name])
    path.write_bytes(_sealed(lines))
    assert _answers(lm, kind, path)[:2] == (found, costs)
    whole = path.read_bytes()
    assert _answers(lm, kind, path)[:2] == (found, costs)  # of a name's lines the last counts: none is added
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", ASKED)
def test_what_a_journal_holds_is_not_asked_again(lm, earlier, kind):
    path, _, found, costs = earlier(kind)
    before = path.read_bytes()
    assert _answers(lm, kind, path)[:2] == (found, costs)
    assert path.read_bytes() == before


def _places(data, at=()):
    """The paths of all values of JSON data."""
    yield at
    for step, item in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from _places(item, (*at, step))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner), max_leaves=4
)


@settings(max_examples=max(50, settings.default.max_examples // 2), suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.slow
def test_no_line_of_a_journal_fails_a_call_or_gives_what_is_no_answer(lm, earlier, kind, data):
    path, lines, found, _ = earlier(kind)
    lines = copy.deepcopy(lines)
    place = data.draw(st.sampled_from([at for at in _places(lines) if at]))
    holder = lines
    for step in place[:-1]:
        holder = holder[step]
    was, forged = holder[place[-1]], data.draw(ANYTHING)
    holder[place[-1]] = forged
    path.write_bytes(_sealed(lines))
    now, costs, journal = _answers(lm, kind, path)
    path.unlink()
    assert math.isfinite(journal.seconds) and journal.seconds >= 0 and journal.state_bytes >= 0
    assert all(math.isfinite(c.not_read_sum) and c.tokens >= 0 for c in costs)
    for answer in now:
        assert type(answer) is str or (math.isfinite(answer.logprob) and type(answer.greedy) is bool)
    if type(forged) is not type(was) and {type(forged), type(was)} != {int, float}:
        assert now == found


def test_answers_without_kl_are_not_taken_for_answers_with_it(lm, monkeypatch):
    asked = []

    def ask(kind, named, *more):
        asked.append([*named])
        return dict.fromkeys(named, Score(0.0, False, Cost()))

    monkeypatch.setattr(lm, "_ask", ask)
    for states in (States(1, [torch.zeros(1, 16).byte(), torch.zeros(1, 2)]), States(1, []), None):  # 2: no room, no KL
        monkeypatch.setattr(lm, "states", states)
        lm._score([Request((1, 2), (3,))])
    assert asked[0] != asked[1] == asked[2]


@pytest.mark.parametrize(("metric", "pairs"), [
    ("exact", [({"a": 1}, {"b": 2})] * 3), ("f1", [(0, 1), (1, 1), (2, 2), (1, 0)]),
    ("brier_score", [(1, [0.2, 0.8])] * 3),
])  # fmt: skip
def test_pairs_of_other_metrics_have_no_error_of_a_perplexity(metric, pairs):
    assert _stderr(metric, pairs) is None
    assert _stderr("word_perplexity", [(-1.0, 2), (-3.0, 2)]) > 0
