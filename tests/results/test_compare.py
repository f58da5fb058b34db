"""`dart-eval compare`: which cells and documents are paired, what is refused, what the rows say."""

import csv
import io
import json
import math
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from dart_eval.cli import compare as command
from dart_eval.results import show
from dart_eval.results.compare import compare_folders, compare_rows, table
from dart_eval.results.record import Metric
from dart_eval.util.errors import UserError
from tests.helpers.records import N, answered, digest, metric_of, perplexities, right, samples, save, table_body


def rows(comparison):
    return [SimpleNamespace(**row) for row in comparison.rows]


def render(comparison, form):
    return comparison.to_json() if form == "json" else show.render([table(comparison)], form)


# -- two folders ---------------------------------------------------------------------------------------------------


def test_cells_are_matched_by_what_was_asked_whatever_made_them(tmp_path):
    a = save(tmp_path / "a", answered("arc", right(0.9)), answered("arc", right(0.9), "dense", 0.0))
    b = save(
        tmp_path / "b",
        answered("arc", right(0.5), code="other", versions={"torch": "2.5"}),
        answered("arc", right(0.9), "dense", 0.0),
        answered("piqa", right(0.9)),
    )
    found = compare_folders(a, b)
    assert [(r.contrast, r.task, r.metric) for r in rows(found)] == [
        ("dart 50 %", "arc", "acc"),
        ("dense", "arc", "acc"),
    ]
    assert [r.better for r in rows(found)] == ["A", "-"]
    assert rows(found)[1].p == 1
    text = " ".join(found.notes)
    assert "code (c0de in A, other in B)" in text and "versions.torch (2.4 in A, 2.5 in B)" in text
    assert f"Only in {b}: piqa under dart 50 %" in text


def test_where_lower_is_better_the_lower_side_is_better(tmp_path):
    a = save(tmp_path / "a", answered("drift", perplexities(1.0), up=False))
    b = save(tmp_path / "b", answered("drift", perplexities(1.1), up=False))
    for left, right_, better in ((a, b, "A"), (b, a, "B")):
        (row,) = rows(compare_folders(left, right_))
        assert row.better == better
        assert (row.ratio < 1) == (better == "A") == (row.difference < 0)
    assert "nats per word" in render(compare_folders(a, b), "md")


def test_of_several_runs_of_one_cell_the_newest_counts(tmp_path, capsys):
    a = save(
        tmp_path / "a",
        answered("arc", right(0.2), created="2026-01-01", code="old"),
        answered("arc", right(0.9), created="2026-02-01", code="new"),
    )
    b = save(tmp_path / "b", answered("arc", right(0.9)))
    found = compare_folders(a, b)
    assert rows(found)[0].difference == 0
    assert capsys.readouterr().err == f"note: several runs of one cell in {a}: the one finished last counts\n"


def test_two_precisions_in_one_folder_are_no_old_and_new(tmp_path):
    a = save(tmp_path / "a", answered("arc", right(0.2)), answered("arc", right(0.2), dtype="bfloat16"))
    with pytest.raises(UserError, match="bfloat16"):
        compare_folders(a, a)


def test_one_run_in_two_folders_is_no_older_run(tmp_path, capsys):
    """And two precisions in two folders are not said to lie in one."""
    run = answered("arc", right(0.6), "griffin"), answered("arc", right(0.8), "dense", 0.0)
    one, two = save(tmp_path / "one", *run), save(tmp_path / "two", *run)
    assert compare_rows("dense", "griffin", [one, two]).rows and not capsys.readouterr().err
    half = save(tmp_path / "half", answered("arc", right(0.6), "griffin", dtype="bfloat16"))
    with pytest.raises(UserError, match=r"half and .*bfloat16"):
        compare_rows("dense", "griffin", [one, half])


def test_versions_that_differ_behind_their_first_letters_differ(tmp_path):
    sides = [answered("arc", right(0.6), versions={"torch": f"2.9.0.dev2025{day}+cpu"}) for day in ("0801", "0915")]
    found = compare_folders(*(save(tmp_path / str(i), r) for i, r in enumerate(sides)))
    assert "20250801+cpu in A, 2.9.0.dev20250915+cpu in B" in " ".join(found.notes)


def test_nothing_in_common_is_answered_with_what_differs(tmp_path):
    a = save(tmp_path / "a", answered("arc", right(0.5), limit=100))
    b = save(tmp_path / "b", answered("arc", right(0.5), limit=200), answered("piqa", right(0.5), limit=200))
    with pytest.raises(UserError, match="differ in limit; "):
        compare_folders(a, b)


