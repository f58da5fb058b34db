"""`prune()` on every family and method: what is masked, what is restored, what is reported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, LlamaConfig

import dart_eval
from dart_eval import rounded_ffns
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.layers.find import find_ffns
from dart_eval.pruning.log import Tally
from dart_eval.pruning.method import Method
from dart_eval.pruning.methods.griffin import NeuronMask
from dart_eval.pruning.methods.rsparse import RSparse
from dart_eval.pruning.methods.teal import Teal
from dart_eval.pruning.registry import methods
from dart_eval.pruning.session import prune
from dart_eval.sweep.dart_lm import DartLM
from dart_eval.util.errors import UserError
from tests.helpers.matrices import on_families
from tests.helpers.models import FAMILIES, SMALL, hooked, random_tokens, save_tiny, tiny
from tests.helpers.sessions import RESTLESS, VARIED, bits, fed, fitting, generate, go_on, open_session, prompts_of, same

PRUNERS = [name for name, cls in methods().items() if cls.prunes and not cls.looks_ahead]
# What they read follows from the sparsity, token by token.
SIZED = [name for name in PRUNERS if methods()[name].sized and methods()[name].write is Method.write]


@on_families(["method"], FAMILIES, SIZED, every=4)
def test_sparsity_zero_is_dense(model, method):
    ids = prompts_of(2, 20)
    dense = generate(model, ids, tokens=6)
    with open_session(model, method, 0.0) as session:
        pruned = generate(model, ids, tokens=6)
    assert torch.equal(dense.sequences, pruned.sequences)
    assert torch.allclose(torch.stack(dense.logits), torch.stack(pruned.logits))
    assert session.effective_sparsity == 0 and (session.prompts_replaced or session.weights_read == 1)


@on_families(["method", "sparsity"], FAMILIES, [(m, (0.3, 0.5, 0.7)[i % 3]) for i, m in enumerate(SIZED)], every=4)
def test_the_label_is_met_exactly_and_reported(model, method, sparsity):
    sparsity = fitting(method, model.config.model_type, sparsity)
    with open_session(model, method, sparsity) as session:
        generate(model, prompts_of(2, 20), tokens=5)
        neurons = sum(f.size for f in find_ffns(model))
        exact = 1 - round((1 - sparsity) * neurons) / neurons
        if isinstance(session.method, NeuronMask):
            for row in range(2):
                assert sum(int(m.sum()) for m in session.masks(row)) == round((1 - sparsity) * neurons)
            assert session.mask_sparsity == pytest.approx(exact)
        if session.method.granularity:  # to a column where it counts them; thresholds meet it on their text
            varies = isinstance(session.method, (Teal, RSparse))
            assert abs(session.weights_read - (1 - exact)) < (0.2 if varies else 0.02)
            exact = 1 - session.weights_read
        assert session.weights_read == pytest.approx(1 - exact)
        assert session.effective_sparsity == pytest.approx(exact * 4 / 5)  # the first token comes from the prefill


@on_families(["method"], FAMILIES, PRUNERS, every=4)
def test_leaving_restores_the_model_bit_for_bit(model, method):
    ids = prompts_of(1, 10)
    state = bits(model)
    sparsity = fitting(method, model.config.model_type, 0.7)
    before = model(ids).logits
    with open_session(model, method, sparsity):
        generate(model, ids, tokens=5)
    with pytest.raises(RuntimeError, match="stop here"):  # noqa: PT012, SIM117
        with open_session(model, method, sparsity):
            generate(model, ids, tokens=5)
            raise RuntimeError("stop here")
    assert same(model, state)
    assert torch.equal(model(ids).logits, before)
    assert not hooked(model)


@pytest.mark.slow
@on_families(["method", "params"], FAMILIES, VARIED, every=3)
def test_a_batch_with_padding_equals_each_sequence_alone(model, method, params):
    lengths = (20, 9, 14)
    prompts = [random_tokens(n, seed=n) for n in lengths]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    attention = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    with open_session(model, method, 0.5, **params) as session:
        together = generate(model, ids, tokens=7, attention_mask=attention)
        events = {(e["sequence"], e["step"]) for e in session.events}
    alone_events = set()
    how = "masked" if method == "grinqh" else "auto"  # kernels round inputs to 15 bits
    for row, prompt in enumerate(prompts):
        with open_session(model, method, 0.5, execution=how, **params) as session:
            alone = generate(model, torch.tensor([prompt]), tokens=7)
            alone_events |= {(row, e["step"]) for e in session.events}
        assert alone.sequences[0, len(prompt) :].tolist() == together.sequences[row, width:].tolist()
        for a, b in zip(alone.logits, together.logits, strict=True):
            assert torch.allclose(a[0], b[row], atol=1e-6)
    assert events == alone_events
    assert bool(events) == any(name.startswith("remask") for name in params)


@pytest.mark.parametrize(("method", "masks"), [("wanda-sp", 1), ("cats", 0)])
def test_masks_for_all_sequences_are_all_that_is_kept_of_them(llama, method, masks):
    """A byte a neuron; no factors, which are in the masks, and nothing of a mask of everything."""
    with open_session(llama, method, 0.5) as session:
        generate(llama, prompts_of(2, 20), tokens=3)
        assert session.method.nbytes() == masks * 120
        assert session.state_bytes <= 100  # counts and sums of tokens


def test_the_python_surface():
    assert set(PRUNERS) <= set(dart_eval.methods())
    for method, sparsity, word in (("grifin", 0.5, "griffin"), ("griffin", 1.0, "outside"), ("flap", 0.5, "tokenizer")):
        with pytest.raises(UserError, match=word), prune(tiny("llama"), method, sparsity):
            pass


# -- logs, traces, rows taken up again, tokens taken back -------------------------------------------------------------


def test_a_new_prompt_begins_a_new_log_and_a_trace_is_of_one_sequence_up_to_a_token(llama):
    with open_session(llama, "dart", 0.5, **RESTLESS) as session:
        for rows in (1, 2):
            generate(llama, prompts_of(rows, 20), tokens=9)
            logs = session.events, session.log.alarms
            assert [sorted(e["token"] for e in log) for log in logs] == [[3] * rows + [6] * rows] * 2
            assert len(session.steps) == session.log.decoded == 8 and len(session.log.signals) == 2
        whole, cut = session.trace(1), session.trace(1, tokens=5)
    assert whole["alarms"] == whole["remasks"] == [3, 6]
    assert cut["alarms"] == cut["remasks"] == [3]
    assert (len(whole["signal"]), cut["signal"]) == (2, whole["signal"][:1])


@torch.no_grad()
def test_a_forward_under_frozen_masks_leaves_everything_as_it_was(llama):
    ids = prompts_of(1, 20)
    with open_session(llama, "dart", 0.5, **RESTLESS) as session:
        with session.context(torch.ones_like(ids, dtype=torch.bool)):
            out = llama(ids, use_cache=True)
        watch = session.rows.watch
        before = [t.clone() for t in (*watch.ring.slots, *session.rows.mask, watch.drift.window_sum)]
        with session.decode(torch.ones(1, 7, dtype=torch.bool), frozen=True):
            go_on(llama, out, ids[:, :7])
        now = [*watch.ring.slots, *session.rows.mask, watch.drift.window_sum]
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        assert session.events == session.log.alarms == []


@torch.no_grad()
def test_a_prompt_of_generate_says_nothing_of_later_ones(llama):
    with open_session(llama, "griffin", 0.5) as session:
        generate(llama, prompts_of(1, 30), tokens=3)
        fed(llama, llama(prompts_of(1, 8), use_cache=True), random_tokens(4))
        assert (session.rows.seen.tolist(), session.log.decoded) == ([8], 4)


# -- tokens taken back -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=8)
@given(
    st.sampled_from([("griffin", {}), ("grinqh", {}), ("dart", RESTLESS), ("dart", {"remask.release": 4})]),
    st.integers(1, 2), st.integers(0, 7), st.lists(st.integers(4, 90), min_size=1, max_size=9), st.data(),
)  # fmt: skip
def test_tokens_that_are_taken_back_were_never_decoded(method, batch, before, wrong, data):
    """Under griffin the cache alone is cut; of masks that change, the sequences before them are given."""
    name, params = method
    back, (model, ids) = data.draw(st.integers(0, len(wrong))), (tiny("llama"), prompts_of(batch, 20))
    ours, right = random_tokens(before, seed=1), random_tokens(8, seed=2)
    kept, wrong = wrong[: len(wrong) - back], wrong[len(wrong) - back :]
    with open_session(model, name, 0.5, **params) as session:
        _, out = fed(model, model(ids, use_cache=True), [*ours, *kept])
        wanted, _ = fed(model, out, right)
        remasks = session.remasks
    with open_session(model, name, 0.5, **params) as session:
        _, out = fed(model, model(ids, use_cache=True), [*ours, *kept])
        rows = session.rows.select(torch.arange(batch)) if name == "dart" else None
        if wrong:
            fed(model, out, wrong)
            session.rewind(len(wrong), rows)
        found, _ = fed(model, out, right)
        assert session.remasks == remasks
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("family", "method", "tokens", "words"), [
    ("gemma3", "griffin", [1], "use a DynamicCache"), ("llama", "dart", [1], "give the rows before them"),
    ("llama", "griffin", [4], "since the prompt: 3"), ("llama", "griffin", [2, 2], "since the prompt: 1"),
    ("llama", "griffin", [-1], "cannot be taken back"),
])  # fmt: skip
def test_tokens_that_cannot_be_taken_back_stay(family, method, tokens, words):
    model, ids = tiny(family), prompts_of(1, 20)
    with open_session(model, method, 0.5) as session:
        _, out = fed(model, model(ids, use_cache=True), [5, 6, 7])
        for back in tokens[:-1]:
            session.rewind(back)
        with pytest.raises(UserError, match=words):
            session.rewind(tokens[-1])
        assert out.past_key_values.get_seq_length() == 23 - sum(tokens[:-1])
        fed(model, out, [8])


# -- effective sparsity by hand: blocks, and what a batch computes for a sequence that has ended ----------------------


def test_every_token_of_a_block_counts_and_one_without_word_of_its_end_goes_on():
    tally, half = Tally(), torch.tensor([0.5])
    tally.context(1, False)
    tally.decode(half, 1, torch.tensor([True]))
    assert tally.share == 0
    tally.decode(half, 3)
    tally.decode(torch.tensor([1.0]), 1)
    assert tally.share == pytest.approx(4 * 0.5 / 6)


# -- what a developer meets who uses the package as a library ---------------------------------------------------------


def test_a_head_that_was_untied_stays_so(tokenizer):
    """Adapters that train the head untie it, whatever the configuration says; `HFLM` would tie it again."""
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 32))
    wanted = model(prompts_of(1, 8)).logits
    PrunedLM(model, tokenizer)
    assert model.lm_head.weight is head and torch.equal(model(prompts_of(1, 8)).logits, wanted)


def test_rounding_inside_rounding_leaves_the_outer_one(llama):
    read = []
    with rounded_ffns(llama, 4):
        for bits in (16, 8, 16):
            with rounded_ffns(llama, bits), prune(llama, "griffin", 0.5) as session:
                read.append(session.weights_read)
    assert read[0] == read[2] < read[1] < 0.6


@torch.no_grad()
def test_what_is_read_is_a_mean_over_batches_of_several_sizes(llama):
    with open_session(llama, "teal", 0.5) as session:
        out = llama(prompts_of(3, 12), use_cache=True)
        for rows in ([0, 1, 2], [0, 2]):
            out.past_key_values.batch_select_indices(torch.tensor(rows))
            out = go_on(llama, out, torch.full((len(rows), 1), 7))
        assert 0 < session.weights_read < 1


def test_a_second_call_draws_with_its_own_seed(tmp_path, tokenizer):
    """As `simple_evaluate` does, which seeds torch and asks; the same object may be given again."""
    lm = DartLM(save_tiny(tmp_path, tokenizer), method="griffin", sparsity=0.5, dtype="float32")
    settings = {"until": [], "do_sample": True, "max_gen_toks": 8}

    def drawn(seed):
        torch.manual_seed(seed)
        return lm.generate_until([Instance("generate_until", {}, ("w5 w6", settings), 0, metadata=("t", 0, 1))])

    first = drawn(1)
    assert drawn(2) != first == drawn(1)
