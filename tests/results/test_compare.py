"""`dart-eval compare`: which cells and documents are paired, what is refused, what the rows say."""

import csv
import io
import json
import math
from types import SimpleNamespace

import pytest
from lm_eval.api.metrics import aggregate_subtask_metrics

from dart_eval.results.compare import compare_folders, compare_rows
from dart_eval.results.record import Metric
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.records import N, answered, digest, metric_of, perplexities, right, samples, save


def rows(comparison):
    return [SimpleNamespace(**row) for row in comparison.rows]


def places(comparison):
    return [(r.contrast, r.task) for r in rows(comparison)]


def sides(tmp_path, a, b):
    """What a comparison of these records, in a folder each, finds; without b they are compared with themselves."""
    one = save(tmp_path / "a", *a)
    return compare_folders(one, save(tmp_path / "b", *b) if b else one)


def test_cells_are_matched_by_what_was_asked_whatever_made_them(tmp_path):
    dense = answered("arc", right(0.9), "dense", 0.0)
    other = answered("arc", right(0.5), code="other", versions={"torch": "2.9.0.dev20250915+cpu"})
    more = [answered("piqa", right(0.9)), answered("arc", right(0.7), "dense", 0.0, ffn_bits="4"),
            answered("arc", right(0.7), scope="all")]  # fmt: skip
    mine = answered("arc", right(0.9), versions={"torch": "2.9.0.dev20250801+cpu"})
    found = sides(tmp_path, [mine, dense], [other, dense, *more])
    assert [(r.contrast, r.task, r.metric, r.better) for r in rows(found)] == [
        ("dart at 50 %", "arc", "acc", "A"), ("dense", "arc", "acc", "-"),
    ]  # fmt: skip
    assert rows(found)[1].p == 1
    text = " ".join(found.notes)
    assert "c0de in A, other in B" in text and "20250801+cpu in A, 2.9.0.dev20250915+cpu in B" in text
    assert all(name in text for name in ("piqa under dart", "dense on 4 bits", "dart (scope=all) at 50 %"))


def test_where_lower_is_better_the_lower_side_is_better(tmp_path):
    drift = [[answered("drift", perplexities(scale), up=False)] for scale in (1.0, 1.1)]
    for name, pair, better in (("one", drift, "A"), ("two", drift[::-1], "B")):
        (row,) = rows(sides(tmp_path / name, *pair))
        assert row.better == better
        assert (row.ratio < 1) == (better == "A") == (row.difference < 0)


def test_of_several_runs_of_one_cell_the_newest_counts(tmp_path, capsys):
    old = answered("arc", right(0.2), created="2026-01-01", code="old")
    new = answered("arc", right(0.9), created="2026-02-01", code="new")
    (row,) = rows(sides(tmp_path, [old, new], [answered("arc", right(0.9))]))
    assert row.difference == 0 and "note: several runs" in capsys.readouterr().err
    run = answered("arc", right(0.6), "griffin"), answered("arc", right(0.8), "dense", 0.0)
    one, two = save(tmp_path / "one", *run), save(tmp_path / "two", *run)
    assert compare_rows("dense", "griffin", [one, two]).rows and not capsys.readouterr().err


def test_two_precisions_are_no_old_and_new(tmp_path):
    half = answered("arc", right(0.6), "griffin", dtype="bfloat16")
    run = [answered("arc", right(0.6), "griffin"), answered("arc", right(0.8), "dense", 0.0)]
    with pytest.raises(UserError, match="bfloat16"):
        sides(tmp_path / "together", [*run, half], [])
    with pytest.raises(UserError, match=r"half and .*bfloat16"):
        compare_rows("dense", "griffin", [save(tmp_path / "one", *run), save(tmp_path / "half", half)])


def changed(name, value):
    lines = samples("arc", right(0.5))
    lines[7][name] = value
    return {"lines": lines}


@pytest.mark.parametrize(("n", "change", "words"), [
    (N, {"limit": 100}, "differ in limit"), (50, {}, "10 of 60 documents .*arc 50"),
    (N, {"lines": samples("arc", right(0.5), data="v2")}, "60 of 60 documents .*arc 0"),
    (N, changed("prompt_hash", digest("another")), "1 of 60 documents .*arc 7"),
    (N, changed("doc_id", 1000), "documents"),
])  # fmt: skip
def test_what_cannot_be_paired_is_refused_with_the_reason(tmp_path, n, change, words):
    with pytest.raises(UserError, match=words):
        sides(tmp_path, [answered("arc", right(0.5))], [answered("arc", right(0.5)[:n], **change)])


