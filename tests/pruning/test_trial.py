"""The trial forward: where an FFN meets the stream, whether it is all that adds to it, models that fail."""

import itertools

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import BartConfig, DogeConfig

from dart_eval.evaluation.forwards import output_head
from dart_eval.layers import experts, verify
from dart_eval.layers.find import decoder_layers, find_ffns
from dart_eval.pruning.methods.depth import depth_aware, normalise_sensitivity
from dart_eval.util.errors import UserError
from tests.helpers.models import SMALL, STREAMS, Adapted, random_model, random_tokens, tiny
from tests.helpers.sessions import go_on, open_session
from tests.matrix.types import tiny as matrix_model

UNKNOWN = {
    "doge": lambda: DogeConfig(**SMALL),
    "bart": lambda: BartConfig(
        vocab_size=96, d_model=32, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=40, is_decoder=True
    ),
}


def _sensitivity(model, ids, before=()):
    with open_session(model, "dart", 0.5, remask="never") as session:
        for count in before:
            model(torch.tensor([random_tokens(count, seed=count)]), use_cache=True)
        model(ids, use_cache=True)
        return of_ffns(session)


def of_ffns(session):
    """S of every FFN, which is that of its layer."""
    of_layers = session.rows.change.sensitivity(torch.arange(1))
    return [of_layers[ffn.number] for ffn in session.ffns]


def _by_hand(model, ids):
    """S of every layer, from the stream before and after its FFN."""
    found, handles = {}, []
    for layer, ffn in enumerate(find_ffns(model)):
        own = decoder_layers(model)[ffn.number]

        def keep(name, value, layer=layer):
            value = value[0] if isinstance(value, tuple) else value
            found[layer, name] = value.clone().reshape(-1, ids.shape[1], model.config.hidden_size)[0]

        handles.append(ffn.residual.register_forward_pre_hook(lambda _m, a, keep=keep: keep("y", a)))
        handles.append(ffn.attention.register_forward_hook(lambda _m, _a, o, keep=keep: keep("a", o)))
        if hasattr(own, "do_layer_norm_before") or hasattr(own, "per_layer_input_gate"):
            last = own.final_layer_norm if hasattr(own, "do_layer_norm_before") else own.per_layer_input_gate
            handles.append(last.register_forward_pre_hook(lambda _m, a, keep=keep: keep("after", a)))
        else:
            handles.append(own.register_forward_hook(lambda _m, _a, o, keep=keep: keep("after", o)))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    result = []
    for layer, ffn in enumerate(find_ffns(model)):
        own = decoder_layers(model)[ffn.number]
        y, after = found[layer, "y"], found[layer, "after"]
        if hasattr(own, "layer_scalar") and not hasattr(own, "per_layer_input_gate"):
            after = after / own.layer_scalar
        z = after - y
        if any(getattr(model.config, name, None) for name in ("parallel_attn", "use_parallel_residual")):
            z = z - found[layer, "a"]  # side by side
        turn = 1 - cosine_similarity(y, z, dim=-1).mean()
        result.append(float(turn * ((z - y).norm(dim=-1) / y.norm(dim=-1)).mean()))
    return result


@pytest.mark.parametrize("family", STREAMS)
def test_depth_judges_layers_by_the_stream_that_enters_the_ffn_and_what_it_adds(family):
    model, ids = random_model(STREAMS[family]()), torch.tensor([random_tokens(12)])
    assert all(ffn.adds for ffn in find_ffns(model))
    assert _sensitivity(model, ids) == pytest.approx(_by_hand(model, ids), rel=1e-4)


# A shared FFN beside experts, weighed by a gate, behind norms of their own, or only in some layers.
SEVERAL = ["deepseek_v3", "qwen2_moe", "granitemoehybrid", "gemma4_text with experts", "nemotron_h"]


@pytest.mark.parametrize("name", SEVERAL)
def test_depth_judges_ffns_of_one_layer_by_what_they_add_together(name):
    model, ids = matrix_model(name), torch.tensor([random_tokens(12)])
    ffns = find_ffns(model)
    assert all(ffn.adds for ffn in ffns) and any(ffn.joint for ffn in ffns)
    found = _sensitivity(model, ids)
    assert found == pytest.approx(_by_hand(model, ids), rel=1e-3)
    for a, b in itertools.pairwise(range(len(ffns))):
        assert (found[a] == found[b]) == (ffns[a].number == ffns[b].number)


