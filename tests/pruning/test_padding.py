"""Which tokens are real: told from every form of attention mask, and of no influence wherever padding stands."""

import pytest
import torch
from transformers import DynamicCache, Gemma3Config, Gemma3TextConfig, Gemma4TextConfig, StaticCache
from transformers.masking_utils import create_masks_for_generate

from dart_eval.pruning.session import real_tokens
from dart_eval.util.errors import UserError
from tests.helpers.models import CONFIGS, SMALL, made, random_tokens
from tests.helpers.sessions import RESTLESS, generate, open_session

CPU = torch.device("cpu")
WINDOWS = Gemma3TextConfig(
    **SMALL, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
)
# Longer than what follows, and with padding on the left.
LENGTHS, WIDTH = (20, 9, 14), 20


def gemma3_4b():
    """The layout of Gemma 3 from 4B on: a language model inside a model of images and text."""
    text = {**SMALL, "head_dim": 8, "sliding_window": 16, "rope_parameters": WINDOWS.rope_parameters,
            "layer_types": WINDOWS.layer_types}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    return Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95, boi_token_index=94,
        eoi_token_index=93,
    )  # fmt: skip


def gemma4():
    """The layout of Gemma 4 E2B: the last layers share the keys and values of earlier ones."""
    return Gemma4TextConfig(
        **{**SMALL, "num_hidden_layers": 4}, head_dim=8, global_head_dim=8, sliding_window=16, num_kv_shared_layers=2,
        hidden_size_per_layer_input=4, vocab_size_per_layer_input=96,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip


MODELS = {"gemma3-4b": gemma3_4b, "gemma4": gemma4, "llama": CONFIGS["llama"]}


def prompts():
    ids = torch.tensor([[*[0] * (WIDTH - n), *(min(t, 90) for t in random_tokens(n, seed=n))] for n in LENGTHS])
    return ids, (torch.arange(WIDTH) >= WIDTH - torch.tensor(LENGTHS)[:, None]).long()


@pytest.mark.parametrize(("attention", "make"), [
    ("sdpa", lambda c: DynamicCache(config=c)), ("eager", lambda c: StaticCache(config=c, max_cache_len=24)),
    ("flex_attention", lambda c: DynamicCache(config=c)),
    ("flex_attention", lambda c: StaticCache(config=c, max_cache_len=24)),
])  # fmt: skip
@pytest.mark.slow
def test_every_form_of_mask_tells_the_same_real_tokens(attention, make):
    """As transformers makes them for generation: full and sliding, growing and fixed, padding in the middle too."""
    config = Gemma3TextConfig.from_dict({**WINDOWS.to_dict(), "attn_implementation": attention})
    config._attn_implementation = attention
    cache, past = make(config), 0
    flat = (torch.arange(9) >= 9 - torch.tensor([9, 4, 2])[:, None]).long()
    for step, tokens in enumerate((9, 1, 1, 3, 1)):
        if step:
            flat = torch.cat([flat, torch.ones(3, tokens, dtype=torch.long)], 1)
        if step == 3:
            flat[1, -3] = 0
        with torch.compiler.set_stance("force_eager"):  # the same masks, without seconds of compiling
            masks = create_masks_for_generate(
                config=config, inputs_embeds=torch.empty(3, tokens, 32), attention_mask=flat, cache=cache
            )
        wanted = flat[:, past : past + tokens].bool()
        forms = (flat, masks, {"sliding_attention": masks["sliding_attention"]}, masks["full_attention"])
        for form in forms:
            assert torch.equal(real_tokens(form, cache, past, 3, tokens, CPU), wanted)
        for layer in range(3):
            cache.update(torch.zeros(3, 2, tokens, 8), torch.zeros(3, 2, tokens, 8), layer)
        past += tokens


def test_a_mask_without_padding_or_of_another_length_or_kind():
    assert real_tokens({"full_attention": None}, None, 0, 2, 3, CPU).all()
    with pytest.raises(UserError, match="2 tokens after 3"):
        real_tokens(torch.ones(1, 4), None, 3, 1, 2, CPU)
    with pytest.raises(UserError, match="does not tell"):
        real_tokens(torch.ones(1, 2, 4), None, 0, 1, 2, CPU)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cache", "method", "params"), [
    ("gemma3-4b", None, "dart", RESTLESS), *(pytest.param(*more, marks=pytest.mark.slow) for more in (
        ("gemma3-4b", "static", "griffin", {}), ("gemma4", None, "griffin", {}), ("gemma4", "static", "dart", RESTLESS),
        ("llama", "static", "dart", RESTLESS),
    )),
])  # fmt: skip
def test_a_padded_batch_generates_what_each_sequence_does_alone(name, cache, method, params):
    model = made(MODELS[name])
    ids, attention = prompts()
    options = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    with open_session(model, method, 0.5, execution="masked", **params):
        together = generate(model, ids, 12, attention, **options)
    for row, length in enumerate(LENGTHS):
        with open_session(model, method, 0.5, execution="masked", **params) as session:
            alone = generate(model, ids[row : row + 1, -length:], 12, attention[row : row + 1, -length:])
            assert session.rows.seen.tolist() == [length]
        for a, b in zip(alone.logits, together.logits, strict=True):
            assert torch.allclose(a[0], b[row], atol=1e-6)


def test_layers_that_share_keys_and_values_are_judged_by_the_whole_prompt():
    """Gemma 4 computes them for the last position alone where `generate` wants one row of logits."""
    model, ids = made(gemma4), torch.tensor([random_tokens(12)])
    with open_session(model, "griffin", 0.5) as session:
        model(ids, use_cache=True)
        whole = session.masks(0)
        model(ids, use_cache=True, logits_to_keep=1)
        assert all(torch.equal(a, b) for a, b in zip(whole, session.masks(0), strict=True))


def test_padding_on_the_right_leaves_the_recent_inputs_to_the_real_tokens(llama):
    """A batch padded on the right makes the new masks that each sequence makes alone."""
    rows = [random_tokens(n, seed=n) for n in (20, 9)]
    ids = torch.tensor([[*r, *[0] * (20 - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (20 - len(r)) for r in rows])
    settings = {**RESTLESS, "remask.blend": 0.0, "remask.ring": 8, "execution": "masked"}
    with open_session(llama, "dart", 0.5, **settings) as session:
        llama(ids, attention_mask=mask, use_cache=True)
        session.method.make_masks(session.rows, torch.ones(2, dtype=torch.bool))
        together = session.rows.mask
    for row, tokens in enumerate(rows):
        with open_session(llama, "dart", 0.5, **settings) as session:
            llama(torch.tensor([tokens]), use_cache=True)
            session.method.make_masks(session.rows, torch.ones(1, dtype=torch.bool))
            assert all(torch.equal(a[row], b[0]) for a, b in zip(together, session.rows.mask, strict=True))