def test_damaged_samples_are_refused_and_left_out_beside_others(tmp_path, capsys):
    a = save(tmp_path / "a", answered("arc", right(0.5)))
    (file,) = (a / "samples").iterdir()
    file.write_text(file.read_text().replace('"acc": 1.0', '"acc": 0.0', 1))
    with pytest.raises(UserError, match="no metric can be compared"):
        compare_folders(a, a)
    save(a, answered("piqa", right(0.5)))
    assert [row.task for row in rows(compare_folders(a, a))] == ["piqa"]
    assert "samples of arc" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two methods at two sparsities and dense, on two tasks; DART in two allocations on one of them."""
    records = [answered("arc", right(0.6), params={"allocation": "uniform", "detect": True})]
    for task in ("arc", "piqa"):
        records.append(answered(task, right(0.9), "dense", 0.0))
        for s in (0.5, 0.7):
            records.append(answered(task, right(0.9 - s / 2), "dart", s))
            records.append(answered(task, right(0.8 - s / 2), "griffin", s, params={}))
    return save(tmp_path_factory.mktemp("sweep") / "out", *records)


DEPTH = "dart:allocation=depth"


@pytest.mark.parametrize(("a", "b", "contrasts", "tasks"), [
    ("griffin", DEPTH, [f"griffin at {s} % vs {DEPTH} at {s} %" for s in (30, 50)], ("arc", "piqa")),
    ("dense", "griffin", [f"dense vs griffin at {s} %" for s in (30, 50)], ("arc", "piqa")),
    ("dart:allocation=uniform", DEPTH, [f"dart:allocation=uniform at 50 % vs {DEPTH} at 50 %"], ("arc",)),
    ("griffin at 50 %", "griffin at 30 %", ["griffin at 50 % vs griffin at 30 %"], ("arc", "piqa")),
    ("griffin at 30 %", DEPTH, [f"griffin at 30 % vs {DEPTH} at 30 %"], ("arc", "piqa")),
])  # fmt: skip
def test_rows_are_compared_at_each_sparsity_that_both_have_or_name(sweep, a, b, contrasts, tasks):
    """Dense goes with every sparsity."""
    found = compare_rows(a, b, [sweep])
    assert places(found) == [(contrast, task) for contrast in contrasts for task in tasks]
    assert {r.better for r in rows(found)} == {"A"} or a != "dense"


@pytest.mark.parametrize(("a", "b", "words"), [
    ("dart", "griffin", f"{DEPTH} at 30 %, {DEPTH} at 50 %"), ("grifin", "dart", "did you mean griffin"),
    ("dart:window=8", "griffin", "no row dart:window=8"), ("griffin", "griffin", "same cell"),
    ("griffin", "griffin at 30 %", "same cell"), ("griffin at 40 %", "dense", "at 30 %"),
])  # fmt: skip
def test_what_names_no_row_is_refused(sweep, a, b, words):
    with pytest.raises(UserError, match=words):
        compare_rows(a, b, [sweep])


MODELS = [
    answered("arc", right(share), method, params={}, model={"name": name, "revision": None, "weights": name})
    for name, method, share in (("small", "dart", 0.3), ("large", "dart", 0.8), ("small", "griffin", 0.8))
]
BITS = [
    *(answered(t, right(0.9), "dart", 0.7, ffn_bits="4", limit=n) for t, n in (("arc", 9), ("piqa", 8))),
    answered("arc", right(0.5), "dense", 0.0, ffn_bits="3", limit=9), answered("arc", right(0.5), "dart", limit=9),
]  # fmt: skip
IN_SCOPES = ("all", "last")
SCOPES = [answered("arc", right(0.5), m, scope=s) for m in ("dart", "griffin") for s in IN_SCOPES]
APART = [
    answered("arc", right(0.5), params={}), answered("arc", right(0.7), "griffin", 0.7, params={}),
    answered("piqa", right(0.7), "random", params={}), answered("arc", right(0.9), "rounding", 0.0),
    answered("arc", right(0.5), "dense", 0.0),
]  # fmt: skip
TYPED = [answered("arc", right(v), params={"allocation": how}) for how, v in (("depth", 0.9), ("uniform", 0.5))]
for record, method in zip(TYPED, ("dart", "dart:allocation=uniform"), strict=True):
    record.settings["method"] = method


@pytest.mark.parametrize(("records", "a", "b", "expected"), [
    # Models are compared where all else agrees, or both rows name theirs.
    (MODELS, "small dart", "large dart at 50 %", {"small dart at 50 % vs large dart at 50 %": "B"}),
    *((MODELS, "dart", b, {"small dart at 50 % vs small griffin at 50 %": "B"}) for b in ("griffin", "small griffin")),
    # Rows differ in whatever they do: paired on the tasks that both have.
    (BITS, "dart on 4 bits at 30 %", "dense on 3 bits", {"dart on 4 bits at 30 % vs dense on 3 bits": "A"}),
    (BITS, "dart at 30 %", "dense on 3 bits", "dart at 50 %"),
    # A row without its settings stands for cells that differ in them.
    (SCOPES, "dart", "griffin", {f"dart (scope={s}) at 50 % vs griffin (scope={s}) at 50 %": "-" for s in IN_SCOPES}),
    (SCOPES, "dart (scope=all)", "griffin", {"dart (scope=all) at 50 % vs griffin (scope=all) at 50 %": "-"}),
    # Other sparsities go together only where both rows name theirs, and other tasks never.
    (APART, "griffin", "dart", "sparsity"), (APART, "random", "dart", "task"),
    (APART, "griffin at 30 %", "dart at 50 %", {"griffin at 30 % vs dart at 50 %": None}),
    (APART, "rounding", "dense", {"rounding vs dense": "A"}),
    # A method as it was typed goes before others that it could mean.
    (TYPED, "dart", "dart:allocation=uniform", {"dart at 50 % vs dart:allocation=uniform at 50 %": "A"}),
])  # fmt: skip
def test_rows_of_the_board_are_compared_as_far_as_they_are_named(tmp_path, records, a, b, expected):
    """expected: which side is better in each contrast; or a word of the refusal."""
    out = save(tmp_path, *records)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            compare_rows(a, b, [out])
        return
    found = rows(compare_rows(a, b, [out]))
    assert [(r.contrast, r.task) for r in found] == [(contrast, "arc") for contrast in expected]
    assert all(expected[r.contrast] in (r.better, None) for r in found)


@pytest.mark.parametrize(("wanted", "shown"), [
    ((), {"acc", "gold_ll"}), (("acc_norm",), {"acc_norm"}), (("acc",), {"acc"}),
    (("all",), {"acc", "acc_norm", "gold_ll"}),
])  # fmt: skip
def test_main_metrics_and_log_likelihoods_are_shown_and_others_on_request(tmp_path, wanted, shown):
    values = [{**v, "acc_norm": float(i % 2), "gold_ll": -float(i)} for i, v in enumerate(right(0.5))]
    a = save(tmp_path, answered("arc", values))
    assert {r.metric for r in rows(compare_folders(a, a, wanted))} == shown
    with pytest.raises(UserError, match="acc_norm"):
        compare_folders(a, a, ["acc_nrm"])


def test_filters_are_told_apart(tmp_path):
    values = [{"exact_match": float(i % 2)} for i in range(N)]
    lines = samples("gsm", values, filter_="strict") + samples("gsm", [{"exact_match": 1.0}] * N, filter_="flexible")
    metrics = [Metric("gsm", "exact_match", v, 0.1, N, True, filter=f) for f, v in (("strict", 0.5), ("flexible", 1.0))]
    a = save(tmp_path, answered("gsm", values, metrics=metrics, lines=lines))
    assert [r.metric for r in rows(compare_folders(a, a))] == ["exact_match,strict"]
    assert len(rows(compare_folders(a, a, ["exact_match"]))) == 2


def test_a_metric_that_documents_do_not_give_is_left_out_and_said(tmp_path):
    values = [{"acc": 1.0, "mcc": [i % 2, 1]} for i in range(N)]
    metrics = [Metric("cola", "acc", 1.0, 0.0, N, True), Metric("cola", "mcc", 0.3, None, N, True)]
    a = save(tmp_path / "a", answered("cola", values, metrics=metrics))
    found = compare_folders(a, a, ["all"])
    assert [r.metric for r in rows(found)] == ["acc"] and "cola mcc" in " ".join(found.notes)
    with pytest.raises(UserError, match="cola mcc"):
        sides(tmp_path / "alone", [answered("cola", values, metrics=metrics[1:])], [])


def test_p_is_corrected_over_the_tasks_of_one_contrast_and_metric(sweep, tmp_path):
    """Also over tasks with limits of their own."""
    apart = [answered(task, right(share), method, s, limit=limit) for task, limit in (("arc", 40), ("piqa", 41))
             for method, s, share in (("dense", 0.0, 0.9), ("griffin", 0.5, 0.5))]  # fmt: skip
    for folder, contrasts in ((sweep, 2), (save(tmp_path, *apart), 1)):
        found = rows(compare_rows("dense", "griffin", [folder]))
        assert len({r.contrast for r in found}) == contrasts and len(found) == 2 * contrasts
        for contrast in {r.contrast for r in found}:
            (p, first), (_, second) = sorted((r.p, r.p_holm) for r in found if r.contrast == contrast)
            assert first == pytest.approx(min(1, 2 * p)) and second >= first


def test_the_model_of_lm_eval_perplexity_weighs_documents_equally(tmp_path):
    values = [{"perplexity": -float(i % 5)} for i in range(N)]
    metrics = [Metric("lambada", "perplexity", math.exp(2), None, N, False)]
    (row,) = rows(sides(tmp_path, [answered("lambada", values, metrics=metrics)], []))
    assert (row.kind, row.value_a) == ("log-perplexity", pytest.approx(math.exp(2)))


def group(share, by_size, seed=0):
    """A record of a group in a group, aggregated as lm-eval does it."""
    sizes = [5 + 7 * i for i in range(8)]
    values = {f"mmlu_{i}": right(share + 0.05 * i, n, seed + i) for i, n in enumerate(sizes)}
    metrics = [
        metric_of(t, "acc", v, part_of="mmlu_stem" if i < 4 else "mmlu") for i, (t, v) in enumerate(values.items())
    ]
    means, weights = [m.value for m in metrics], "documents" if by_size else "tasks"
    for name, n, part_of in (("mmlu_stem", 4, "mmlu"), ("mmlu", 8, None)):
        value = aggregate_subtask_metrics(means[:n], sizes[:n], by_size)
        metrics.append(Metric(name, "acc", value, 0.1, sum(sizes[:n]), True, part_of, weights=weights))
    return answered("mmlu", [], metrics=metrics, lines=[s for t, v in values.items() for s in samples(t, v)]), value


@pytest.mark.parametrize("by_size", [True, False])
def test_a_groups_value_is_that_of_the_record_and_its_members_are_the_clusters(tmp_path, by_size):
    (one, value_a), (two, value_b) = group(0.5, by_size), group(0.3, by_size, seed=20)
    (row,) = rows(sides(tmp_path, [one], [two]))
    assert (row.task, row.n, row.clusters) == ("mmlu", 236, 8)
    assert (row.value_a, row.value_b) == pytest.approx((value_a, value_b), rel=1e-12)
    assert row.difference == pytest.approx(value_a - value_b)
    assert row.test == ("exact sign flip of clusters" if by_size else "bootstrap-t")


def test_documents_of_one_cluster_are_one_unit(tmp_path):
    clusters = [f"passage {i // 4}" for i in range(N)]
    pair = [[answered("boolq", right(s), lines=samples("boolq", right(s), clusters=clusters))] for s in (0.9, 0.6)]
    (row,) = rows(sides(tmp_path, *pair))
    assert (row.n, row.clusters) == (60, 15)


def test_the_command_prints_and_saves_the_rows_in_full(sweep, tmp_path):
    words = ("compare", sweep, "--row", "dense,griffin")
    made = rows(compare_rows("dense", "griffin", [sweep]))
    data = json.loads(command(*words, "--format", "json", "--metric", "all").out)
    assert (data["seed"], data["resamples"], data["correction"]) == (20240229, 10_000, "Holm")
    assert command(*words, "--save", tmp_path / "x" / "t.csv").code == 0
    lines = list(csv.DictReader(io.StringIO((tmp_path / "x" / "t.csv").read_text())))
    for row, line, one in zip(data["rows"], lines, made, strict=True):
        assert row["value_a"] == float(line["value_a"]) == one.value_a
        assert row["p_holm"] == float(line["p_holm"]) == one.p_holm
        assert row.keys() >= {"contrast", "task", "metric", "n", "difference", "low", "high", "p", "better", "effect"}
        assert row["key_a"] == line["key_a"]
    printed = command(*words)
    assert printed.code == 0 and printed.out == command(*words).out and "griffin at 30 %" in printed.out
    same = command("compare", sweep, sweep, "--format", "json")
    assert {r["better"] for r in json.loads(same.out)["rows"]} == {"-"}