@pytest.mark.parametrize(("change", "words"), [
    ({"n": 50}, "10 of 60 documents .*arc 50"), ({"data": "v2"}, "60 of 60 documents .*arc 0"),
    ({"prompt": True}, "1 of 60 documents .*prompts .*arc 7.*few-shot"), ({"ids": True}, "documents"),
])  # fmt: skip
def test_what_cannot_be_paired_is_refused_with_the_reason(tmp_path, change, words):
    a = save(tmp_path / "a", answered("arc", right(0.5)))
    values = right(0.5)[: change.get("n", N)]
    lines = samples("arc", values, data=change.get("data", "v1"))
    if "prompt" in change:
        lines[7]["prompt_hash"] = digest("another")
    if "ids" in change:
        lines[7]["doc_id"] = 1000
    b = save(tmp_path / "b", answered("arc", values, lines=lines))
    with pytest.raises(UserError, match=words):
        compare_folders(a, b)


def test_damaged_samples_are_refused_and_left_out_beside_others(tmp_path, capsys):
    a = save(tmp_path / "a", answered("arc", right(0.5)))
    (file,) = (a / "samples").iterdir()
    file.write_text(file.read_text().replace('"acc": 1.0', '"acc": 0.0', 1))
    with pytest.raises(UserError, match="no metric can be compared"):
        compare_folders(a, a)
    assert "samples" in capsys.readouterr().err
    save(a, answered("piqa", right(0.5)))
    assert [row.task for row in rows(compare_folders(a, a))] == ["piqa"]
    assert "left out" in capsys.readouterr().err


# -- one folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path):
    """Two methods at two sparsities and dense, on two tasks; DART in two allocations on one of them."""
    records = []
    for task in ("arc", "piqa"):
        records.append(answered(task, right(0.9), "dense", 0.0))
        for s in (0.5, 0.7):
            records.append(answered(task, right(0.9 - s / 2), "dart", s))
            records.append(answered(task, right(0.8 - s / 2), "griffin", s, params={}))
    records.append(answered("arc", right(0.6), params={"allocation": "uniform", "detect": True}))
    return save(tmp_path / "out", *records)


def places(comparison):
    return [(r.contrast, r.task) for r in rows(comparison)]


def test_methods_are_compared_at_each_sparsity_both_have(sweep):
    found = compare_rows("griffin", "dart:allocation=depth", [sweep])
    assert places(found) == [
        (f"griffin {s} vs dart:allocation=depth {s}", t) for s in ("50 %", "70 %") for t in ("arc", "piqa")
    ]
    assert all(r.difference <= 0 for r in rows(found))


def test_dense_goes_with_every_sparsity(sweep):
    found = compare_rows("dense", "griffin", [sweep])
    assert places(found) == [(f"dense vs griffin {s}", t) for s in ("50 %", "70 %") for t in ("arc", "piqa")]
    assert {r.better for r in rows(found)} == {"A"}


def test_two_settings_of_one_method(sweep):
    found = compare_rows("dart:allocation=uniform", "dart:allocation=depth", [sweep])
    assert places(found) == [("dart:allocation=uniform 50 % vs dart:allocation=depth 50 %", "arc")]


def test_sparsities_are_compared_where_both_rows_name_theirs(sweep):
    found = compare_rows("griffin 50 %", "griffin 70 %", [sweep])
    assert places(found) == [("griffin 50 % vs griffin 70 %", t) for t in ("arc", "piqa")]
    found = compare_rows("griffin 70 %", "dart:allocation=depth", [sweep])
    assert places(found) == [("griffin 70 % vs dart:allocation=depth 70 %", t) for t in ("arc", "piqa")]


def test_models_are_compared_where_all_else_agrees(tmp_path):
    models = [{"name": name, "revision": None, "weights": name} for name in ("small", "large")]
    a = save(tmp_path / "a", answered("arc", right(0.3), model=models[0]))
    b = save(tmp_path / "b", answered("arc", right(0.8), model=models[1]))
    (row,) = rows(compare_rows("small dart", "large dart 50 %", [a, b]))
    assert (row.contrast, row.better) == ("small dart 50 % vs large dart 50 %", "B")
    save(a, answered("arc", right(0.8), "griffin", params={}, model=models[0]))
    for text in ("griffin", "small griffin"):
        (row,) = rows(compare_rows("dart", text, [a, b]))
        assert row.contrast == "small dart 50 % vs small griffin 50 %"