@pytest.mark.parametrize(
    ("name", "numbers"), [("deepseek_v3", [0, 1, 1, 2, 2, 3, 3]), ("llama4_text", [0, 1, 1, 2, 3, 3])]
)
def test_depth_gives_ffns_of_one_layer_one_density(name, numbers):
    """Its depth is that of the layer, and the mean is over neurons: layers with experts have other sizes."""
    model, ids = matrix_model(name, depth=4), torch.tensor([random_tokens(12)])
    ffns = find_ffns(model)
    with open_session(model, "dart", 0.5, remask="never") as session:
        model(ids, use_cache=True)
        found = of_ffns(session)
        kept = session.rows.counts[0, :, 0].tolist()
    assert [f.number for f in ffns] == numbers
    sizes = [sum(f.size for f in ffns if f.number == n) for n in range(4)]
    unlike = sizes if len(set(sizes)) > 1 else None
    assert (unlike is None) == (name == "deepseek_v3")
    each = normalise_sensitivity([found[numbers.index(n)] for n in range(4)])
    wanted = depth_aware(each, 0.5, True, unlike)
    assert max(wanted) - min(wanted) > 0.1
    for ffn, k in zip(ffns, kept, strict=True):
        step = ffn.routed.count if ffn.routed else 1  # as many of each expert
        assert abs(k - wanted[ffn.number] * ffn.size) <= 1 + step
    assert sum(kept) <= round(sum(f.size for f in ffns) / 2)


def test_ffns_of_a_layer_that_mixes_several_streams_do_not_just_add():
    assert not any(ffn.adds for ffn in find_ffns(matrix_model("deepseek_v4")) if ffn.joint)


def test_depth_sees_nothing_of_the_sequence_before_where_the_norm_comes_after_the_ffn():
    model = random_model(STREAMS["opt with the norm after the FFN"]())
    ids = torch.tensor([random_tokens(12)])
    alone = _sensitivity(model, ids)
    assert _sensitivity(model, ids, before=(12, 7)) == alone


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_an_ffn_adds_is_recognised_in_every_dtype(dtype):
    for config in [*STREAMS.values()][:: 1 if dtype == torch.bfloat16 else 3]:
        assert all(ffn.adds for ffn in find_ffns(random_model(config(), dtype)))


def test_a_scale_that_is_not_known_is_noticed():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = random_model(STREAMS["hyperclovax"](), dtype)
        ffns = find_ffns(model)
        for ffn in ffns:
            ffn.scale = 0.4
        verify.verify(model, ffns)
        assert not any(ffn.adds for ffn in ffns)


@pytest.mark.parametrize("family", UNKNOWN)
def test_depth_is_refused_by_name_where_a_layer_does_more_and_all_else_works(family):
    model, ids = random_model(UNKNOWN[family]()), torch.tensor([random_tokens(12)])
    assert not any(ffn.adds for ffn in find_ffns(model))
    with pytest.raises(UserError, match="allocation=uniform"), open_session(model, "dart", 0.5):
        pass
    with open_session(model, "dart", 0.5, allocation="uniform") as session:
        out = model(ids, use_cache=True)
        go_on(model, out, ids[:, :1])
        assert session.steps[0].read.tolist() == [0.5]


def doge_with_experts():
    return random_model(DogeConfig(**SMALL, is_moe=True, num_experts=16, num_experts_per_tok=2), torch.float32)


@pytest.mark.parametrize(("make", "part"), [
    (lambda: matrix_model("gemma4_text with experts", torch.bfloat16), "experts"), (doge_with_experts, "mlp.up_embed"),
])  # fmt: skip
def test_a_dense_ffn_beside_experts_is_refused_by_name(make, part, monkeypatch):
    monkeypatch.setattr(experts, "is_routed", lambda _module: False)  # as those that are not known
    with pytest.raises(UserError, match=part):
        find_ffns(make())


def test_what_a_mixture_adds_beside_its_experts_is_refused():
    model = matrix_model("deepseek_v3")
    model.model.layers[1].mlp.register_forward_hook(lambda _module, args, out: out + args[0])
    with pytest.raises(UserError, match="layer 1 of"):
        find_ffns(model)


def test_a_model_that_fails_is_told_in_one_line():
    model = tiny("llama")
    model.model.layers[2].self_attn.q_proj = torch.nn.Linear(31, 32).double()
    for trial_forward in (find_ffns, output_head):
        with pytest.raises(UserError, match="trial forward"):
            trial_forward(model)


def test_out_of_memory_is_left_to_those_who_know_what_to_do():
    model = tiny("llama")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[0].mlp.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        find_ffns(model)


@pytest.mark.parametrize("config", [STREAMS["gemma4"], UNKNOWN["doge"]])
def test_adapters_of_the_projections_belong_to_the_ffn(config):
    model = random_model(config())
    for layer in model.model.layers:
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    assert len(find_ffns(model)) == 3
