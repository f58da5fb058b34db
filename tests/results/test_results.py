"""Records, the tables of them, and the standard error of perplexities."""

import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest

# The formula alone, held against its derivation: a model's perplexities are no round numbers.
from dart_eval.evaluation.evaluate import _stderr
from dart_eval.results.inputs import labels
from dart_eval.results.record import SCHEMA, Metric, Record
from tests.helpers.commands import command
from tests.helpers.records import record, render, rows, sealed, table_body, tables

ROW_KEYS = {
    "model", "method", "params", "sparsity", "scope", "task", "metric", "value", "stderr", "n", "effective_sparsity",
    "weights_read",
}  # fmt: skip


# -- record --------------------------------------------------------------------------------------------------------


def test_a_record_survives_json():
    made = record(params={"window": 8, "detect": True})
    back = Record.from_json(json.dumps(made.to_json()))
    assert back == dataclasses.replace(made, samples=[])


def test_samples_are_not_written_into_the_record():
    assert "samples" not in record().to_json()


def test_keys_that_a_later_version_added_are_ignored():
    assert Record.from_json(json.dumps(sealed({**record().to_json(), "extra": 1}))).key == "k1"


@pytest.mark.parametrize("schema", [SCHEMA + 1, "1", None, 0])
def test_a_schema_that_is_not_known_is_refused(schema):
    with pytest.raises(ValueError, match=rf"schema {schema} is not known"):
        Record.from_json(json.dumps({**record().to_json(), "schema": schema}))


@pytest.mark.parametrize("missing", ["metrics", "inputs", "effective_sparsity"])
def test_a_record_without_a_field_is_refused(missing):
    data = record().to_json()
    del data[missing]
    with pytest.raises(ValueError, match=f"record.{missing}: Field required"):
        Record.from_json(json.dumps(sealed(data)))


@pytest.mark.parametrize(("field", "value"), [("mask_sparsity", 0.51), ("tokens", 1235), ("key", "k2"), ("extra", 1)])
def test_a_record_that_was_edited_is_refused(field, value):
    with pytest.raises(ValueError, match="digest does not fit"):
        Record.from_json(json.dumps({**record().to_json(), field: value}))


# -- tables --------------------------------------------------------------------------------------------------------


def dense_and_dart():
    return [record(key="k1"), record("dense", 0.0, key="k2"), record(sparsity=0.7, key="k3")]


def test_json_has_one_row_per_metric_with_the_promised_keys():
    data = json.loads(render(dense_and_dart(), "json"))
    assert len(data) == 6
    for row in data:
        assert row.keys() >= ROW_KEYS
    chosen = [r for r in data if r["key"] == "k3" and r["metric"] == "acc"]
    assert [{k: chosen[0][k] for k in sorted(ROW_KEYS)}] == [{
        "effective_sparsity": 0.4321, "method": "dart", "metric": "acc", "model": "tiny", "n": 400, "params": {},
        "scope": "scored", "sparsity": 0.7, "stderr": 0.0123, "task": "arc_easy", "value": 0.6251,
        "weights_read": 0.4996,
    }]  # fmt: skip


def test_a_method_has_one_label_over_tasks_of_other_limits():
    records = [record(key="k1"), record(key="k2"), record("dense", 0.0, key="k3")]
    records[1].inputs.update(task="xsum", limit=20)
    assert {(r["task"], r["label"]) for r in rows(records)} == {("arc_easy", "dart"), ("arc_easy", "dense")}
    by_cell = [(row[0], row[1]) for row in tables(records)[-1].body]
    assert by_cell == [("arc_easy", "dense"), ("arc_easy", "dart"), ("xsum", "dart")]


def test_rows_do_not_depend_on_the_order_of_records():
    records = dense_and_dart()
    assert rows(records) == rows(records[::-1])
    assert [r["sparsity"] for r in rows(records)] == [0.0, 0.5, 0.7] * 2


def test_csv_has_one_line_per_metric():
    records = [*dense_and_dart(), record(params={"window": 8}, key="k4")]
    lines = list(csv.DictReader(io.StringIO(render(records, "csv"))))
    assert len(lines) == 8
    assert lines[0].keys() >= ROW_KEYS
    first = {r["key"]: r for r in lines if r["metric"] == "acc"}["k4"]
    assert (float(first["value"]), float(first["stderr"])) == (0.6251, 0.0123)
    assert json.loads(first["params"]) == {"window": 8}


def test_a_metric_without_standard_error_has_an_empty_csv_cell_and_a_json_null():
    lines = csv.DictReader(io.StringIO(render([record()], "csv")))
    assert [r["stderr"] for r in lines if r["metric"] == "acc_norm"] == [""]
    assert [r["stderr"] for r in json.loads(render([record()], "json")) if r["metric"] == "acc_norm"] == [None]


