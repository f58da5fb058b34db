"""Allocation: the published tables, and budgets that are met exactly."""

import json
import random
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dart_eval.pruning.counts import in_steps, keep_counts
from dart_eval.pruning.methods.depth import EPS, depth_aware, normalise_sensitivity
from dart_eval.pruning.registry import make
from dart_eval.pruning.tables import SHIPPED, check, content, find, read_table, shipped_tables
from dart_eval.util.errors import UserError

# Normalised sensitivities of Llama-3.1-8B.
LLAMA_8B = [
    0.5245, 0.2858, 0.3759, 0.4044, 0.5494, 0.6849, 0.7010, 0.6690, 0.6743, 0.6288, 0.6317, 0.6139, 0.5862, 0.5667,
    0.5639, 0.4958, 0.4018, 0.2984, 0.2259, 0.1905, 0.1439, 0.0778, 0.0601, 0.0000, 0.0318, 0.0683, 0.0693, 0.1049,
    0.1395, 0.2548, 0.4057, 1.0000,
]  # fmt: skip
LAYERS = {
    "llama-3.2-3b": 28, "llama-3.1-8b": 32, "llama-2-7b": 32, "llama-2-13b": 40, "deepseek-r1-qwen3-8b": 36,
    "deepseek-r1-llama-8b": 32, "qwen3-14b": 40, "qwen3-4b": 36, "mistral-7b": 32,
}  # fmt: skip
# Tables that keep another share than their label says.
ODD = {"llama-3.2-3b-50": 0.5752, "llama-3.2-3b-50-no-mag-no-border": 0.5143, "llama-3.2-3b-72": 0.9156}


def test_one_sensitivity_gives_all_published_tables_of_llama_8b():
    shipped = shipped_tables()
    for percent in (20, 30, 40, 50, 60, 70):
        keep = depth_aware(LLAMA_8B, percent / 100)
        assert keep == pytest.approx(shipped[f"llama-3.1-8b-{percent}"], abs=2e-4)
        assert sum(keep) / len(keep) == pytest.approx(1 - percent / 100, abs=1e-6)
        if percent in (50, 70):  # its ablation leaves the ends unprotected
            apart = depth_aware(LLAMA_8B, percent / 100, protect=False)
            assert apart == pytest.approx(shipped[f"llama-3.1-8b-{percent}-no-border"], abs=2e-4)
            assert apart != pytest.approx(keep, abs=0.05)


def test_shipped_tables_fit_their_models_and_their_labels():
    tables = json.loads(SHIPPED.read_text())["tables"]
    assert len(tables) == 37
    models = {}
    for name, table in tables.items():
        model, label = re.fullmatch(r"(.+?b)-(\d+)(?:-no-mag)?(?:-no-border)?(?:-commented-out)?", name).groups()
        assert models.setdefault(model, table["model"]) == table["model"]
        assert len(table["keep"]) == LAYERS[model]
        assert all(0.1 <= share <= 0.9 or name == "llama-3.2-3b-72" for share in table["keep"])
        assert table["sparsity"] == int(label) / 100
        mean = sum(table["keep"]) / len(table["keep"])
        assert mean == pytest.approx(ODD.get(name, 1 - table["sparsity"]), abs=1e-3)
        check(name, 1 - mean, [8] * LAYERS[model])
    assert models.keys() == LAYERS.keys()
    assert len(set(models.values())) == len(models)


def test_a_shipped_table_goes_by_its_name_and_keeps_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = make("dart", {"allocation": "table:llama-3.2-3b-50"})
    assert method.spec == "dart:allocation=table:allocation.file=llama-3.2-3b-50"
    for wrong, word in (
        (lambda: method.check_sparsity(0.5), "0.425"),
        (lambda: check("llama-3.2-3b-50", 0.425, [8] * 32), "28 layers"),
        (lambda: make("dart", {"allocation": "table:llama-3.2-3b-55"}), "did you mean llama-3.2-3b-50"),
    ):
        with pytest.raises(UserError, match=word):
            wrong()


def test_a_file_with_a_shipped_tables_name_is_named_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "llama-3.2-3b-50"
    shipped = content(name)
    assert len(find(name)[0]) == 28
    (tmp_path / name).write_text('{"keep": [0.5]}')
    assert len(find(name)[0]) == 28
    own = make("dart", {"allocation": f"table:./{name}"})
    assert find(own.allocation_file)[0] == [0.5]
    assert own.contents() == [(tmp_path / name).read_bytes()] != [shipped]
    assert len({content(other) for other in shipped_tables() if other != name}) == 36


def test_equal_layers_do_not_divide_by_zero():
    assert normalise_sensitivity([0.3, 0.3, 0.3]) == [0.0, 0.0, 0.0]
    assert sum(depth_aware([1.0, 1.0, 1.0], 0.5)) == pytest.approx(1.5)


layers = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 300)), min_size=1, max_size=12)


@given(layers, st.floats(0, 0.999))
def test_keep_counts_meet_the_label_exactly(pairs, sparsity):
    ratios, sizes = [r for r, _ in pairs], [n for _, n in pairs]
    counts = keep_counts(ratios, sizes, sparsity)
    assert sum(counts) == round((1 - sparsity) * sum(sizes))
    assert all(0 <= c <= n for c, n in zip(counts, sizes, strict=True))


