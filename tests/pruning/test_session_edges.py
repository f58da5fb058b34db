"""What a session must notice or refuse: chats, ends in a batch, caches of others, exceptions, layers that changed."""

import copy
import functools
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, OpenAIGPTConfig, StoppingCriteria

from dart_eval.kernels.cpu import build
from dart_eval.layers.families import cache_argument
from dart_eval.layers.find import GUARD, find_ffns
from dart_eval.pruning.registry import make
from dart_eval.pruning.session import prune
from dart_eval.util.bits import Rounding
from dart_eval.util.errors import UserError
from dart_eval.weights.decoded import Decoded
from dart_eval.weights.rounding import rounded
from tests.helpers.models import Adapted, biased, odd_llama, random_tokens, tiny
from tests.helpers.sessions import RESTLESS, bits, cache_of, generate, go_on, open_session, same


def prompt(length=20, seed=0):
    return torch.tensor([random_tokens(length, seed=seed)])


# What a user may do to a model: numbers are held elsewhere.
pytestmark = pytest.mark.slow


# -- effective sparsity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["griffin", "random"])
def test_every_turn_of_a_chat_has_one_dense_token(llama, method):
    with open_session(llama, method, 0.5) as session:
        out = generate(llama, prompt(), 5)
        ids = torch.cat([out.sequences, prompt(4, seed=9)], 1)
        generate(llama, ids, 5, **{cache_argument(llama): cache_of(out)})
        assert session.effective_sparsity == pytest.approx(0.5 * 8 / 10)


def test_a_prompt_in_chunks_has_one_dense_token(llama):
    with open_session(llama, "griffin", 0.5) as session:
        generate(llama, prompt(), 5, prefill_chunk_size=7)
        assert session.effective_sparsity == pytest.approx(0.5 * 4 / 5)
        generate(llama, prompt(seed=3), 1)
        out = generate(llama, prompt(seed=4), 1)
        assert session.effective_sparsity == pytest.approx(0.5 * 4 / 7)
        ids = torch.cat([out.sequences, prompt(3, seed=5)], 1)
        generate(llama, ids, 1, **{cache_argument(llama): cache_of(out)})  # a turn, not a chunk
        assert session.effective_sparsity == pytest.approx(0.5 * 4 / 8)


def test_a_prefix_that_was_cached_before_serves_every_prompt(llama):
    """As transformers' documentation has it: a copy of the prefix's cache for each prompt."""
    name, prefix = cache_argument(llama), prompt(8)
    with torch.no_grad():
        cached = cache_of(llama(prefix, use_cache=True))
    with torch.no_grad(), open_session(llama, "random", 0.5) as session:
        for tokens in (9, 4):
            ids = torch.cat([prefix, prompt(5, seed=tokens)], 1)
            generate(llama, ids, tokens, **{name: copy.deepcopy(cached)})
        assert session.effective_sparsity == pytest.approx(0.5 * 11 / 13)


def test_a_cache_that_was_filled_before_is_refused_where_masks_are_made_from_the_prompt(llama):
    """The mask would be made from the tokens alone that come inside the block."""
    for tokens in (1, 4):
        out = llama(prompt(), use_cache=True)
        refused = pytest.raises(UserError, match="20 tokens")
        with open_session(llama, "griffin", 0.5) as session, session.prompt(), refused:
            go_on(llama, out, prompt(tokens))


@pytest.mark.parametrize("given", ["option", "model", "config"])
def test_what_a_batch_computes_after_the_end_of_a_sequence_is_no_token_of_it(llama, given):
    ids = torch.cat([prompt(seed=1), prompt(seed=2)])
    with open_session(llama, "griffin", 0.5):
        free = generate(llama, ids, 10).sequences[:, 20:]
    said = free.tolist()
    end = next(t for t in said[0][1:-2] if t not in said[1] and t != said[0][0])
    kept = said[0].index(end) + 1
    options = {"eos_token_id": end} if given == "option" else {}
    if given != "option":
        llama.generation_config.eos_token_id = end
    if given == "config":  # of a call, which says nothing of ends: the model's holds
        options["generation_config"] = GenerationConfig(do_sample=False, return_dict_in_generate=True)
    with open_session(llama, "griffin", 0.5) as session:
        generate(llama, ids, 10, **options)
        assert session.effective_sparsity == pytest.approx(0.5 * (kept - 1 + 9) / (kept + 10))


