"""What a server does with an attached model: edits, interrupts, autocast, threads, adapters, copies."""

import contextvars
import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from transformers import StoppingCriteria

from dart_eval import UserError, attach
from tests.helpers.models import biased, made, odd_llama
from tests.helpers.sessions import RandomCalibration, bits, generate, open_session, prompts_of, same
from tests.pruning.test_attach import Break, in_thread, logits


def _new_parameter(down):
    down.weight = nn.Parameter(down.weight.detach().flip(1) * 2)


def _through_data(down):
    down.weight.data.copy_(down.weight.data.flip(1) * 2)


def _other_data(down):
    down.weight.data = down.weight.detach().flip(1) * 2


@pytest.mark.parametrize("edit", [_new_parameter, _through_data, _other_data])
@pytest.mark.parametrize("method", ["griffin", "magnitude", "grinqh"])
def test_weights_that_are_edited_inside_the_block_are_noticed(llama, method, edit):
    """Copies of the earlier ones would be multiplied, and would come back in place of the user's."""
    session = attach(llama, method, 0.5)
    generate(llama, prompts_of(1, 9), 4)
    down = llama.model.layers[1].mlp.down_proj
    edit(down)
    mine, value = down.weight, down.weight.detach().clone()
    with pytest.raises(UserError, match="FFN weights have changed"):
        generate(llama, prompts_of(1, 9), 4)
    session.detach()
    assert down.weight is mine and torch.equal(mine, value)


def test_experts_that_are_edited_inside_the_block_are_noticed():
    from transformers import MixtralConfig

    from tests.helpers.models import SMALL

    model = made(lambda: MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))
    with open_session(model, "griffin", 0.5):
        generate(model, prompts_of(1, 9), 3)
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj.mul_(2)
        with pytest.raises(UserError, match="FFN weights have changed"):
            generate(model, prompts_of(1, 9), 3)


@pytest.mark.parametrize(("method", "execution"), [("griffin", "copied"), ("rounding", "masked"), ("grinqh", "masked")])
def test_an_exception_inside_generate_leaves_the_models_own_weights(method, execution):
    """Else `save_pretrained` would write the neurons of a mask, or rounded weights."""
    model = biased("llama").float()
    before, stop = bits(model), Break(KeyboardInterrupt(), 10**9)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: stop() or None)  # before the session's hooks
    session = attach(model, method, 0.6, execution=execution, calibration=RandomCalibration(model))
    stop.left = 3
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts_of(1, 12), 8)
    assert same(model, before)
    session.detach()


@pytest.mark.parametrize(("method", "execution"), [("griffin", "copied"), ("cats", "copied"), ("grinqh", "copied")])
def test_methods_run_under_autocast(method, execution):
    model = odd_llama().float()
    with open_session(model, method, 0.5) as session, torch.autocast("cpu", torch.bfloat16):
        found = logits(model, prompts_of(1, 12))[:2]
        assert session.execution == execution
    with open_session(model, method, 0.5):
        wanted = logits(model, prompts_of(1, 12))[:2]
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_prompt_said_by_one_thread_is_none_of_another(llama):
    class Wait(StoppingCriteria):
        reached, go_on = threading.Event(), threading.Event()

        def __call__(self, *_args, **_kwargs):
            self.reached.set()
            assert self.go_on.wait(20)
            return False

    ids, hold = prompts_of(1, 12), Wait()
    session = attach(llama, "griffin", sparsity=0.6)
    wanted = logits(llama, ids)
    thread, found = in_thread(lambda: logits(llama, ids, stopping_criteria=[hold]))
    assert hold.reached.wait(20)
    with session.prompt():
        hold.go_on.set()
        thread.join(20)
    assert torch.equal(found[0], wanted)
    session.detach()


def test_a_prompt_goes_on_in_a_thread_that_takes_the_context_along(llama):
    """As `asyncio.to_thread` does. A block that has ended in another thread ends no other one."""
    ids, chunk = prompts_of(1, 12), prompts_of(1, 3)
    with open_session(llama, "griffin", 0.6) as session, torch.no_grad():
        cache = llama(ids, use_cache=True).past_key_values
        with session.prompt():
            threading.Thread(target=lambda: session.prompt().__enter__()).start()
            taken = contextvars.copy_context()
            thread, found = in_thread(lambda: taken.run(llama, chunk, past_key_values=cache).logits)
            thread.join(20)
        assert session.forward.last == "context"
    assert torch.allclose(found[0], llama(torch.cat([ids, chunk], 1)).logits[:, 12:])


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.model.layers[0].mlp])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_or_pickle_inside_the_block_is_refused(llama, part, copied):
    with open_session(llama, "griffin", 0.5):
        generate(llama, prompts_of(1, 9), 3)
        with pytest.raises(UserError, match="copy of a model"):
            copied(part(llama))
    copied(llama)


def test_another_adapter_inside_the_block_is_noticed_where_weights_made_the_masks(llama):
    peft = pytest.importorskip("peft")

    def lora():
        return peft.LoraConfig(target_modules=["up_proj", "down_proj"], r=2, init_lora_weights=False)

    wrapped = peft.get_peft_model(llama.float(), lora(), "a")
    wrapped.add_adapter("b", lora())
    wrapped.set_adapter("a")
    model = wrapped.get_base_model()
    with open_session(model, "magnitude", 0.5):
        generate(model, prompts_of(1, 9), 3)
        wrapped.set_adapter("b")
        with pytest.raises(UserError, match="FFN weights have changed"):
            generate(model, prompts_of(1, 9), 3)
    wrapped.set_adapter("a")
    with open_session(model, "griffin", 0.5):  # made of each prompt's own activations
        wrapped.set_adapter("b")
        found = logits(model, prompts_of(1, 9))
    with open_session(model, "griffin", 0.5):
        assert torch.equal(logits(model, prompts_of(1, 9)), found)