def test_markdown_shows_value_error_and_scope_in_aligned_columns():
    text = render([record()], "md")
    head, row = table_body(text)[:2]
    shown = dict(zip(head, row, strict=True))
    assert shown == {
        "task": "arc_easy", "method": "dart", "sparsity": "50 %", "acc": "0.6251 ± 0.0123", "acc_norm": "0.5000",
        "n": "400", "effective": "0.432", "masked out": "0.500", "read": "0.500", "scope": "scored",
    }  # fmt: skip
    lines = [line for line in text.split("### Costs")[0].splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert [line for line in text.splitlines() if line.startswith("###")] == ["### Accuracy", "### Costs"]


def test_costs_are_shown_with_units_and_with_all_that_the_method_adds():
    costs = tables([record()])[-1]
    shown = dict(zip(costs.columns, costs.body[0], strict=True))
    assert shown["prefill"] == "4.0 M" and shown["decode"] == "150 k"
    assert shown["/ dense"] == f"{(150_000 + 12.5) / 200_000:.3f}"
    assert (shown["memory"], shown["state"]) == ("3.0 kB", "512 B") and shown["peak"] == "3.1 MB"
    assert shown["seconds"] == "1.5" and shown["tokens/s"] == f"{1234 / 1.5:.1f}"


@pytest.mark.parametrize(("metric", "title"), [
    ("acc", "Accuracy"), ("rougeL", "Summaries"), ("word_perplexity", "Perplexity (lower is better)"),
    ("chrf", "Other metrics"),
])  # fmt: skip
def test_every_metric_has_a_table(metric, title):
    made = tables([record(metrics=[Metric("t", metric, 0.5, None, 10, True)])])
    assert [t.title for t in made] == [title, "Costs"]
    assert metric in made[0].columns


def test_a_metric_may_be_called_like_another_column():
    made = tables([record(metrics=[Metric("t", name, 0.25, None, 10, True) for name in ("acc", "n", "task")])])
    other = next(t for t in made if t.title == "Other metrics")
    shown = dict(zip(other.columns, other.body[0], strict=True))
    assert (shown["n"], shown["task"], shown["n (metric)"], shown["task (metric)"]) == ("10", "t", "0.2500", "0.2500")


def test_tex_escapes_percent_and_underscore():
    text = render([record()], "tex").replace("{%\n", "{\n")  # a comment that ends a line on purpose
    for special in "%_":
        assert f"\\{special}" in text
        assert special not in text.replace(f"\\{special}", "")
    assert r"arc\_easy & dart & 50 \% & 0.6251 $\pm$ 0.0123 & 0.5000" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2


def test_subtasks_are_hidden_unless_asked_for():
    metrics = [Metric("mmlu", "acc", 0.3, 0.01, 200, True), Metric("mmlu_law", "acc", 0.2, 0.02, 100, True, "mmlu")]
    made = [record(metrics=metrics)]
    for form in ("md", "csv", "json"):
        assert "mmlu_law" not in render(made, form)
        assert "mmlu_law" in render(made, form, subtasks=True)


def test_two_settings_of_one_method_are_told_apart():
    common = {"ring": 24, "detect": True}
    records = [
        record(params={**common, "window": 8}, key="k1"),
        record(params={**common, "window": 10, "detect": False}, key="k2"),
        record("griffin", key="k3"),
    ]
    methods = {row[1] for row in table_body(render(records, "md")) if row[0] == "arc_easy"}
    assert methods == {"dart:detect=true:window=8", "dart:detect=false:window=10", "griffin"}


def test_settings_are_called_what_a_user_types_where_that_tells_them_apart():
    def typed(key, spec, **params):
        made = record(key=key, params=params)
        return dataclasses.replace(made, settings={**made.settings, "method": spec})

    usual = typed("k1", "dart", window=10, detect=True)
    quiet = typed("k2", "dart:detect=false", window=10, detect=False)
    assert set(labels([usual, quiet]).values()) == {"dart", "dart:detect=false"}
    assert set(labels([quiet]).values()) == {"dart:detect=false"}
    older = typed(
        "k3", "dart", window=8, detect=True
    )  # of a version with other defaults: the name alone says too little
    assert set(labels([usual, older]).values()) == {"dart:window=10", "dart:window=8"}


def test_parameters_stay_hidden_where_a_method_has_one_setting():
    records = [record(params={"window": 8}, key="k1"), record(params={"window": 8}, sparsity=0.7, key="k2")]
    assert "window" not in render(records, "md").split("### Costs")[0].split("value ± standard error")[0]


def test_the_model_is_shown_where_there_are_several():
    heads = [table_body(render(records, "md"))[0] for records in (
        [record()], [record(), record(model="other", key="k2")],
    )]  # fmt: skip
    assert ["model" in head for head in heads] == [False, True]


# -- standard error of perplexities --------------------------------------------------------------------------------


# The formula by itself, where no run has the documents that would show it: hence a private name.


def random_documents(seed, count=300):
    """(log-likelihood, weight) of documents whose length and difficulty vary."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(50, 1500, count).astype(float)
    return [(float(ll), float(w)) for ll, w in zip(-weights * generator.gamma(9, 0.35, count), weights, strict=True)]


def perplexity(ll, weight):
    return np.exp(-ll / weight)


def bits(ll, weight):
    return -ll / weight / math.log(2)


@pytest.mark.parametrize(("metric", "value"), [
    ("word_perplexity", perplexity), ("byte_perplexity", perplexity), ("bits_per_byte", bits),
])  # fmt: skip
def test_the_standard_error_of_a_perplexity_agrees_with_jackknife_and_bootstrap(metric, value):
    documents = random_documents(seed=1)
    ll, weight = np.array(documents).T
    n = len(documents)
    left_out = value(ll.sum() - ll, weight.sum() - weight)
    jackknife = np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    drawn = np.random.default_rng(1).integers(0, n, (4000, n))
    bootstrap = value(ll[drawn].sum(1), weight[drawn].sum(1)).std(ddof=1)
    ours = _stderr(metric, documents)
    assert ours == pytest.approx(jackknife, rel=0.1)
    assert ours == pytest.approx(bootstrap, rel=0.1)


def test_documents_of_equal_quality_have_no_error():
    assert _stderr("word_perplexity", [(-20.0, 10.0), (-40.0, 20.0)]) == pytest.approx(0)


@pytest.mark.parametrize("samples", [[], [(-3.0, 2.0)], [0.5, 1.0], [(-3.0, 2.0), 1.0]])
def test_no_standard_error_without_two_documents_that_are_pairs(samples):
    assert _stderr("word_perplexity", samples) is None


def test_cells_that_differ_in_a_setting_of_the_run_can_be_told_apart():
    first, second = record(key="k1"), record(key="k2")
    second.inputs["seed"] = 1
    quality = tables([first, second])[0]
    assert [row[quality.columns.index("method")] for row in quality.body] == ["dart (seed=0)", "dart (seed=1)"]


def told_apart(*changes):
    """Labels of cells of one method whose inputs are changed."""
    made = [record(key=f"k{i}") for i in range(len(changes))]
    for r, change in zip(made, changes, strict=True):
        r.inputs.update(change)
    return list(labels(made).values())


@pytest.mark.parametrize(("name", "first", "second"), [
    ("scope", "scored", "generated"), ("execution", "masked", "sliced"), ("execution", None, "masked"),
])  # fmt: skip
def test_cells_that_differ_in_scope_or_execution_are_told_apart(name, first, second):
    assert told_apart({name: first}, {name: second}) == [
        f"dart ({name}={first or 'default'})", f"dart ({name}={second})",
    ]  # fmt: skip


def test_a_setting_that_follows_from_the_task_can_be_left_out():
    cells = [{"limit": 100}, {"limit": 64, "task": "xsum"}]
    assert told_apart(*cells) == ["dart", "dart"]
    assert told_apart(*cells, {"limit": 10, "task": "xsum"})[1:] == ["dart (limit=64)", "dart (limit=10)"]


def test_every_table_names_the_model():
    one = render([record()], "md")
    assert "Model tiny." in one
    for table in tables([record(), record(key="k2", model="other")]):
        assert table.columns[0] == "model"


def test_json_has_no_nan():
    text = render([record(metrics=[Metric("t", "acc", math.nan, math.inf, 3, True)])], "json")
    assert json.loads(text, parse_constant=pytest.fail)[0]["value"] is None


def test_tex_escapes_whatever_a_name_may_hold():
    text = render([record(model="a{b}$c~d^e\\f")], "tex")
    assert r"a\{b\}\$c\textasciitilde{}d\textasciicircum{}e\textbackslash{}f" in text


def test_an_error_bar_never_stops_a_cell():
    assert _stderr("word_perplexity", [(-1e6, 1), (-2e6, 2)]) is None
    assert _stderr("word_perplexity", [(-1.0, 0), (-2.0, 0)]) is None


def test_upper_bounds_are_named_under_the_tables():
    """They look ahead."""
    usual, oracle = (record(method=m, key=m) for m in ("griffin", "oracle"))
    oracle.settings.update(method="oracle", upper_bound=True)
    assert "Upper bound" not in render([usual], "md")
    assert "look ahead: oracle." in render([usual, oracle], "md")


@pytest.mark.parametrize("form", ["table", "md", "csv", "tex", "json"])
def test_every_verb_that_prints_has_the_same_forms(form, tmp_path):
    from tests.helpers.records import answered, save

    values = [{"acc": float(i % 3 == 0)} for i in range(40)]
    out = save(tmp_path / "out", answered("arc", values, "dense", 0.0), answered("arc", values, "griffin", 0.5))
    assert command("check", out, "--baseline", tmp_path / "b.json", "--update").code == 0
    for words in (
        ["tables", out], ["compare", out, "--row", "dense,griffin"],
        ["check", out, "--baseline", tmp_path / "b.json", "--all"],
    ):  # fmt: skip
        done = command(*words, "--format", form)
        assert done.code == 0 and "griffin" in done.out, (words, done.err)
        assert (("\\begin{" in done.out) == (form == "tex") and done.out.lstrip()[:1] in "[{") or form != "json"