def test_padding_that_a_sequence_says_itself_is_a_token_of_it(llama):
    ids = torch.cat([prompt(seed=1), prompt(seed=2)])
    with open_session(llama, "griffin", 0.5) as session:
        said = generate(llama, ids, 10).sequences[:, 20:].tolist()
    middle = next(t for t in said[0][:-2] if t not in (said[0][-2], said[1][-2]))
    with open_session(llama, "griffin", 0.5) as session:
        generate(llama, ids, 10, pad_token_id=middle)  # nothing ends: no end of sequence is set
        assert session.effective_sparsity == pytest.approx(0.5 * 9 / 10)


# -- phases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 15])
def test_a_last_chunk_of_one_token_belongs_to_the_prompt(llama, length):
    ids = prompt(length)
    with open_session(llama, "griffin", 0.5) as session:
        whole = generate(llama, ids, 6).sequences
        tokens = session.rows.seen.tolist()
        chunked = generate(llama, ids, 6, prefill_chunk_size=7).sequences
        assert session.rows.seen.tolist() == tokens == [length]
    assert whole.tolist() == chunked.tolist()


def test_a_turn_of_one_token_belongs_to_the_context(llama):
    name = cache_argument(llama)
    with open_session(llama, "griffin", 0.5) as session:
        out = generate(llama, prompt(), 1)
        turn = generate(llama, torch.cat([prompt(), prompt(1, seed=8)], 1), 3, **{name: cache_of(out)})
        assert session.rows.seen.tolist() == [21] and turn.sequences.shape[1] == 24


@pytest.mark.parametrize("method", ["random", "griffin"])
def test_several_tokens_on_a_filled_cache_are_refused_unless_they_are_said_to_be_prompt(llama, method):
    """They would run dense, though one by one they run pruned: scored answers would be the dense model's."""
    ids, name = prompt(21), cache_argument(llama)
    with torch.no_grad(), open_session(llama, method, 0.5) as session:
        cache = {name: cache_of(llama(ids[:, :19], use_cache=True))}
        with pytest.raises(UserError, match="2 tokens after 19"):
            llama(ids[:, 19:], use_cache=True, **cache)
        with session.prompt():
            turn = llama(ids[:, 19:], use_cache=True, **cache).logits
    assert torch.allclose(turn, llama(ids).logits[:, 19:])


@pytest.mark.parametrize("method", ["random", "griffin"])
def test_arguments_without_names_are_what_they_are_with_them(llama, method):
    """A cache: it would be taken for none, and every token for a prompt. And padding."""
    names, found = ("input_ids", "attention_mask", "position_ids", cache_argument(llama)), []
    mask = torch.tensor([[0] * 4 + [1] * 18])
    for named in (True, False):
        cache = None
        with torch.no_grad(), open_session(llama, method, 0.5) as session:
            for tokens in (prompt(), prompt(1, seed=1), prompt(1, seed=2)):
                given = tokens, mask[:, : 20 + session.log.decoded + (cache is not None)], None, cache
                out = llama.model(**dict(zip(names, given, strict=True))) if named else llama.model(*given)
                cache = cache_of(out)
            assert session.effective_sparsity == pytest.approx(0.5 * 2 / 3)
        found.append(out[0])
    assert torch.equal(*found)


# -- refusals ------------------------------------------------------------------------------------------------------


def of_another_prompt(model):
    """As long as the last one's, which may be gone, and whose masks would run."""
    first = cache_of(model(prompt(seed=1), use_cache=True))
    model(prompt(seed=2), use_cache=True)
    gc.collect()
    model(prompt(1), **{cache_argument(model): first})


def of_fewer_tokens(model):
    cache = cache_of(model(prompt(), use_cache=True))
    cache.crop(-5)
    model(prompt(1), **{cache_argument(model): cache})


def of_another_batch(model):
    cache = cache_of(model(prompt(), use_cache=True))
    cache.batch_repeat_interleave(2)
    model(torch.cat([prompt(1), prompt(1)]), **{cache_argument(model): cache})