def test_rows_of_the_board_differ_in_whatever_they_do(tmp_path):
    """A method at one sparsity and on few bits, against another one: paired on the tasks that both have."""
    out = save(
        tmp_path, *(answered(t, right(0.9), "dart", 0.7, ffn_bits="4", limit=n) for t, n in (("arc", 9), ("piqa", 8))),
        answered("arc", right(0.5), "dense", 0.0, ffn_bits="3", limit=9), answered("arc", right(0.5), "dart", limit=9),
    )  # fmt: skip
    (row,) = rows(compare_rows("dart on 4 bits 70 %", "dense on 3 bits", [out]))
    assert (row.contrast, row.task, row.better) == ("dart on 4 bits 70 % vs dense on 3 bits", "arc", "A")
    with pytest.raises(UserError, match="dart 50 %"):
        compare_rows("dart 70 %", "dense on 3 bits", [out])


def test_a_row_without_its_settings_stands_for_cells_that_differ_in_them(tmp_path):
    out = save(
        tmp_path, *(answered("arc", right(0.5), m, scope=s) for m in ("dart", "griffin") for s in ("all", "last"))
    )
    pairs = [f"dart (scope={s}) 50 % vs griffin (scope={s}) 50 %" for s in ("all", "last")]
    assert [p[0] for p in places(compare_rows("dart", "griffin", [out]))] == pairs
    assert [p[0] for p in places(compare_rows("dart (scope=all)", "griffin", [out]))] == pairs[:1]


def test_other_sparsities_are_compared_only_where_both_rows_name_theirs(tmp_path):
    out = save(tmp_path, *(answered("arc", right(s), m, s, params={}) for m, s in (("dart", 0.5), ("griffin", 0.7))))
    with pytest.raises(UserError, match="differ in method, sparsity"):
        compare_rows("griffin", "dart", [out])
    (row,) = rows(compare_rows("griffin 70 %", "dart 50 %", [out]))
    assert row.contrast == "griffin 70 % vs dart 50 %"


def test_a_method_as_it_was_typed_goes_before_others_that_it_could_mean(tmp_path):
    """`dart` beside `dart:allocation=uniform`, as in --help."""
    made = [
        answered("arc", right(share), params={"allocation": how}) for how, share in (("depth", 0.9), ("uniform", 0.5))
    ]
    for record, method in zip(made, ("dart", "dart:allocation=uniform"), strict=True):
        record.settings["method"] = method
    (row,) = rows(compare_rows("dart", "dart:allocation=uniform", [save(tmp_path, *made)]))
    assert (row.contrast, row.better) == ("dart 50 % vs dart:allocation=uniform 50 %", "A")


def test_a_method_without_a_sparsity_is_named_as_on_the_board(tmp_path):
    out = save(tmp_path, answered("arc", right(0.9), "rounding", 0.0), answered("arc", right(0.5), "dense", 0.0))
    (row,) = rows(compare_rows("rounding", "dense", [out]))
    assert row.contrast == "rounding vs dense"


@pytest.mark.parametrize(("a", "b", "words"), [
    ("dart", "griffin", "dart:allocation=depth 50 %, dart:allocation=depth 70 %"),
    ("grifin", "dart", "did you mean griffin"), ("dart:window=8", "griffin", "no row dart:window=8"),
    ("griffin", "griffin", "same cell"), ("griffin", "griffin 70 %", "same cell"), ("griffin 60 %", "dense", "60 %"),
])  # fmt: skip
def test_what_names_no_row_is_refused(sweep, a, b, words):
    with pytest.raises(UserError, match=words):
        compare_rows(a, b, [sweep])


def test_methods_without_a_common_task_are_refused_with_what_each_has(tmp_path):
    out = save(tmp_path, answered("arc", right(0.5)), answered("piqa", right(0.5), "griffin", 0.7, params={}))
    with pytest.raises(UserError, match="task"):
        compare_rows("dart", "griffin", [out])


# -- metrics and corrections ---------------------------------------------------------------------------------------


def both(values, other):
    return [{**v, **o} for v, o in zip(values, other, strict=True)]


def lengths(n=N):
    return [{"acc_norm": float(i % 2), "gold_ll": -float(i)} for i in range(n)]


def test_main_metrics_and_log_likelihoods_are_shown_and_others_on_request(tmp_path):
    values = both(right(0.5), lengths())
    a = save(tmp_path, answered("arc", values))
    for wanted, shown in (
        ((), {"acc", "gold_ll"}), (("acc_norm",), {"acc_norm"}), (("acc",), {"acc"}),
        (("all",), {"acc", "acc_norm", "gold_ll"}),
    ):  # fmt: skip
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
    assert [r.metric for r in rows(found)] == ["acc"]
    assert "cola mcc" in " ".join(found.notes)
    b = save(tmp_path / "b", answered("cola", values, metrics=metrics[1:]))
    with pytest.raises(UserError, match="cola mcc"):
        compare_folders(b, b)