@given(st.integers(1, 12), st.integers(1, 300), st.floats(0, 0.999))
def test_uniform_counts_differ_by_one_at_most(count, size, sparsity):
    counts = keep_counts([1 - sparsity] * count, [size] * count, sparsity)
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.integers(20, 300), st.floats(0, 0.95))
def test_depth_counts_follow_their_ratios(sensitivity, size, sparsity):
    ratios = depth_aware(normalise_sensitivity(sensitivity), sparsity)
    counts = keep_counts(ratios, [size] * len(ratios), sparsity)
    off = abs(sum(ratios) - (1 - sparsity) * len(ratios)) * size  # what ten rounds of redistribution left over
    assert all(abs(c - r * size) <= 1 + off for c, r in zip(counts, ratios, strict=True))


@given(st.integers(0, 10_000))
def test_counts_in_steps_miss_their_sum_by_less_than_a_step_and_never_exceed_it(seed):
    drawn = random.Random(seed)
    steps = [drawn.choice([1, 2, 4, 8]) if seed % 2 else drawn.choice([2, 4, 8]) for _ in range(9)]
    most = [s * drawn.randint(1, 20) for s in steps]
    counts = [drawn.randint(0, m) for m in most]
    found = in_steps(counts, most, steps)
    assert all(0 <= n <= m and n % s == 0 for n, m, s in zip(found, most, steps, strict=True))
    assert all(abs(n - c) < s for n, c, s in zip(found, counts, steps, strict=True) if s > 1)
    assert 0 <= sum(counts) - sum(found) < max(steps)
    if any(s == 1 and m - n for n, m, s in zip(found, most, steps, strict=True)):
        assert sum(found) == sum(counts)


@pytest.mark.parametrize(("counts", "most", "steps", "wanted"), [
    # 19 of 32 in two experts' steps of 2: two layers lose one, and one layer gets it back
    ([19, 19, 20], [32] * 3, [2] * 3, [20, 18, 20]), ([19, 19, 20], [32, 32, 24], [2, 2, 1], [20, 18, 20]),
    ([19, 20], [32, 24], [2, 1], [18, 21]),  # what no expert can take goes to a dense layer
    ([15, 10], [32, 40], [8, 8], [16, 8]),  # most of a step is missing in the first
    ([7, 5], [16, 5], [8, 1], [0, 5]),  # seven are too few for a step, and the other layer is full
    ([7, 5], [16, 9], [8, 1], [0, 9]), ([15, 5], [16, 9], [8, 1], [8, 9]), ([15, 9], [16, 9], [8, 1], [8, 9]),
    ([7, 7, 4], [8, 8, 9], [8, 8, 1], [8, 0, 9]),
])  # fmt: skip
def test_counts_in_steps_by_hand(counts, most, steps, wanted):
    assert in_steps(counts, most, steps) == wanted


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5000)), min_size=2, max_size=9), st.floats(0.05, 0.85),
    st.booleans(),
)  # fmt: skip
@example([(0.0, 8), (1.0, 1), (1e-05, 2)], 0.0625, False)
def test_layers_of_many_sizes_meet_the_sparsity_of_their_neurons(layers, sparsity, protect):
    sensitivity, sizes = zip(*layers, strict=True)
    keep = depth_aware(normalise_sensitivity(sensitivity), sparsity, protect, sizes)
    low, high = min(0.1, sparsity), max(0.9, sparsity)
    assert all(1 - high - 1e-9 <= k <= 1 - low + 1e-9 for k in keep)
    # A round of redistribution meets the budget, or takes a layer to its bound: ten are enough for nine layers. The
    # rounds end where less than EPS of a layer of mean size is missing.
    ends_at = 1.001 * EPS * sum(sizes) / len(sizes)
    assert sum(k * n for k, n in zip(keep, sizes, strict=True)) == pytest.approx(
        (1 - sparsity) * sum(sizes), rel=1e-12, abs=ends_at
    )
    alike = depth_aware(normalise_sensitivity(sensitivity), sparsity, protect, [7] * len(sizes))
    assert alike == depth_aware(normalise_sensitivity(sensitivity), sparsity, protect)


def test_layers_of_two_sizes_by_hand():
    """Of 400 neurons 200 are pruned: the first layer's most, 90, and 110 of the 300 of the layer that has no weight."""
    assert depth_aware([0, 1], 0.5, False, [100, 300]) == pytest.approx([0.1, 1 - 110 / 300])


def test_a_table_of_no_ratios_or_of_other_sizes_is_refused(tmp_path):
    path = tmp_path / "table.json"
    wrong = [{"keep": ratios} for ratios in ([0.5, 1.5], [-0.5, 0.5], ["0.5", 0.5], [])]
    for table in (*wrong, {"keep": [0.5, 0.5], "sizes": [3]}):
        path.write_text(json.dumps(table))
        with pytest.raises(UserError, match="allocation table"):
            read_table(path)


def test_a_saved_table_of_layers_of_many_sizes_has_their_mean(tmp_path):
    sizes, keep = [301, 97, 150, 301], [271, 9, 15, 129]
    ratios = [round(k / n, 6) for k, n in zip(keep, sizes, strict=True)]
    (tmp_path / "table.json").write_text(json.dumps({"keep": ratios, "sizes": sizes}))
    sparsity = 1 - sum(keep) / sum(sizes)
    table = str(tmp_path / "table.json")
    check(table, sparsity)
    check(table, sparsity, sizes)
    with pytest.raises(UserError, match="keeps"):
        check(table, sparsity, [100] * 4)