def in_another_thread(model):
    """Its tokens would be those of the block's sequences."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model, prompt(), use_cache=True).result(20)


def of_a_tuple(model):
    model.model(prompt(), **{cache_argument(model): ((torch.zeros(1), torch.zeros(1)),)})


def assisted(model, **options):
    ids = torch.tensor([[*random_tokens(6)] * 3])  # so that a look-up finds something
    model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0, **options)


def with_beams(model):
    model.generate(prompt(), generation_config=GenerationConfig(num_beams=2, max_new_tokens=4))


REFUSED = {
    "beams": (lambda m: generate(m, prompt(), 4, num_beams=3), "num_beams"),
    "beams of a configuration": (with_beams, "num_beams"),
    "an assistant": (lambda m: assisted(m, assistant_model=tiny("llama", seed=1)), "assistant"),
    "prompt lookup": (lambda m: assisted(m, prompt_lookup_num_tokens=3), "lookup"),
    "a compiled model": (lambda m: torch.compile(m, backend="eager")(prompt()), "itself"),
    "a second session": (lambda m: open_session(m.model, "griffin", 0.5).__enter__(), "block"),
    "another thread": (in_another_thread, "block"),
    "another prompt's cache": (of_another_prompt, "finish"),
    "a cache that lost tokens": (of_fewer_tokens, "new cache"),
    "another batch": (of_another_batch, "one cache"),
    "a cache that is a tuple": (of_a_tuple, "DynamicCache"),
    "no cache": (lambda m: generate(m, prompt(), 3, use_cache=False), "use_cache"),
    "continuous batching": (lambda m: m.generate_batch([[5, 6, 7]], max_new_tokens=3), r"use generate\(\)"),
    "labels": (lambda m: m(prompt(), labels=prompt()), "perplexity"),
    "labels by place": (lambda m: m(prompt(), None, None, None, None, prompt()), "perplexity"),
}


OF_MASKS = ("another prompt's cache", "a cache that lost tokens", "another batch")  # right where all share one mask
# In turn with masks of each prompt, and with one for all.
CASES = [(name, "griffin" if name in OF_MASKS or i % 2 else "random") for i, name in enumerate(REFUSED)]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_what_could_give_a_wrong_number_is_refused(llama, name, method):
    before, dense, (run, remedy) = bits(llama), llama(prompt()).logits, REFUSED[name]
    with open_session(llama, method, 0.5) as session:
        wanted = generate(llama, prompt(), 6).sequences
        with pytest.raises(UserError, match=remedy):
            run(llama)
        assert torch.equal(generate(llama, prompt(), 6).sequences, wanted) and session.effective_sparsity > 0
    assert same(llama, before) and torch.equal(llama(prompt()).logits, dense)
    assert torch.isfinite(llama(prompt(), labels=prompt()).loss)


def compiled(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(("model", "remedy"), [
    (lambda: torch.compile(tiny("llama"), backend="eager"), "itself"), (lambda: compiled(tiny("llama")), "itself"),
    (lambda: "path", "load it"), (lambda: adapted(tiny("llama")), "get_base_model"),
])  # fmt: skip
def test_what_is_no_model_to_prune_is_refused(model, remedy):
    with pytest.raises(UserError, match=remedy), prune(model(), "griffin"):
        pass


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


class Break(StoppingCriteria):
    """Raises after some tokens of a `generate`."""

    def __init__(self, error, tokens):
        self.error, self.left = error, tokens

    def __call__(self, *_args, **_kwargs):
        self.left -= 1
        if not self.left:
            raise self.error
        return False


@pytest.mark.parametrize(("method", "params", "execution", "error"), [
    ("griffin", {}, "auto", KeyboardInterrupt()), ("dart", RESTLESS, "masked", RuntimeError("boom")),
    ("rounding", {}, "masked", KeyboardInterrupt()), ("grinqh", {}, "masked", RuntimeError("boom")),
])  # fmt: skip
def test_an_exception_inside_generate_leaves_the_weights_and_a_session_in_use(method, params, execution, error):
    """Between tokens and in the middle of a forward."""
    model = biased("llama").float()
    before, stop = bits(model), Break(error, 10**9)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: stop() or None)  # before the session's hooks
    with open_session(model, method, 0.6, execution=execution, **params) as session:
        wanted = torch.stack(generate(model, prompt(12), 6).logits)
        for at in (1, 3):
            with pytest.raises(type(error)):
                generate(model, prompt(15, seed=at), 8, stopping_criteria=[Break(error, at)])
            stop.left = at
            with pytest.raises(type(error)):
                generate(model, prompt(15, seed=at), 8)
            assert same(model, before)
            assert torch.equal(torch.stack(generate(model, prompt(12), 6).logits), wanted)
        assert session.effective_sparsity > 0
    assert same(model, before)


@pytest.mark.parametrize(("method", "execution"), [("griffin", "copied"), ("cats", "masked"), ("grinqh", "copied")])
def test_methods_run_under_autocast(method, execution):
    model = odd_llama().float()
    with open_session(model, method, 0.5) as session, torch.autocast("cpu", torch.bfloat16):
        found = torch.stack(generate(model, prompt(12), 6).logits)[:2]
        assert session.execution == execution
    with open_session(model, method, 0.5):
        wanted = torch.stack(generate(model, prompt(12), 6).logits)[:2]
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_model_that_keeps_no_cache_is_refused(llama):
    llama.config.use_cache = False
    gpt = AutoModelForCausalLM.from_config(
        OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).eval()
    for model, method in itertools.product((llama, gpt), ("griffin", "random")):
        with pytest.raises(UserError, match="no KV cache"), open_session(model, method, 0.5):
            model(prompt())


# -- layers that are not what they were ------------------------------------------------------------------------------


def inject(model):
    for layer in model.model.layers:
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)


def drop(model):
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None


@pytest.mark.parametrize(("change", "method"), [(inject, "griffin"), (drop, "dart"), (inject, "random")])
def test_layers_that_changed_between_two_blocks_are_found_again(llama, change, method):
    with open_session(llama, method, 0.5, execution="masked"):
        generate(llama, prompt(), 4)
    change(llama)
    dense = llama(prompt()).logits
    with open_session(llama, method, 0.5, execution="masked") as session:
        out = generate(llama, prompt(), 4)
        assert len(session.ffns) == len(llama.model.layers)
        for ffn, layer in zip(session.ffns, llama.model.layers, strict=True):
            assert ffn.down is layer.mlp.down_proj
        assert session.effective_sparsity == pytest.approx(0.5 * 3 / 4)
        pruned = llama(out.sequences[:, -1:], **{cache_argument(llama): cache_of(out)}).logits
    full = llama(out.sequences).logits[:, -1:]
    assert not torch.allclose(pruned, full)  # something was pruned
    assert torch.equal(dense, llama(prompt()).logits)


@pytest.mark.parametrize("part", [lambda m: m.model.layers[1].mlp, lambda m: m.model.layers[1].self_attn, lambda m: m])
def test_weights_that_come_for_each_forward_alone_are_no_changed_layer(llama, part):
    """accelerate's offload puts another empty parameter in a weight's place after every forward."""
    accelerate = pytest.importorskip("accelerate")
    with open_session(llama, "griffin", 0.5, execution="masked"):
        said = generate(llama, prompt(), 8).sequences
    offloaded = tiny("llama")
    accelerate.cpu_offload(part(offloaded))
    with open_session(offloaded, "griffin", 0.5, execution="masked") as session:
        for _ in range(3):
            assert torch.equal(generate(offloaded, prompt(), 8).sequences, said)
        assert session.effective_sparsity == pytest.approx(0.5 * 7 / 8)


@pytest.mark.parametrize("method", ["magnitude", "grinqh"])
def test_methods_that_read_weights_are_refused_where_these_are_offloaded(llama, method):
    pytest.importorskip("accelerate").cpu_offload(llama)
    with pytest.raises(UserError, match="offloaded"), open_session(llama, method, 0.5):
        generate(llama, prompt(), 2)


def test_another_activation_is_found_though_it_is_a_plain_function(llama):
    mlp = llama.model.layers[0].mlp
    del mlp.act_fn  # a module's place takes modules alone
    for act in (torch.nn.functional.silu, torch.nn.functional.gelu):
        mlp.act_fn = act
        assert find_ffns(llama)[0].act is act


def test_ends_are_taken_as_generate_takes_them(llama):
    for end in (94, [94, 95], torch.tensor([94, 95])):
        with open_session(llama, "griffin", 0.5) as session:
            generate(llama, torch.cat([prompt(seed=1), prompt(seed=2)]), 4, eos_token_id=end)
            assert 0 < session.effective_sparsity <= 0.5


def test_the_methods_of_a_model_are_its_own_again(llama):
    mine = llama.generate = functools.partial(llama.generate, max_length=23)  # one that a user has set
    with open_session(llama, "griffin", 0.5) as session:
        assert llama.generate(prompt(), do_sample=False, pad_token_id=0).shape[1] == 23
        assert session.effective_sparsity == pytest.approx(0.5 * 2 / 3)
    assert llama.generate is mine
    del llama.generate
    with prune(llama, make("dart", RESTLESS), 0.5):
        generate(llama, prompt(), 8)
    assert not any(name in m.__dict__ for m in llama.modules() for name in ("generate", GUARD))


@pytest.mark.skipif(build.why_no_kernel() is not None, reason=f"{build.why_no_kernel()}")
def test_a_batch_that_grows_while_decoding_leaves_the_kernel_of_one_sequence():
    model, prompt = odd_llama(), torch.tensor([random_tokens(20, seed=4)])
    with torch.no_grad(), prune(model, "grinqh", 0.5) as run:
        found = []
        for batch in (1, 2):
            cache = model(prompt, use_cache=True).past_key_values
            cache.batch_repeat_interleave(batch)
            found.append(model(torch.full((batch, 1), 7), past_key_values=cache).logits[:1].float())
            assert run.execution == ("copied" if batch == 1 else "masked")
    assert (found[0] - found[1]).norm() < 2e-2 * found[1].norm()


def test_values_decoded_in_inference_mode_serve_gradients_later():
    weight = torch.randn(8, 32)
    values = Decoded(rounded(weight, Rounding(4, 32)), torch.float32)
    with torch.inference_mode():
        assert not values().is_inference()
    assert not values().is_inference()


def said(method, shared=False, ends=None, pad=0, **params):
    """What two sequences say of which the first may end, and the events of the first."""
    model, ids = tiny("llama"), torch.cat([prompt(12, 1), prompt(12, 2)])
    with open_session(model, method, 0.5, shared_mask=shared, execution="masked", **RESTLESS, **params) as run:
        out = generate(model, ids, 24, eos_token_id=ends, pad_token_id=pad).sequences[:, 12:]
        assert run.remasks[1] > 0
        return out, [e for e in run.events if e["sequence"] in (0, None)]


def test_padding_after_an_end_moves_no_mask():
    """What is fed in place of a sequence that ended is no text, and makes no re-masks."""
    free, _ = said("dart")
    end, at = next((t, i) for i, t in enumerate(free[0].tolist()) if t not in free[1].tolist())
    ended, events = said("dart", ends=end)
    assert torch.equal(ended[1], free[1]) and all(event["token"] <= at + 1 for event in events)


@pytest.mark.parametrize(("method", "params"), [("dart", {}), ("dart-code", {"remask.dense_tokens": 4})])
def test_padding_after_an_end_is_no_text_of_a_shared_mask(method, params):
    """From there on the second sequence decides alone, whatever pads the first; after an alarm too."""
    free, _ = said(method, shared=True, **params)
    end = next(t for t in free[0].tolist() if t not in free[1].tolist())
    pads = [pad for pad in (0, 9, 11) if pad not in free[1].tolist()]
    first, *others = (said(method, True, [end, pad], pad, **params)[0][1] for pad in pads)
    assert others and all(torch.equal(first, text) for text in others)


@pytest.mark.parametrize("method", ["griffin", "dart"])
def test_a_session_outlives_inference_mode(llama, method):
    """Copies that are made inside are changed outside."""
    found = []
    for inside in (True, False):
        with open_session(llama, method, 0.5):
            if inside:
                with torch.inference_mode():
                    generate(llama, prompt(12), 4)
            found.append(generate(llama, prompt(12, 3), 6).sequences)
    assert torch.equal(*found)