def test_p_is_corrected_over_the_tasks_of_one_contrast_and_metric(sweep):
    found = rows(compare_rows("dense", "griffin", [sweep]))
    by_contrast = {}
    for row in found:
        by_contrast.setdefault(row.contrast, []).append(row)
    for family in by_contrast.values():
        p = sorted((r.p, r.p_holm) for r in family)
        assert len(p) == 2
        assert p[0][1] == pytest.approx(min(1, 2 * p[0][0]))


def test_tasks_with_limits_of_their_own_are_one_family(tmp_path):
    records = [
        answered(task, right(share), method, s, limit=limit)
        for task, limit in (("arc", 40), ("piqa", 41))
        for method, s, share in (("dense", 0.0, 0.9), ("griffin", 0.5, 0.5))
    ]
    found = rows(compare_rows("dense", "griffin", [save(tmp_path, *records)]))
    assert [row.p_holm for row in found] == pytest.approx([2 * row.p for row in found])


def test_the_model_of_lm_eval_perplexity_weighs_documents_equally(tmp_path):
    values = [{"perplexity": -float(i % 5)} for i in range(N)]
    metrics = [Metric("lambada", "perplexity", math.exp(2), None, N, False)]
    a = save(tmp_path, answered("lambada", values, metrics=metrics))
    (row,) = rows(compare_folders(a, a))
    assert row.kind == "log-perplexity"
    assert row.value_a == pytest.approx(math.exp(2))


# -- groups --------------------------------------------------------------------------------------------------------


def group(share, by_size, seed=0):
    """A record of a group in a group, aggregated as lm-eval does it."""
    from lm_eval.api.metrics import aggregate_subtask_metrics

    sizes = {f"mmlu_{i}": 5 + 7 * i for i in range(8)}
    values = {t: right(share + 0.05 * i, n, seed + i) for i, (t, n) in enumerate(sizes.items())}
    metrics = [
        metric_of(t, "acc", v, part_of="mmlu_stem" if i < 4 else "mmlu") for i, (t, v) in enumerate(values.items())
    ]
    means = [m.value for m in metrics]
    total = aggregate_subtask_metrics(means, list(sizes.values()), by_size)
    stem = aggregate_subtask_metrics(means[:4], list(sizes.values())[:4], by_size)
    weights = "documents" if by_size else "tasks"
    metrics.append(Metric("mmlu_stem", "acc", stem, 0.1, sum(list(sizes.values())[:4]), True, "mmlu", weights=weights))
    metrics.append(Metric("mmlu", "acc", total, 0.1, sum(sizes.values()), True, weights=weights))
    lines = [s for t, v in values.items() for s in samples(t, v)]
    return answered("mmlu", [], metrics=metrics, lines=lines), total


@pytest.mark.parametrize("by_size", [True, False])
def test_a_groups_value_is_that_of_the_record_and_its_members_are_the_clusters(tmp_path, by_size):
    (one, value_a), (two, value_b) = group(0.5, by_size), group(0.3, by_size, seed=20)
    (row,) = rows(compare_folders(save(tmp_path / "a", one), save(tmp_path / "b", two)))
    assert (row.task, row.n, row.clusters) == ("mmlu", 236, 8)
    assert (row.value_a, row.value_b) == pytest.approx((value_a, value_b), rel=1e-12)
    assert row.difference == pytest.approx(value_a - value_b)
    assert row.test == ("exact sign flip of clusters" if by_size else "bootstrap-t")


def test_documents_of_one_cluster_are_one_unit(tmp_path):
    clusters = [f"passage {i // 4}" for i in range(N)]
    sides = [answered("boolq", right(s), lines=samples("boolq", right(s), clusters=clusters)) for s in (0.9, 0.6)]
    found = compare_folders(*(save(tmp_path / str(i), r) for i, r in enumerate(sides)))
    (row,) = rows(found)
    assert (row.n, row.clusters) == (60, 15)
    (line,) = table_body(render(found, "md"))[1:]
    assert line[-2:] == ["60", "15"]


# -- output --------------------------------------------------------------------------------------------------------


def test_json_and_csv_hold_the_rows_in_full(sweep):
    found = compare_rows("dense", "griffin", [sweep])
    data = json.loads(render(found, "json"))
    assert (data["seed"], data["resamples"], data["correction"]) == (20240229, 10_000, "Holm")
    lines = list(csv.DictReader(io.StringIO(render(found, "csv"))))
    for row, line, made in zip(data["rows"], lines, rows(found), strict=True):
        assert row["value_a"] == float(line["value_a"]) == made.value_a
        assert row["p_holm"] == float(line["p_holm"]) == made.p_holm
        assert row.keys() >= {"contrast", "task", "metric", "n", "difference", "low", "high", "p", "better", "effect"}
        assert row["key_a"] == line["key_a"]


