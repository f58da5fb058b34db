"""What a developer meets who uses the package as a library: several chats, edits, blocks in blocks, own methods."""

import gc

import pytest
import torch
from dart_eval.pruning.masks.mask import FromPrompt
from dart_eval.pruning.masks.scores import Activation, Score
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, LlamaConfig

from dart_eval import Pruner, UserError, prune, rounded_ffns
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.layers.families import cache_argument
from dart_eval.pruning import registry
from dart_eval.sweep.dart_lm import DartLM
from tests.helpers.models import SMALL, save_tiny
from tests.helpers.sessions import cache_of, generate, open_session, prompts_of


def test_a_head_that_was_untied_stays_so(tokenizer):
    """Adapters that train the head untie it, whatever the configuration says; `HFLM` would tie it again."""
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 32))
    wanted = model(prompts_of(1, 8)).logits
    PrunedLM(model, tokenizer)
    assert model.lm_head.weight is head and torch.equal(model(prompts_of(1, 8)).logits, wanted)


@torch.no_grad()
def test_the_cache_of_another_prompt_is_refused_when_the_last_one_is_gone(llama):
    """As long as the last one, whose masks would run."""
    with prune(llama, "griffin"):
        first = generate(llama, prompts_of(1, 12, seed=1), 5)
        generate(llama, prompts_of(1, 12, seed=2), 5)
        gc.collect()
        ids = torch.cat([first.sequences, prompts_of(1, 3, seed=9)], 1)
        with pytest.raises(UserError, match="not the one that the masks"):
            generate(llama, ids, 4, **{cache_argument(llama): cache_of(first)})


def test_rounding_inside_rounding_leaves_the_outer_one(llama):
    read = []
    with rounded_ffns(llama, 4):
        for bits in (16, 8, 16):
            with rounded_ffns(llama, bits), prune(llama, "griffin", 0.5) as session:
                read.append(session.weights_read)
    assert read[0] == read[2] < read[1] < 0.6


@pytest.mark.parametrize("make", [
    lambda: Pruner(mask=FromPrompt(score="votes")), lambda: Pruner(mask=FromPrompt(score=Activation)),
    lambda: Pruner(mask=FromPrompt(), allocation="depth"), lambda: Pruner(mask="prompt"),
])  # fmt: skip
def test_a_slot_takes_no_name_of_a_part(make):
    with pytest.raises(UserError, match="which is no part; give an object"):
        make()


def test_methods_and_parts_of_others_without_names(monkeypatch, caplog):
    class Nameless(Score):
        pass

    offers = {"methods": [("theirs", Pruner(mask=FromPrompt()))], "parts": [("nameless", Nameless)]}
    monkeypatch.setattr(registry, "offered", lambda group, _search: offers[group.rpartition(".")[2]])
    assert registry.make("theirs").spec == "theirs"
    assert registry.make("theirs", {"remask": "drift"}).spec == "theirs:remask=drift"
    assert "part nameless of another package has no name: left out" in caplog.text


@torch.no_grad()
def test_what_is_read_is_a_mean_over_batches_of_several_sizes(llama):
    with open_session(llama, "teal", 0.5) as session:
        cache = cache_of(llama(prompts_of(3, 12), use_cache=True))
        for rows in ([0, 1, 2], [0, 2]):
            cache.batch_select_indices(torch.tensor(rows))
            llama(torch.full((len(rows), 1), 7), use_cache=True, **{cache_argument(llama): cache})
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
