"""A paper: its file, the numbers of its tables, which row is the best, what is written, and its claims.

Most papers here are of one table `t` whose cells were answered by hand: so many of N right answers.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import yaml
from scipy import stats as theirs

from dart_eval.results import stats as ours
from dart_eval.results import sums
from dart_eval.results.inputs import identity
from dart_eval.results.paper import ANY, CSV, FAILS, HOLDS, MEAN, OPEN, TAILED_UNITS, Claim, Paper, Sides, judged
from dart_eval.results.record import Metric
from dart_eval.results.show import render
from dart_eval.results.stats import Estimate, mean
from dart_eval.results.store import Store
from dart_eval.sweep.options import config_from
from dart_eval.sweep.paper import SHIPPED, load
from dart_eval.util.bits import LAST_BITS
from dart_eval.util.errors import UserError
from tests.helpers.commands import command as typed
from tests.helpers.records import record, samples

N = 40
TASKS = ("easy", "hard", "harder")
BASE = {"method": "dense", "sparsity": "0"}
ROWS = {"Dense": "dense", "A": "griffin", "B": "wanda-sp", "C": "magnitude"}
ACC = {"Easy": {"task": "easy", "metric": "acc"}}
HARD = {"Hard": {"task": ["hard", "harder"], "metric": "acc"}}
PPL = {"PPL": {"task": "easy", "metric": "word_perplexity"}}
# Claims: of two rows, and on what is counted from the shapes of a model.
GOOD = {
    "claim": "it is better", "source": "abstract", "table": "t", "rows": ["A", "B"], "column": "Easy", "sparsity": 0.5,
}  # fmt: skip
COUNTED = {
    "claim": "at 8B", "shape": "llama-3.1-8b", "method": "dart", "column": "state MB", "sparsity": 0.7, "at_most": 9,
}  # fmt: skip


def file(tmp_path, *tables, **keys):
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump({"tables": [*tables], **keys}, sort_keys=False))
    return str(path)


def table(columns=None, rows=("Dense", "A", "B"), **keys):
    """A table of a file. rows: of `ROWS`, or label -> method."""
    methods = rows if isinstance(rows, dict) else {label: ROWS[label] for label in rows}
    keys = {"sparsity": [0.5], **keys}
    return {"name": "t", "title": "Title", "methods": methods, "columns": columns or ACC, **keys}


def answered(store, cell, right=N, loss=None, choices=0, values=None, metrics=(), settings=None, **changes):
    """Save the record of a wanted cell: `right` of N answers, and a perplexity where `loss` is given."""
    task, shape = cell["task"], np.sin(np.arange(N)) * (1 + (cell["method"] == "griffin"))  # each varies in its own way
    values = values or [
        {"acc": float(i < right), **({} if loss is None else {"word_perplexity": [-10 * loss - s, 10]})}
        for i, s in enumerate(shape - shape.mean())
    ]
    metrics = [*metrics] or [Metric(task, "acc", sum(v["acc"] for v in values) / len(values), 0.05, len(values), True)]
    if loss is not None:
        metrics.append(Metric(task, "word_perplexity", sums.exp(loss), 0.5, N, False))
    lines = samples(task, values)
    for line in lines:
        line["responses"] = [[-float(c), False] for c in range(choices)] or ["a text"]
    plain = record()
    inputs = {**plain.inputs, "limit": None, "device": "cpu", "code": "c0de" * 4, **cell["asked"]}
    inputs = {name: value for name, value in inputs.items() if name != "ffn_bits" or value}
    key = hashlib.sha256(identity(inputs).encode()).hexdigest()
    whole = dataclasses.replace(
        plain, key=key, inputs=inputs, metrics=metrics, samples=lines,
        settings={**plain.settings, **(settings or {})}, **{"effective_sparsity": 0.4321, **changes},
    )  # fmt: skip
    return store.save("cell", whole)


def paper(tmp_path, answers, one=None, missing=None, **keys):
    """Return a paper of one table, and it. answers: (row, task) -> right answers, or keywords of `answered`."""
    spec = load(file(tmp_path, one or table(), **keys), config_from(None, BASE))
    (sheet,) = spec.sheets
    store, cells = Store(tmp_path / "out"), {}
    for cell in sheet.cells[sheet.cells["asked"].notna()].to_dict("records"):
        given = answers.get((cell["row"], cell["task"]))
        if given is not None:
            saved = answered(store, cell, **(given if isinstance(given, dict) else {"right": given}))
            cells[saved.key] = saved
    filled = Paper(store, [*cells.values()], spec.sheets, missing or {})
    return filled, sheet, spec


def shown(*given, **keys):
    filled, sheet, _ = paper(*given, **keys)
    return filled.table(sheet)


def easy(**rights):
    return {(row, "easy"): right for row, right in rights.items()}


def test_rows_come_in_blocks_with_their_numbers(tmp_path):
    made = shown(tmp_path, easy(Dense=30, A=20, B=18))
    assert [row[0] for row in made.body] == ["Dense", "A", "B"]
    assert made.body[1] == ["A", "50 %", "50.0 ±5.0", "57 %"]
    assert list(made.data.columns) == CSV
    assert made.data[["value", "stderr", "n"]].to_numpy().tolist() == [[v, 0.05, 40] for v in (0.75, 0.5, 0.45)]
    rows = list(csv.DictReader(io.StringIO(render([made], "csv"))))
    assert [(r["row"], float(r["value"]), r["bold"]) for r in rows][1] == ("A", 0.5, "False")
    assert json.loads(rows[1]["params"]) == made.data["params"].iloc[1] and float(rows[1]["p"]) == 0.5


ABC = table(rows=["A", "B", "C"])
OFTEN = {"right": 39, "effective_sparsity": 0.38}  # it runs dense for long
AHEAD = {"right": 40, "settings": {"method": "oracle", "upper_bound": True}}
LAST = {"right": 40, "settings": {"granularity": LAST_BITS}}
ON_4 = table(rows={"A": "griffin", "B": "wanda-sp", "C": {"method": "griffin", "ffn_bits": 4}})
ON_8 = table(rows={"A": "griffin", "B": "wanda-sp", "C": {"method": "dense", "ffn_bits": 8, "sparsity": 0.5}})
SCOPES = table(rows={"A": "griffin", "B": {"method": "wanda-sp", "scope": "all"}})
BLEU = [{"metrics": [Metric("easy", "bleu", value, 1.5, N, True)]} for value in (30.0, 2.0)]


@pytest.mark.parametrize(("answers", "one", "bold", "p"), [
    (easy(Dense=40, A=30, B=10), None, 1, 2 * 0.5**20),  # A, not Dense, which is better still; McNemar, 20 to none
    (easy(A=30, B=28), None, None, 0.5),  # two documents, one way
    (easy(A=30), None, None, None),
    (easy(A=30, B=10, C=29), ABC, None, 1),  # A beats B, but not C
    # A row that runs dense for long is not the best of its sparsity, nor held against the others.
    (easy(Dense=40, A=10, B=OFTEN), None, None, None), (easy(A=10, B=OFTEN, C=30), ABC, 2, 2 * 0.5**20),
    (easy(A=10, B={"right": 30, "effective_sparsity": 0.39}), None, 2, 2 * 0.5**20),
    # Rounding saves bytes, no neurons: its row takes no other out of the test. An oracle is no rival, 2:4 is.
    (easy(A=30, B=10, C={"right": 5, "effective_sparsity": 0.86}), ON_4, 0, None),
    (easy(A=30, B=10, C=AHEAD), ABC, 0, 2 * 0.5**20), (easy(A=30, B=10, C=LAST), ABC, 0, 2 * 0.5**20),
    (easy(A=30, B=10, C=39), ON_8, 0, 2 * 0.5**20),
    (easy(A=30, B=10), SCOPES, None, None),  # rows of two scopes are never held against each other
    (easy(A={"loss": 3.0}, B={"loss": 2.5}), table(PPL), 2, None),  # the lower perplexity is the better one
    (easy(A=BLEU[0], B=BLEU[1]), table({"BLEU": {"task": "easy", "metric": "bleu"}}), None, None),  # of no documents
])  # fmt: skip
def test_the_best_is_bold_only_where_the_test_says_so(tmp_path, answers, one, bold, p):
    """bold: the line of the best; p: of its test."""
    made = shown(tmp_path, answers, one)
    assert made.bold == (frozenset() if bold is None else {(bold, 2)})
    tests = made.data["p"].dropna()
    if p is None and bold is None:
        assert tests.empty
    elif p is not None:
        assert tests.tolist() == [pytest.approx(p)]


def test_the_mean_weighs_columns_alike_and_is_tested(tmp_path):
    rights = {"A": (20, 10, 30), "B": (4, 10, 30)}
    answers = {(row, task): right for row, some in rights.items() for task, right in zip(TASKS, some, strict=True)}
    made = shown(tmp_path, answers, table({**ACC, **HARD}, mean=True))
    by_place = {(v.row, v.column): v for v in made.data.itertuples()}
    assert by_place["A", "Hard"].value == pytest.approx(0.5)
    assert by_place["A", "Hard"].stderr == pytest.approx(0.05 / 2**0.5)
    assert by_place["A", MEAN].value == pytest.approx(0.5)  # (.5 + (.25 + .75) / 2) / 2, not a mean of three
    assert by_place["B", MEAN].value == pytest.approx((0.1 + 0.5) / 2)
    assert [by_place["A", head].bold for head in (MEAN, "Easy", "Hard")] == [True, True, False]
    assert made.columns[-2:] == [MEAN, "read in all"]


@pytest.mark.parametrize(("documents", "verdict"), [(5, "open"), (6, "holds")])
def test_a_mean_is_tested_as_a_claim_is(tmp_path, documents, verdict):
    """Tasks of fewer than six documents test nothing, however many there are."""
    columns = {task: {"task": task, "metric": "acc"} for task in ("x", "y", "z")}
    of = {row: [{"acc": float(i < right)} for i in range(documents)] for row, right in (("A", documents), ("B", 1))}
    answers = {(row, task): {"values": values} for row, values in of.items() for task in columns}
    claim = {"claim": "c", "table": "t", "rows": ["A", "B"], "column": MEAN, "sparsity": 0.5}
    filled, sheet, spec = paper(tmp_path, answers, table(columns, mean=True), claims=[claim])
    best = filled.table(sheet).data.set_index(["row", "column"]).loc[("A", MEAN), "bold"]
    assert bool(best) is (verdict == "holds")
    assert filled.verdicts(spec.claims, {}).body[0][1] == verdict


def test_a_mean_over_the_same_documents_has_their_error(tmp_path):
    """A task under two numbers of examples, with the same answers: the mean is as uncertain as each."""
    columns = {f"{n} shots": {"task": "easy", "metric": "acc", "num_fewshot": n} for n in (0, 5)}
    values, error = [{"acc": float(i % 2)} for i in range(100)], math.sqrt(0.25 / 99)
    cell = {"values": values, "metrics": [Metric("easy", "acc", 0.5, error, 100, True)]}
    made = shown(tmp_path, easy(A=cell), table(columns, mean=True))
    assert made.data["stderr"].tolist() == pytest.approx([error] * 3)


def test_what_is_missing_is_a_dash_or_a_reason(tmp_path):
    missing = {task: f"task {task} has no data" for task in ("hard", "harder")} | {"another": "not asked for"}
    made = shown(tmp_path / "a", easy(A=20), table({**ACC, **HARD}, mean=True), missing=missing)
    assert "Hard" not in " ".join(made.columns) and len(made.data) == 1
    assert [row[2] for row in made.body] == ["-", "50.0 ±5.0", "-"]
    notes = " ".join(made.notes)
    assert "task hard has no data" in notes and "another" not in notes
    spelt = shown(tmp_path / "b", easy(A=20), table({"E": {"task": "easy", "metric": "acc_nrom"}}))
    assert spelt.body == [] and "acc_nrom" in " ".join(spelt.notes)


def test_reported_numbers_stand_apart_with_their_source(tmp_path):
    known = [{"label": "theirs", "sparsity": s, "values": {"Easy": 0.666}, "source": f"page {s}"} for s in (0.5, 0.7)]
    made = shown(tmp_path, easy(A=20), table(rows=["A"], reported=known))
    assert made.body[1:] == [["theirs [1]", "50 %", "66.6", ""]]
    assert len(made.data) == 1 and "page 0.5" in " ".join(made.notes)


def test_costs_are_columns_too(tmp_path):
    fields = {"state": "state_mib", "FLOPs": "flops_per_token", "re-masks": "remasks_per_1000"}
    columns = {head: {"task": "easy", "field": field} for head, field in fields.items()}
    made = shown(tmp_path, easy(A=20, B=20), table(columns))
    assert made.body[1][2:5] == ["0.000", "0.750", "2.43"] and made.bold == frozenset()
    assert made.data["value"].tolist()[:3] == [512 / 2**20, 0.75, 3000 / 1234]


def test_guessing_has_a_line_below_the_unpruned_rows(tmp_path):
    answers = {(row, "easy"): {"right": right, "choices": 4} for row, right in (("Dense", 30), ("A", 35), ("B", 10))}
    made = shown(tmp_path, answers, table(sparsity=[0.5, 0.7]))
    assert [row[0] for row in made.body[:4]] == ["Dense", "guessing", "A", "B"]
    assert made.body[1][1:3] == ["", "25.0"] and made.bold == {(2, 2), (4, 2)}


def test_a_row_of_unrounded_weights_stands_beside_rounded_ones(tmp_path):
    """The table rounds to 4 bits, one row says 16: its number is not that of the 4 bits."""
    rows = {"Dense": "dense", "16 bits": {"method": "dense", "ffn_bits": 16}}
    filled, sheet, spec = paper(tmp_path, {("Dense", "easy"): 8, ("16 bits", "easy"): 36}, table(rows=rows, ffn_bits=4))
    assert [c.ffn_bits for c in spec.sweeps] == [("4",), ("16",)]
    assert [row[2] for row in filled.table(sheet).body] == ["20.0 ±5.0", "90.0 ±5.0"]


Q = {"task": "smoke_questions", "metric": "acc", "limit": 3}
SMALL = table({"Q": Q, "R": {"task": "smoke_summary", "metric": "rougeL", "limit": 2, "limit_share": 0.5}})


def configs(tmp_path, *tables, base=None, **keys):
    return load(file(tmp_path, *tables, **keys), config_from(None, {**BASE, **(base or {})})).sweeps


def test_the_file_gives_sweeps(tmp_path):
    state = table({"Q": Q, "state": {"task": "smoke_questions", "field": "state_mib", "limit": 3}}, ["B"], name="u")
    sweeps = configs(tmp_path, SMALL, state, base={"seed": 3})
    three = ("dense", "griffin", "wanda-sp")
    assert [(c.tasks, c.limit, c.method) for c in sweeps] == [
        (("smoke_questions",), 3, three), (("smoke_summary",), 2, three), (("smoke_questions",), 3, ("wanda-sp",)),
    ]  # fmt: skip
    assert len(configs(tmp_path, SMALL, {**SMALL, "name": "u"})) == 2  # of two tables
    assert {(c.sparsity, c.seed) for c in sweeps} == {((0.5,), 3)}
    assert [c.limit for c in configs(tmp_path, SMALL, base={"limit": 5})] == [5, 2]  # half of it, rounded
    short = load(file(tmp_path, table({"A": {"task": "arc", "metric": "acc"}})), config_from(None, BASE))
    assert {*short.sheets[0].cells["task"]} == {*short.sweeps[0].tasks} == {"arc_easy", "arc_challenge"}


def test_the_nearest_setting_counts(tmp_path):
    """A column's before its table's before the file's; a row's before all."""
    rows = {
        "Dense": "dense", "8 bits": {"method": "dense", "ffn_bits": "8:128", "sparsity": 0.5}, "G": "griffin",
        "G, all": {"method": "griffin", "scope": "all"}, "other": {"method": "dart", "only": "Llama-3.1-8B"},
    }  # fmt: skip
    columns = {"Q": {**Q, "num_fewshot": 1}, "4 bits": {**Q, "ffn_bits": 4, "scope": "scored"}}
    one = table(columns, rows, sparsity=[0.5, 0.7], scope="last")
    spec = load(file(tmp_path, one, max_new_tokens=30), config_from(None, BASE))
    assert {(m, c.ffn_bits, c.scope, c.num_fewshot, c.sparsity) for c in spec.sweeps for m in c.method} == {
        *((m, ("16",), "last", 1, (0.5, 0.7)) for m in ("dense", "griffin")), ("dense", ("8:128",), "last", 1, (0.5,)),
        *((m, ("4",), "scored", None, (0.5, 0.7)) for m in ("dense", "griffin")),
        ("dense", ("8:128",), "scored", None, (0.5,)),
        ("griffin", ("16",), "all", 1, (0.5, 0.7)), ("griffin", ("4",), "all", None, (0.5, 0.7)),
    }  # fmt: skip
    assert {c.gen_kwargs for c in spec.sweeps} == {"max_gen_toks=30"}
    lines = spec.sheets[0].cells.drop_duplicates("line")
    assert list(zip(lines["level"], lines["row"], strict=True)) == [
        (0.0, "Dense"), (0.5, "8 bits"), (0.5, "G"), (0.5, "G, all"), (0.7, "G"), (0.7, "G, all"),
    ]  # fmt: skip
    for model in ({"model": "/models/Llama-3.1-8B"}, {}):
        with_it = load(file(tmp_path, one), config_from(None, {**BASE, **model})).sheets[0]
        assert ("other" in {*with_it.cells["row"]}) is bool(model)
    said = {"chat_template": True, "model": "org/typed", "revision": "step1000"}
    (first, *_) = configs(tmp_path, SMALL, base=said)
    assert (first.model, first.chat_template, first.revision) == ("org/typed", True, "step1000")
    assert configs(tmp_path, SMALL, base=said, chat_template=False)[0].chat_template is False
    short = {"Y": {"task": "xsum", "metric": "rougeL", "max_new_tokens": 16}}
    assert configs(tmp_path, table(short), max_new_tokens=1000)[0].gen_kwargs == "max_gen_toks=16"
    assert configs(tmp_path, table({"Q": {**Q, "limit": None}}, limit=7))[0].limit is None  # null is the run's own


X = {"method": "griffin"}
WRONG = [
    ({"tabels": []}, "tabels", "not permitted"), ({"tables": []}, "tables", "at least 1"),
    ({"tables": [table()] * 2}, "", "two tables"), ({"scope": 3}, "scope", ""), ({"ffn_bits": "4,8"}, "ffn_bits", ""),
    *(({"tables": [one]}, place, word) for one, place, word in (
        (table({"Q": {**Q, "metrc": "x"}}), "tables.0.columns.Q.metrc", ""), (table(name="../x"), "tables.0.name", ""),
        (table(rows={"A": "drat"}), "", "unknown method 'drat'"),
        ({**table(), "methods": ["dart"]}, "tables.0.methods", "dictionary"),
        (table({"Q": {"task": "t"}}), "tables.0", "metric or a field"),
        (table({"Q": {"task": "t", "field": "sate"}}), "tables.0.columns.Q.field", "state_mib"),
        (table({**ACC, **PPL}, mean=True), "tables.0", "one metric"), (table(PPL, mean=True), "tables.0", "perplexity"),
        (table({"read": Q}), "tables.0", "read"), (table(rows={"A": {**X, "only": "llama"}}), "table 't'", "model"),
        (table(rows={"X": {"scope": "all"}}), "methods.X.method", "required"),
        (table(rows={"X": {**X, "scope": "al"}}), "X.scope", "'al'"),
        (table(reported=[{"label": "l", "sparsity": 0.5, "values": {"Z": 1}, "source": "s"}]), "", "Z"))),
    *(({"claims": [{**GOOD, **change}]}, "", word) for change, word in (
        ({"rows": ["A", "H"]}, "its rows"), ({"column": "P"}, "'t'"), ({"table": "three"}, "no table 'three'"),
        ({"sparsity": 0.6}, "no table 't'"), ({"rows": ["A"]}, "two rows"), ({"at_most": 3}, "two rows"),
        ({"by": math.nan}, "claims.0.by"),
        ({"shape": "llama-3.1-8b"}, "a table or a shape"), ({"rows": ["A"], "at_most": 3}, "no table 't'"),
        ({"by": 0.1, "times": 2}, "`by` and `times`"))),
    *(({"claims": [{**COUNTED, **change}]}, "", word) for change, word in (
        ({"at_most": None}, "at_most"), ({"column": "state MiB"}, "state MB"), ({"sparsity": 70}, "sparsity"),
        ({"prompt": 0}, "prompt"), ({"prompt": 10**10}, "prompt"))),
]  # fmt: skip


@pytest.mark.parametrize(("change", "place", "word"), WRONG)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path, change, place, word):
    with pytest.raises(UserError) as refused:
        load(file(tmp_path, *change.get("tables", [table()]), **{k: v for k, v in change.items() if k != "tables"}),
             config_from(None, BASE))  # fmt: skip
    message = str(refused.value)
    assert message.startswith(str(tmp_path / "paper.yaml")) and place in message and word in message


def test_a_row_with_a_table_of_layers_is_checked_at_the_tables_sparsities(tmp_path):
    rows = {"Dense": "dense", "Table": "dart:allocation=table:llama-3.1-8b-70"}
    assert len(configs(tmp_path, table(rows=rows, sparsity=[0.7]))) == 1
    with pytest.raises(UserError, match=r"sparsity 0\.5 keeps 0\.500"):
        configs(tmp_path, table(rows=rows, sparsity=[0.5, 0.7]))


@pytest.mark.parametrize("name", [p.stem.removeprefix("paper-") for p in SHIPPED.glob("paper-*.yaml")])
def test_shipped_files_are_understood(name):
    spec = load(name, config_from(None, BASE))
    names = {"gsm8k", "continued"} if name == "long" else {"accuracy", "ablations", "overhead"}
    assert {sheet.name for sheet in spec.sheets} >= {"summaries", *names}
    with pytest.raises(UserError, match="dart, long, smoke"):
        load("fifteen", config_from(None, BASE))


@pytest.mark.parametrize(("keys", "word"), [
    ({"tables": "smoke_sumary"}, "smoke_summary"), ({"tables": "arc"}, "it begins"),
    ({"claims": [{**COUNTED, "method": "cats", "column": "overhead %"}]}, "cats"),
])  # fmt: skip
def test_what_cannot_be_run_or_counted_is_refused_before_the_first_sweep(tmp_path, monkeypatch, keys, word):
    def run(*_, **__):
        raise UserError("it begins")

    monkeypatch.setattr("dart_eval.cluster.run.run_all", run)
    late = table({"S": {"task": keys.pop("tables", "arc"), "metric": "acc"}}, name="late", max_length=64)
    done = typed("paper", file(tmp_path, SMALL, late, **keys), "--output", tmp_path / "out")
    assert done.code == 2 and word in done.err


@pytest.mark.slow
def test_the_command_runs_writes_and_goes_on(tmp_path, saved_llama, monkeypatch):
    two = table({"Q": Q}, ["B"], name="two")
    three = table({"Q": {"task": "arc_easy", "metric": "acc", "limit": 2}}, name="three")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    words = ["paper", file(tmp_path, SMALL, two, three, about="A small paper."), "--model", saved_llama]
    words += ["--data-dir", "data", "--output", "out"]
    done = typed(*words)
    assert done.code == 0, done.err
    assert done.err.count("done smoke_questions wanda-sp at 50 %") == 1  # in two tables, run once
    written = {p.name for p in (tmp_path / "out" / "tables").iterdir()}
    assert written == {"all.md", *(f"{n}.{e}" for n in ("t", "two") for e in ("csv", "md", "tex"))}
    text = (tmp_path / "out" / "tables" / "all.md").read_text()
    assert text.startswith("A small paper.") and "Q (n=3)" in text and "task arc_easy has no data" in text
    again = typed(*words).err
    assert "6 of 6 cells are finished already" in again and "done " not in again
    assert (tmp_path / "out" / "tables" / "all.md").read_text() == text


# -- claims: which side of one the measured interval lies on, worked out here by other means ---------------------------

MANY = 200


def estimate(values, task="easy"):
    values = np.asarray(values, float)
    slopes = (values - values.mean()) / len(values)
    return Estimate(float(values.mean()), {f"{task} {i}": v for i, v in enumerate(slopes)})


def sides(a, b, head="Easy", metric="acc"):
    return Sides(head, metric, len(a), estimate(a), estimate(b))


def claim(column="Easy", **more):
    return Claim(**{**GOOD, "column": column, **more})


def verdicts(tmp_path, answers, *claims, counted=None, **keys):
    filled, _, spec = paper(tmp_path, answers, claims=[{**GOOD, **one} for one in claims], **keys)
    return filled.verdicts(spec.claims, counted or {}).body


@pytest.mark.parametrize(("by", "times"), [
    (None, None), (0.1, None), (0.3, None), (None, 0.9), (None, 1.5), (None, 3.0),
])  # fmt: skip
def test_a_verdict_is_that_of_students_t_on_the_documents(by, times):
    """a - times b - by, document by document, tested against 0: another road to the same verdict."""
    draw = np.random.default_rng(3)
    a, b = 0.6 + 0.3 * draw.standard_normal(MANY), 0.4 + 0.3 * draw.standard_normal(MANY)
    gap = a - b * (times or 1) - (by or 0)
    p = theirs.ttest_1samp(gap, 0).pvalue
    assert abs(p - 0.05) > 0.02  # the bootstrap and Student's t need not agree at the edge
    expected = OPEN if p > 0.05 else HOLDS if gap.mean() > 0 else FAILS
    assert judged(claim(by=by, times=times), [sides(a, b)])[0] == expected


def test_what_was_measured_is_said_with_its_interval_and_documents():
    draw = np.random.default_rng(4)
    a, b = (draw.random(MANY) < 0.7).astype(float), (draw.random(MANY) < 0.5).astype(float)
    _, text, n, _ = judged(claim(), [sides(a, b)])
    half = theirs.t.ppf(0.975, MANY - 1) * (a - b).std(ddof=1) / MANY**0.5
    value, low, high = map(float, re.findall(r"[+-][\d.]+", text))
    assert n == str(MANY) and "points" in text and value == pytest.approx(100 * (a - b).mean(), abs=0.05)
    assert (low, high) == pytest.approx((value - 100 * half, value + 100 * half), abs=1)
    assert judged(claim(times=1.1), [sides(a, b)])[1].startswith(f"{a.mean() / b.mean():.2f} times [")
    nats = judged(claim(), [sides(-3 * a, -3 * b, metric="word_perplexity")])[1]
    assert nats.startswith(f"{-3 * (a - b).mean():+.3f} [") and "points" not in nats


@pytest.mark.slow
def test_a_long_tail_alone_decides_nothing_on_perplexities(monkeypatch):
    """Where nothing is true, one column and one of seven err in at most 4 % of cases; at p < .05 in 8 and 25 %."""
    monkeypatch.setattr(ours, "bootstrap_t", partial(ours.bootstrap_t, resamples=700))
    draw, drawn, wrong = np.random.default_rng(9), 250, dict.fromkeys(("Easy", ANY), 0)
    for _ in range(drawn):
        tails = draw.lognormal(size=(7, TAILED_UNITS)) - math.exp(0.5)
        columns = [sides(tail, 0 * tail, f"column {i}", "word_perplexity") for i, tail in enumerate(-tails)]
        wrong["Easy"] += judged(claim(), columns[:1])[0] != OPEN
        wrong[ANY] += judged(claim(ANY), columns)[0] != OPEN
    assert all(count <= 0.04 * drawn for count in wrong.values()), wrong
    clear = draw.normal(1, 1, TAILED_UNITS)
    one, few = (sides(v, 0 * v, metric="word_perplexity") for v in (clear, clear[1:]))
    assert [judged(claim(), [rows])[0] for rows in (one, few)] == [HOLDS, OPEN]


def test_a_claim_on_at_least_one_column_pays_for_each_look():
    """Ten columns, of which one is better by chance at p = .02: Holm's p over ten is .2."""
    base = np.tile([0.0, 1.0], MANY // 2)
    noise = np.random.default_rng(0).standard_normal(MANY)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    lucky = base + noise + theirs.t.ppf(1 - 0.02 / 2, MANY - 1) / MANY**0.5  # t at p = .02
    alone = [sides(lucky, base, "one")]
    assert judged(claim(), alone)[0] == HOLDS
    others = [sides(base + np.roll(noise, i + 1), base, f"column {i}") for i in range(9)]
    verdict, text, *_ = judged(claim(ANY), alone + others)
    assert verdict == OPEN and text.endswith("(one)")
    worse = [sides(base - 1 + 0.1 * noise, base, f"column {i}") for i in range(3)]
    assert judged(claim(ANY), worse)[0] == FAILS
    assert judged(claim(ANY), [*worse, others[0]])[0] == OPEN  # one of them may yet
    verdict, text, *_ = judged(claim(ANY), worse, "3 of 4 columns")  # and so may one that was not measured
    assert verdict == OPEN and text.endswith("; 3 of 4 columns)")
    clear = base + 0.03 + 0.05 * noise  # the column that proves it is shown: by less, but beyond its noise
    verdict, text, *_ = judged(claim(ANY), [sides(base + noise + 0.08, base, "noisy"), sides(clear, base, "clear")])
    assert verdict == HOLDS and text.endswith("(clear)")


def test_as_many_documents_as_a_claim_needs_close_it_in_four_of_five_cases():
    """By the noncentral t of as many documents as a pilot asks for; a perplexity's claim needs a hundred at least."""
    draw = np.random.default_rng(5)
    pilot = draw.normal(size=40)
    pilot = 0.2 + (pilot - pilot.mean()) / pilot.std(ddof=1)
    word, _, n, needs = judged(claim(), [sides(pilot, 0 * pilot)])
    assert (word, n) == (OPEN, "40") and int(needs) == pytest.approx(((1.960 + 0.842) / 0.2) ** 2, rel=0.03)
    edge, shift = theirs.t.ppf(0.975, int(needs) - 1), 0.2 * int(needs) ** 0.5
    assert theirs.nct.sf(edge, int(needs) - 1, shift) == pytest.approx(0.8, abs=0.02)
    assert judged(claim(by=0.199), [sides(pilot, 0 * pilot)]).needs == "over 100,000"
    assert judged(claim(), [sides(pilot + 1, 0 * pilot)]).needs == ""  # it holds
    assert judged(claim(), [sides(pilot + 0.6, 0 * pilot, metric="word_perplexity")]).needs == "100"
    assert judged(claim(), [sides(pilot[:2], 0 * pilot[:2])]).needs == ""  # no pilot


def test_no_ratio_decides_nothing():
    """A rival near 0, and numbers of which the smaller one is better."""
    draw = np.random.default_rng(7)
    high, none = 0.3 + 0.1 * draw.standard_normal(MANY), 1e-4 + 0.1 * draw.standard_normal(MANY)
    verdict, text, *_ = judged(claim(times=3), [sides(high, none)])
    assert verdict == OPEN and text.startswith("no ratio")
    worse, better = -0.29 + 0.1 * draw.standard_normal(MANY), -0.21 + 0.1 * draw.standard_normal(MANY)  # of flips
    assert judged(claim(times=2), [sides(worse, better, metric="flips")])[0] == OPEN


@pytest.mark.parametrize("gap", [0.92, 0.955, 0.99])
def test_the_verdict_on_a_ratio_is_that_of_fiellers_interval(gap):
    draw = np.random.default_rng(8)
    base = 0.5 + 0.2 * draw.standard_normal(MANY)
    verdict, text, *_ = judged(claim(times=0.95), [sides(gap * base + 0.2 * draw.standard_normal(MANY), base)])
    low, high = map(float, re.search(r"\[([\d.]+), ([\d.]+)\]", text).groups())
    assert verdict == (HOLDS if low > 0.95 else FAILS if high < 0.95 else OPEN)


def test_few_or_equal_documents_decide_nothing():
    """Ten tasks of two documents are twenty units, and their spread within tasks is hardly known."""
    draw = np.random.default_rng(10)
    tasks = [estimate(draw.random(2), f"task {i}") for i in range(10)]
    assert len(mean(tasks).units) == 20 and mean(tasks).interval is None and mean(tasks).p is None
    assert judged(claim(), [sides([1, 1, 1, 0], [0, 0, 0, 0])])[0] == OPEN
    assert judged(claim(), [sides([1] * MANY, [1] * MANY)])[0] == OPEN
    assert judged(claim(), []) == (OPEN, "not measured", "", "")


def test_verdicts_come_from_the_documents_of_a_folder(tmp_path):
    columns = {**ACC, **PPL, "state": {"task": "easy", "field": "state_mib"}}
    own, lower = {"rows": ["A"], "column": "state"}, {"column": "PPL"}
    body = verdicts(
        tmp_path, easy(A={"right": 30, "loss": 3.0}, B={"right": 10, "loss": 2.0}),
        {}, {"by": 0.9}, lower, {**lower, "rows": ["B", "A"]}, {**own, "at_most": 1.0}, {**own, "at_most": 0.0},
        {**own, "at_most": 512 / 2**20}, {"rows": ["A", "C"]}, one=table(columns, ["A", "B", "C"]),
    )  # fmt: skip
    assert [row[1] for row in body] == [HOLDS, FAILS, OPEN, OPEN, HOLDS, FAILS, HOLDS, OPEN]
    assert body[0] == ["it is better (abstract)", HOLDS, body[0][2], "40"] and body[0][2].startswith("+50.0 points [")
    assert body[2][2].startswith("-1.000 [") and body[4][2].endswith(" MiB")  # a nat a word worse


def test_bits_are_held_against_nats(tmp_path):
    """One text under two metrics: its claims have one verdict."""
    generator, answers = np.random.default_rng(0), {}
    ends = [(100 * generator.gamma(9, 0.2), 9 + 2 * generator.random()) for _ in range(120)]
    for row in "AB":
        pairs = [[-(n + more * (row == "B")), 100] for n, more in ends]
        total = sum(x for x, _ in pairs) / 12000
        answers[row] = {
            "values": [{"byte_perplexity": pair, "bits_per_byte": pair} for pair in pairs],
            "metrics": [Metric("easy", "byte_perplexity", math.exp(-total), 0.1, 120, False),
                        Metric("easy", "bits_per_byte", -total / math.log(2), 0.1, 120, False)],
        }  # fmt: skip
    columns = {head: {"task": "easy", "metric": head} for head in ("byte_perplexity", "bits_per_byte")}
    for i, (by, verdict) in enumerate(((0.09, HOLDS), (0.12, FAILS))):
        body = verdicts(
            tmp_path / str(i), easy(**answers), *({"column": c, "by": by} for c in columns), one=table(columns)
        )
        assert [row[1] for row in body] == [verdict] * 2 and body[0][2] == body[1][2]


def test_a_mean_or_any_without_some_columns_is_over_the_others_and_says_so(tmp_path):
    """30 of 40 against 10 of 40 on the one column that was run; `any` means the columns of one metric."""
    answers = easy(A={"right": 30, "loss": 3.0}, B={"right": 10, "loss": 2.0})
    (row,) = verdicts(tmp_path / "a", answers, {"column": MEAN}, one=table({**ACC, **HARD}, mean=True))
    assert row[1] == HOLDS and row[2].startswith("+50.0 points [") and row[2].endswith("(1 of 2 columns)")
    of_acc, swapped, of_ppl = verdicts(
        tmp_path / "b", answers, {"column": ANY, "metric": "acc"}, {"column": ANY, "rows": ["B", "A"]},
        {"column": ANY, "rows": ["B", "A"], "metric": "word_perplexity"}, one=table({**ACC, **HARD, **PPL}),
    )  # fmt: skip
    assert of_acc[1] == HOLDS and of_acc[2].endswith("(Easy; 1 of 2 columns)")
    assert swapped[1] == OPEN and swapped[2].endswith("(Easy; 1 of 2 columns)")
    assert of_ppl[1] == OPEN and of_ppl[2].endswith("(PPL)")


def test_a_ratio_of_accuracies_counts_from_guessing(tmp_path):
    """Of two choices: 24 and 30 of 40 are .6 and .75, above guessing .1 and .25."""
    answers = easy(A={"right": 24, "choices": 2}, B={"right": 30, "choices": 2})
    ratio, gap = verdicts(tmp_path, answers, {"times": 0.9}, {})
    assert ratio[2].startswith("0.40 times [") and gap[2].startswith("-15.0 points [")


def test_what_no_test_takes_is_not_called_unmeasured(tmp_path):
    """Nobody knows what guessing has of mc2, a share of the probability; mcc is of no document, nats have no ratio."""
    answers = {}
    for row, level in (("A", 0.42), ("B", 0.45)):
        own = 0.02 * np.random.default_rng(ord(row)).standard_normal(40)
        shares = np.clip(level + 0.15 * np.random.default_rng(1).standard_normal(40) + own, 0, 1)
        found = [Metric("easy", name, v, 0.05, 40, True) for name, v in (("acc", float(shares.mean())), ("mcc", 0.4))]
        answers[row] = {"values": [{"acc": float(v)} for v in shares], "metrics": found, "choices": 4}
    one = table({**ACC, "MCC": {"task": "easy", "metric": "mcc"}})
    ratio, gap, mcc = verdicts(tmp_path / "a", easy(**answers), {"times": 0.9}, {}, {"column": "MCC"}, one=one)
    assert gap[1] == FAILS and ratio[1] == mcc[1] == OPEN and "not tested" in ratio[2] and "not tested" in mcc[2]
    losses = easy(A={"loss": 2.0}, B={"loss": 3.0})
    (nats,) = verdicts(tmp_path / "b", losses, {"column": "PPL", "times": 1.1}, one=table(PPL))
    assert nats[1] == OPEN and "not tested" in nats[2]


def test_a_claim_on_a_row_of_another_model_is_left_out(tmp_path):
    rows = {"A": "griffin", "B": "wanda-sp", "C": {"method": "dart", "only": "llama"}}
    claims = [GOOD, {**GOOD, "rows": ["C", "B"]}, COUNTED]
    spec = load(file(tmp_path, table(rows=rows), claims=claims), config_from(None, BASE))
    assert [one.rows for one in spec.claims] == [("A", "B"), ()]
