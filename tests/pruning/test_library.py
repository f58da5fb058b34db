"""What a developer meets who uses the package as a library: heads, rounding in rounding, batches, seeds."""

import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, LlamaConfig

from dart_eval import prune, rounded_ffns
from dart_eval.evaluation.lm import PrunedLM
from dart_eval.layers.families import cache_argument
from dart_eval.sweep.dart_lm import DartLM
from tests.helpers.models import SMALL, save_tiny
from tests.helpers.sessions import cache_of, open_session, prompts_of


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