def test_the_note_says_tests_seed_and_what_was_not_tested(tmp_path):
    a = save(tmp_path / "a", answered("arc", right(0.5)[:5]), answered("drift", perplexities(1.0), up=False))
    b = save(tmp_path / "b", answered("arc", right(0.9)[:5]), answered("drift", perplexities(1.1), up=False))
    text = render(compare_folders(a, b), "md")
    for words in ("bootstrap-t", "seed 20240229", "Holm", "5 independent units", "(arc acc)"):
        assert words in text


TASKS = ("t0", "t1", "t2", "t3")


def note_of(a, b, word):
    return [note for note in table(compare_folders(a, b)).notes if word in note]


def test_an_interval_and_a_p_that_disagree_are_explained(tmp_path):
    """Five answers more and none less: McNemar's exact p is .0625, and Tango's interval leaves out 0."""
    sides = ([{"acc": float(i < share)} for i in range(N)] for share in (25, 20))
    a, b = (save(tmp_path / str(i), answered("arc", values)) for i, values in enumerate(sides))
    (row,) = rows(compare_folders(a, b))
    assert row.p == row.p_holm == 0.0625 and row.low > 0
    assert [note.count("arc acc") for note in note_of(a, b, "disagree")] == [1]
    assert not note_of(a, a, "disagree")


def test_an_interval_without_0_beside_a_p_that_holm_raises_is_explained(tmp_path):
    """Seven answers more and none less: p is .016, and .063 over four tasks."""
    a, b = (
        save(
            tmp_path / str(more),
            *(answered(t, [{"acc": float(i < (more if t == "t0" else 20))} for i in range(N)]) for t in TASKS),
        )
        for more in (27, 20)
    )
    first, *_ = rows(compare_folders(a, b))
    assert first.p < 0.05 < first.p_holm and first.low > 0 and first.better == "-"
    assert [note.count("t0 acc") for note in note_of(a, b, "disagree")] == [1]


@pytest.fixture
def cli():
    app = typer.Typer()
    app.command()(command.compare)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def test_the_command_prints_and_saves(cli, sweep, tmp_path):
    args = (sweep, "--row", "griffin,dart:allocation=depth")
    printed = cli(*args)
    assert printed.exit_code == 0, printed.output
    assert printed.stdout.startswith("### A: griffin   B: dart:allocation=depth")
    assert cli(*args, "--save", tmp_path / "x" / "t.csv").exit_code == 0
    assert (tmp_path / "x" / "t.csv").read_text().count("\n") == 5
    assert json.loads(cli(*args, "--format", "json", "--metric", "all").stdout)["rows"]
    assert cli(*args).stdout == printed.stdout


def test_two_folders_at_the_command_line(cli, sweep):
    found = cli(sweep, sweep, "--format", "json")
    assert {r["better"] for r in json.loads(found.stdout)["rows"]} == {"-"}


@pytest.mark.parametrize(("args", "words"), [
    (("a",), "two folders"), ((), "two folders"), (("a", "--row", "dart"), "two rows in --row 'dart'"),
    (("a", "--row", ""), "two rows"), (("a", "b", "--format", "xml"), "xml"), (("no-a", "no-b"), "no-a"),
    (("--row", "dart,dense"), "out"),
])  # fmt: skip
def test_wrong_options_are_refused(cli, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    found = cli(*args)
    assert isinstance(found.exception, UserError)
    assert words in str(found.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_terminal_has_the_title_once_and_names_the_columns_that_do_not_fit(sweep, capsys):
    made = table(compare_rows("dense", "griffin", [sweep]))
    show.show(made)
    shown = capsys.readouterr().out
    assert shown.count(made.title) == 1
    assert [head for head in made.columns if head not in shown] == []


def test_a_cell_of_one_side_is_not_called_as_one_of_both(tmp_path):
    both = [answered("arc", right(0.9), "dense", 0.0), answered("arc", right(0.8))]
    more = [answered("arc", right(0.7), "dense", 0.0, ffn_bits="4"), answered("arc", right(0.7), scope="all")]
    found = compare_folders(save(tmp_path / "a", *both, *more), save(tmp_path / "b", *both))
    (said,) = found.notes
    assert said.startswith(f"Only in {tmp_path / 'a'}: ")
    assert "arc under dense on 4 bits" in said and "arc under dart (scope=all) 50 %" in said
