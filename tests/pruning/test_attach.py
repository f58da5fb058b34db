"""`attach()`: one model under a method for many prompts, threads and pipelines, until it is detached."""

import gc
import inspect
import threading
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, pipeline

import dart_eval
from dart_eval import UserError, attach, prune
from dart_eval.layers.find import HELD
from dart_eval.layers.guard import GUARD
from tests.helpers.models import biased, tiny, word_tokenizer
from tests.helpers.sessions import RESTLESS, bits, generate, hooked, prompts_of, same

RESTLESS_DART = "dart:" + ":".join(f"{name}={value}" for name, value in RESTLESS.items())
METHODS = ["griffin", RESTLESS_DART, "dart-choice", "random"]


class Break(StoppingCriteria):
    """Raises after some tokens of a `generate`."""

    def __init__(self, error, tokens):
        self.error, self.left = error, tokens

    def __call__(self, *_args, **_kwargs):
        self.left -= 1
        if not self.left:
            raise self.error
        return False


class Wait(StoppingCriteria):
    """Holds a `generate` in its middle until another thread has been seen."""

    def __init__(self):
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *_args, **_kwargs):
        self.reached.set()
        assert self.go_on.wait(20)
        return False


def in_thread(work):
    """Run `work` in a thread; its result, or what it raised, is the only entry of the list, once there is one."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def logits(model, ids, **more):
    return torch.stack(generate(model, ids, 6, **more).logits)


def untouched(model, before):
    left = any(vars(m).keys() & {"forward", "generate", "_apply", GUARD, HELD} for m in model.modules())
    return same(model, before) and not left and not hooked(model)


@pytest.mark.parametrize("method", METHODS)
def test_every_prompt_is_as_under_a_block_of_its_own(method):
    model = biased("llama")
    prompts = [prompts_of(1, 12), prompts_of(2, 15, seed=3), prompts_of(1, 9, seed=7), prompts_of(1, 12)]
    alone, not_read = [], []
    for ids in prompts:
        with prune(model, method, sparsity=0.6) as session:
            alone.append(generate(model, ids, 8))
        not_read.append((session.effective_sparsity, len(ids)))
    before, dense = bits(model), model(prompts[0]).logits
    session = attach(model, method, sparsity=0.6)
    for ids, wanted in zip(prompts, alone, strict=True):
        found = generate(model, ids, 8)
        assert torch.equal(found.sequences, wanted.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))
    mean = sum(share * rows for share, rows in not_read) / 5
    assert session.effective_sparsity == pytest.approx(mean) and mean > 0.3
    session.detach()
    assert untouched(model, before) and torch.equal(model(prompts[0]).logits, dense)
    assert session.effective_sparsity == pytest.approx(mean)  # the numbers outlive it


def test_the_arguments_are_those_of_prune():
    ours, theirs = inspect.signature(dart_eval.attach), inspect.signature(dart_eval.prune)
    assert ours.parameters == theirs.parameters and ours.return_annotation == "Session"
    session = attach(tiny("llama"), "griffin", 0.7, remask={"part": "drift", "window": 8}, execution="masked")
    assert session.method.spec == "griffin:remask=drift:remask.window=8" and session.sparsity == 0.7
    session.detach()
    for arguments, words in ((("grifin",), "did you mean griffin"), (("griffin", 1.0), "outside")):
        model = tiny("llama")
        with pytest.raises(UserError, match=words):
            attach(model, *arguments)
        assert untouched(model, bits(model))


def test_one_session_a_model(llama):
    session = attach(llama, "griffin")
    for again in (lambda: attach(llama, "griffin"), lambda: attach(llama.model, "griffin"),
                  prune(llama, "dart").__enter__):  # fmt: skip
        with pytest.raises(UserError, match=r"already under another prune\(\) or attach\(\); leave .* detach\(\)"):
            again()
    generate(llama, prompts_of(1, 9), 3)
    assert session.effective_sparsity > 0
    session.detach()
    with prune(llama, "dart"), pytest.raises(UserError, match="already under another"):
        attach(llama, "griffin")


def test_detaching_twice_leaves_the_next_session_alone(llama):
    first = attach(llama.float(), "grinqh", sparsity=0.6)
    first.detach()
    second = attach(llama, "grinqh", sparsity=0.6)
    wanted = logits(llama, prompts_of(1, 12))
    first.detach()
    del first
    gc.collect()
    assert hooked(llama)
    assert torch.equal(logits(llama, prompts_of(1, 12)), wanted)
    second.detach()
    assert not hooked(llama)


@pytest.mark.parametrize("method", ["griffin", RESTLESS_DART])
def test_what_is_dropped_is_freed(method):
    model = tiny("llama")
    session = attach(model, method)
    generate(model, prompts_of(1, 9), 4)
    refs = weakref.ref(model), weakref.ref(session)
    del session
    gc.collect()
    assert refs[1]() is not None and hooked(model)  # as long as its model
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")], ids=repr)
@pytest.mark.parametrize("method", ["griffin", RESTLESS_DART])
def test_an_exception_inside_generate_leaves_a_session_in_use(method, error):
    model = biased("llama")
    before, ids = bits(model), prompts_of(1, 12)
    session = attach(model, method, sparsity=0.6)
    wanted = logits(model, ids)
    hook = model.model.layers[1].self_attn.o_proj.register_forward_hook
    for at in (1, 3):
        with pytest.raises(type(error)):
            generate(model, prompts_of(1, 15, seed=at), 8, stopping_criteria=[Break(error, at)])
        trap = hook(lambda *_, stop=Break(error, at): stop())  # in the middle of a forward
        with pytest.raises(type(error)):
            generate(model, prompts_of(1, 15, seed=at), 8)
        trap.remove()
        assert torch.equal(logits(model, ids), wanted)
    thread, found = in_thread(lambda: logits(model, ids))  # nor does it wait for the thread that failed
    thread.join(20)
    assert torch.equal(found[0], wanted)
    session.detach()
    assert untouched(model, before)


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["griffin", "random"])
def test_threads_generate_in_turn(method):
    model = biased("llama")
    prompts = [prompts_of(1, 9 + i, seed=i) for i in range(6)]
    session = attach(model, method, sparsity=0.6)
    wanted = [logits(model, ids) for ids in prompts]
    threads = [in_thread(lambda ids=ids: logits(model, ids)) for ids in prompts]
    for (thread, found), alone in zip(threads, wanted, strict=True):
        thread.join(60)
        assert torch.equal(found[0], alone)
    session.detach()


@pytest.mark.parametrize("method", ["griffin", "random"])
def test_while_one_thread_generates(llama, method):
    """Another `generate` and `detach` wait; a forward by hand is refused."""
    before, ids, hold = bits(llama), prompts_of(1, 12), Wait()
    dense = logits(llama, ids)
    session = attach(llama, method, sparsity=0.6)
    wanted = logits(llama, ids)
    first, pruned = in_thread(lambda: logits(llama, ids, stopping_criteria=[hold]))
    assert hold.reached.wait(20)
    with pytest.raises(UserError, match="another thread is running this model"):
        llama(ids, use_cache=True)
    last, left = in_thread(session.detach)
    last.join(0.3)
    assert last.is_alive() and hooked(llama)
    hold.go_on.set()
    first.join(20)
    last.join(20)
    assert torch.equal(pruned[0], wanted) and not torch.equal(wanted, dense)
    assert left == [None] and untouched(llama, before)
    assert torch.equal(logits(llama, ids), dense)


def test_forwards_by_hand_of_two_threads_do_not_mix(llama):
    """Nor is the second refused once the first is over, however it ended."""
    ids, hold = prompts_of(1, 12), Wait()
    session = attach(llama, "random", sparsity=0.6)
    trap = llama.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: hold() or None)
    first, _ = in_thread(lambda: llama(ids, use_cache=True))
    assert hold.reached.wait(20)
    for call in (lambda: llama(ids, use_cache=True), lambda: generate(llama, ids, 3)):
        with pytest.raises(UserError, match="another thread is running this model"):
            call()
    hold.go_on.set()
    first.join(20)
    trap.remove()
    llama(ids, use_cache=True)

    trap = llama.model.layers[1].self_attn.o_proj.register_forward_hook(Break(RuntimeError("boom"), 1))
    failed, stay = threading.Event(), threading.Event()

    def fail():
        with pytest.raises(RuntimeError, match="boom"):
            llama(ids, use_cache=True)
        failed.set()
        return stay.wait(20)

    first, _ = in_thread(fail)
    assert failed.wait(20)
    trap.remove()
    generate(llama, ids, 3)
    stay.set()
    session.detach()


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_runs_pruned(saved_llama):
    tokenizer = word_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(saved_llama)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=6, do_sample=False)
    asked = ["w5 w6 w7 w8 w9", "w10 w11 w12 w60 w61 w62 w63"]
    dense = text(asked)
    alone = []
    for line in asked:
        with prune(model, "griffin", sparsity=0.7):
            alone.append(text([line])[0])
    session = attach(model, "griffin", sparsity=0.7)
    assert text(asked) == alone != dense
    made_after = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=6, do_sample=False)
    assert made_after(asked, batch_size=2) == alone
    assert session.effective_sparsity == pytest.approx(0.7 * 5 / 6, abs=0.01)
    session.detach()
    assert text(asked) == dense
