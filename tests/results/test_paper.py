"""The paper's tables: what the file asks for is run, laid out, tested, and written in three formats."""

import csv
import dataclasses
import io
import json
import shutil
import subprocess
import sys

import pytest
import yaml

from dart_eval.results import stats
from dart_eval.results.claims import HOLDS, OPEN, Claim, Sides, judged
from dart_eval.results.estimates import mean
from dart_eval.results.paper_layout import PaperColumn, PaperRow, Reported, TableLayout
from dart_eval.results.paper_picture import picture
from dart_eval.results.paper_tables import Paper, to_csv
from dart_eval.results.record import Metric
from dart_eval.results.report import charts
from dart_eval.results.store import Store
from dart_eval.results.writers import Table, latex, markdown
from dart_eval.sweep.options import config_from
from dart_eval.sweep.paper import SHIPPED, load
from dart_eval.util.errors import UserError
from tests.helpers.commands import command
from tests.helpers.records import record, table_body

N = 40
DENSE, A, B = PaperRow("Dense", "dense", {}, False), PaperRow("A", "a", {}, True), PaperRow("B", "b", {"x": 1}, True)
ACC = PaperColumn("Easy", ("easy",), "acc")


def _cell(
    store, method, right, task="easy", params=None, sparsity=0.5, loss=None, gpu=None, choices=0, effective=0.4321
):
    """A record with one 0/1 value per document: `right` of them 1; and a perplexity where `loss` is given."""
    values = [1.0] * right + [0.0] * (N - right)
    metrics = [Metric(task, "acc", right / N, 0.05, N, True)]
    if loss is not None:
        metrics.append(Metric(task, "word_perplexity", stats.exp(loss), 0.5, N, False))
    samples = [
        {
            "task": task, "doc_id": i, "filter": "none", "doc_hash": f"{i:08}", "prompt_hash": "p", "cluster": None,
            "target_hash": "t", "responses": [[-float(c), False] for c in range(choices)] or ["a text"],
            # losses vary over documents in a way of each method's own, and average to `loss`
            "metrics": {"acc": v, "word_perplexity": [-10 * (loss or 0) - (-1) ** (i // (1 + (method == "b"))), 10]},
        }
        for i, v in enumerate(values)
    ]  # fmt: skip
    made = record(method=method, sparsity=sparsity, params=params, metrics=metrics, key=f"{task}-{method}-{sparsity}")
    inputs = {**made.inputs, "task": task, "limit": None, "device": "cpu", "code": "c0de" * 4}
    environment = {"gpu": gpu} if gpu else {}
    made = dataclasses.replace(
        made, inputs=inputs, samples=samples, environment=environment, effective_sparsity=effective
    )
    return store.save(f"{task}-{method}", made, [{"task": task, "doc_id": i, "target": "a text"} for i in range(N)])


def _paper(tmp_path, *cells, **options):
    store = Store(tmp_path)
    records = [_cell(store, *c[:2], **c[2]) for c in cells]
    return Paper(store, {None: records}, options.get("missing", {}), "dart-eval paper x")


def _layout(columns=(ACC,), rows=(DENSE, A, B), **more):
    return TableLayout("t", "Title", rows, (0.5,), columns, **more)


def test_rows_come_in_blocks_with_their_numbers(tmp_path):
    paper = _paper(
        tmp_path, ("dense", 30, {"sparsity": 0.0}), ("a", 20, {}), ("b", 18, {"params": {"x": 1}}),
    )  # fmt: skip
    table, numbers = paper.table(_layout())
    assert table.columns == ["method", "sparsity", "Easy (n=40)", "effective", "read"]
    assert table.body == [
        ["Dense", "0 %", "75.0 ±5.0", "0.432", "0.500"],
        ["A", "50 %", "50.0 ±5.0", "0.432", "0.500"],
        ["B", "50 %", "45.0 ±5.0", "0.432", "0.500"],
    ]
    assert table.rules == {1}
    assert list(zip(numbers.value, numbers.stderr, numbers.n, strict=True)) == [
        (0.75, 0.05, 40),
        (0.5, 0.05, 40),
        (0.45, 0.05, 40),
    ]


def test_the_best_is_bold_only_where_the_test_says_so(tmp_path):
    clear = _paper(tmp_path / "clear", ("dense", 40, {"sparsity": 0.0}), ("a", 30, {}), ("b", 10, {"params": {"x": 1}}))
    table, numbers = clear.table(_layout())
    assert table.bold == {(1, 2)}  # A, not Dense, which is better still
    assert list(numbers.p.notna()) == [False, True, False]
    assert numbers.p[1] == pytest.approx(2 * 0.5**20)  # McNemar, 20 documents to none
    close = _paper(tmp_path / "close", ("a", 30, {}), ("b", 28, {"params": {"x": 1}}))
    table, numbers = close.table(_layout())
    assert table.bold == frozenset()
    assert numbers.p[0] == pytest.approx(0.5)  # two documents, one way: 2 / 2^2
    alone = _paper(tmp_path / "alone", ("a", 30, {}))
    table, numbers = alone.table(_layout(rows=(A,)))
    assert table.bold == frozenset() and numbers.p.isna().all()


def test_a_row_that_runs_dense_for_long_is_not_the_best_of_its_sparsity(tmp_path):
    often = {"params": {"x": 1}, "effective": 0.38}
    paper = _paper(tmp_path / "two", ("dense", 40, {"sparsity": 0.0}), ("a", 10, {}), ("b", 30, often))
    table, numbers = paper.table(_layout())
    assert table.bold == frozenset() and numbers.p.isna().all()
    assert "effective sparsity is more than 0.05 below the highest take no part" in table.note
    c = PaperRow("C", "c", {}, True)
    three = _paper(tmp_path / "three", ("a", 10, {}), ("b", 39, often), ("c", 30, {}))
    table, _ = three.table(_layout(rows=(A, B, c)))
    assert table.bold == {(2, 2)}  # C, held against A alone
    near = _paper(tmp_path / "near", ("a", 10, {}), ("b", 30, {"params": {"x": 1}, "effective": 0.39}))
    table, _ = near.table(_layout(rows=(A, B)))
    assert table.bold == {(1, 2)} and "no part" not in table.note


def test_among_three_the_best_must_beat_both(tmp_path):
    c = PaperRow("C", "c", {}, True)
    paper = _paper(tmp_path, ("a", 30, {}), ("b", 10, {"params": {"x": 1}}), ("c", 29, {}))
    table, numbers = paper.table(_layout(rows=(A, B, c)))
    assert table.bold == frozenset()  # A beats B, but not C
    assert numbers.p[0] == pytest.approx(1.0)


def test_lower_perplexity_is_the_better_one(tmp_path):
    paper = _paper(tmp_path, ("a", 30, {"loss": 3.0}), ("b", 30, {"loss": 2.5, "params": {"x": 1}}))
    table, numbers = paper.table(_layout((PaperColumn("PPL", ("easy",), "word_perplexity"),), (A, B)))
    assert table.bold == {(1, 2)}
    assert table.body[0][2] == "20.1 ±0.5"
    assert list(numbers.bold) == [False, True]


def test_the_mean_weighs_columns_alike_and_is_tested(tmp_path):
    columns = (ACC, PaperColumn("Hard", ("hard", "harder"), "acc"))
    cells = [
        (method, right, {"task": task, **more})
        for method, more, rights in (("a", {}, (20, 10, 30)), ("b", {"params": {"x": 1}}, (4, 10, 30)))
        for task, right in zip(("easy", "hard", "harder"), rights, strict=True)
    ]
    paper = _paper(tmp_path, *cells)
    table, numbers = paper.table(_layout(columns, (A, B), mean=True))
    by_place = {(v.row, v.column): v for v in numbers.itertuples()}
    assert by_place["A", "Hard"].value == pytest.approx(0.5)
    assert by_place["A", "Hard"].stderr == pytest.approx(0.05 / 2**0.5)
    assert by_place["A", "mean"].value == pytest.approx(0.5)  # (.5 + (.25 + .75) / 2) / 2, not a mean of three
    assert by_place["B", "mean"].value == pytest.approx((0.1 + 0.5) / 2)
    assert by_place["A", "mean"].bold and by_place["A", "Easy"].bold and not by_place["A", "Hard"].bold
    assert table.columns[-3:] == ["mean", "effective", "read"]


@pytest.mark.parametrize(("documents", "bold"), [(5, False), (6, True)])
def test_a_mean_is_tested_as_a_claim_is(tmp_path, monkeypatch, documents, bold):
    """Tasks of fewer than six documents test nothing, however many there are."""
    monkeypatch.setattr(sys.modules[__name__], "N", documents)
    tasks = ("easy", "hard", "harder")
    columns = tuple(PaperColumn(task.title(), (task,), "acc") for task in tasks)
    cells = [("a", documents, {"task": t}) for t in tasks] + [("b", 1, {"task": t, "params": {"x": 1}}) for t in tasks]
    paper = _paper(tmp_path, *cells)
    layout = _layout(columns, (A, B), mean=True)
    _, numbers = paper.table(layout)
    best = next(v for v in numbers.itertuples() if (v.row, v.column) == ("A", "mean"))
    assert bool(best.bold) is bold
    found = judged(Claim("c", "", "t", "mean", 0.5, ("A", "B")), _sides_of_mean(paper, layout, tasks))
    assert found.verdict == (HOLDS if bold else OPEN)


def _sides_of_mean(paper, layout, tasks):
    sides = [Sides(*paper.sides(layout, ("A", "B"), 0.5, task.title())) for task in tasks]
    a, b = mean(one.a for one in sides), mean(one.b for one in sides)
    return [Sides("mean", a, b, sum(one.n for one in sides), "acc")]


def test_a_cell_that_is_not_there_is_a_dash_and_a_column_without_cells_is_explained(tmp_path):
    missing = {task: f"the data of task {task} is not in D" for task in ("hard", "harder")}
    paper = _paper(tmp_path, ("a", 20, {}), missing={**missing, "another": "not asked for"})
    hard = PaperColumn("Hard", ("hard", "harder"), "acc")
    table, numbers = paper.table(_layout((ACC, hard), (A, B), mean=True))
    assert table.columns == ["method", "sparsity", "Easy (n=40)", "effective", "read"]
    assert [row[2] for row in table.body] == ["50.0 ±5.0", "-"]
    assert len(numbers) == 1
    said = "hard, harder: not measured (the data is not in D)."
    assert f"Columns without a number are left out: Hard, mean. {said}" in table.note
    assert "another" not in table.note
    without = dataclasses.replace(_layout((hard,), (A, B)), name="empty")
    assert paper.measured(_layout((ACC, hard), (A, B))) and not paper.measured(without)
    assert paper.unmeasured([_layout((ACC,), (A, B)), without]) == f"Tables without a number: empty. {said}"
    assert paper.unmeasured([_layout((ACC,), (A, B))]) == ""


def test_reported_numbers_stand_apart_with_their_source(tmp_path):
    known = (
        Reported("theirs", 0.5, {"Easy": 0.666}, "page 3"), Reported("theirs too", 0.5, {"Easy": 0.5}, "page 3"),
        Reported("elsewhere", 0.7, {"Easy": 0.1}, "page 4"),
    )  # fmt: skip
    paper = _paper(tmp_path, ("a", 20, {}))
    table, numbers = paper.table(_layout(rows=(A,), reported=known))
    assert table.body[1:] == [["theirs [1]", "50 %", "66.6", "", ""], ["theirs too [1]", "50 %", "50.0", "", ""]]
    assert len(numbers) == 1  # they are not ours
    assert "[1] reported, not ours: page 3." in table.note


def test_every_table_says_what_made_it(tmp_path):
    table, _ = _paper(tmp_path, ("a", 20, {})).table(_layout(rows=(A,)))
    assert "Made of 1 cells: model tiny@f00d, float32 on cpu, scope scored, seed 0" in table.note
    assert table.note.endswith("dart-eval paper x")
    table, _ = _paper(tmp_path, ("a", 20, {"gpu": "Card A"}), ("b", 20, {"params": {"x": 1}})).table(_layout())
    assert "float32 on Card A and cpu, scope" in table.note


def test_costs_are_columns_too(tmp_path):
    columns = (
        PaperColumn("state", ("easy",), field="state_mib"),
        PaperColumn("FLOPs", ("easy",), field="flops_per_token"),
    )
    table, _ = _paper(tmp_path, ("a", 20, {}), ("b", 20, {"params": {"x": 1}})).table(_layout(columns, (A, B)))
    assert table.columns[2:4] == ["state", "FLOPs"]
    assert table.body[0][2:4] == ["0.000", "0.750"]
    assert table.bold == frozenset()
    assert "±" not in table.note


def test_csv_holds_every_number_in_full(tmp_path):
    _, numbers = _paper(tmp_path, ("a", 30, {}), ("b", 10, {"params": {"x": 1}})).table(_layout(rows=(A, B)))
    rows = list(csv.DictReader(io.StringIO(to_csv(numbers))))
    assert [(r["row"], float(r["value"]), r["bold"]) for r in rows] == [("A", 0.75, "True"), ("B", 0.25, "False")]
    assert json.loads(rows[1]["params"]) == {"x": 1}
    assert float(rows[0]["p"]) == numbers.p[0]


HOSTILE = Table(
    "50 % of A_1 & $B$ #3", ["method", "a|b", "{c}"],
    [["x_y^z~", "1 ± 2", r"\input{x}"], ["<b>", '"q"', "p | q"], ["- [1]", "", ""]],
    "100 % sure_ & done < 3", frozenset({(0, 1)}), frozenset({1}),
)  # fmt: skip


def test_markdown_marks_bold_and_keeps_its_columns():
    body = table_body(markdown(HOSTILE).replace(r"\|", "/"))
    assert body[1] == ["x_y^z~", "**1 ± 2**", r"\input{x}"]
    assert [len(row) for row in body] == [3, 3, 3, 3]


def test_latex_escapes_and_rules():
    text = latex(HOSTILE)
    assert r"\textbf{1 $\pm$ 2}" in text
    assert r"\textbackslash{}input\{x\}" in text
    lines = text.splitlines()
    assert lines.count(r"\midrule") == 2
    assert (
        lines.index(r"\midrule", lines.index(r"\midrule") + 1)
        == next(i for i, x in enumerate(lines) if "less" in x) - 1
    )


@pytest.mark.process
def test_latex_compiles(tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("no LaTeX at hand (pdflatex)")
    paper = _paper(tmp_path / "out", ("a", 30, {}), ("b", 10, {"params": {"x": 1}}))
    known = (Reported("theirs", 0.5, {"Easy": 0.666}, "page_3, 50 %"),)
    wide = tuple(dataclasses.replace(ACC, head=f"Easy_{i}") for i in range(14))
    tables = [
        HOSTILE,
        *(paper.table(_layout(c, (A, B), reported=known if c == (ACC,) else ()))[0] for c in ((ACC,), wide)),
    ]
    document = "\n".join([
        r"\documentclass{article}", r"\usepackage[T1]{fontenc}", r"\usepackage{booktabs,graphicx}", r"\begin{document}",
        *map(latex, tables), r"\end{document}",
    ])  # fmt: skip
    (tmp_path / "t.tex").write_text(document, encoding="utf-8")
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull \\hbox" not in done.stdout  # a wide table is scaled to the line


# -- the file ------------------------------------------------------------------------------------------------------

SMALL = {
    "about": "A small paper.", "sparsity": [0.5],
    "methods": {"Dense": "dense", "Ours": "dart:remask.window=3", "G": "griffin"},
    "tables": [
        {"name": "one", "title": "One", "columns": {
            "Q": {"task": "smoke_questions", "metric": "acc", "limit": 3},
            "R": {"task": "smoke_summary", "metric": "rougeL", "limit": 2, "limit_share": 0.5},
        }},
        {"name": "two", "title": "Two", "methods": {"Ours": "dart:remask.window=3"}, "columns": {
            "Q": {"task": "smoke_questions", "metric": "acc", "limit": 3},
            "state": {"task": "smoke_questions", "field": "state_mib", "limit": 3},
        }},
    ],
}  # fmt: skip
BASE = {"method": "dense", "sparsity": "0"}


def _file(tmp_path, **changes):
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return str(path)


def test_the_file_gives_sweeps_and_layouts(tmp_path):
    spec = load(_file(tmp_path), config_from(None, {**BASE, "seed": 3}))
    assert [(c.tasks, c.limit, c.method) for c in spec.configs] == [
        (("smoke_questions",), 3, ("dense", "dart:remask.window=3", "griffin")),
        (("smoke_summary",), 2, ("dense", "dart:remask.window=3", "griffin")),
        (("smoke_questions",), 3, ("dart:remask.window=3",)),
    ]
    assert {c.sparsity for c in spec.configs} == {(0.5,)} and {c.seed for c in spec.configs} == {3}
    one, two = spec.layouts
    assert [(r.label, r.method, r.prunes) for r in one.rows] == [
        ("Dense", "dense", False), ("Ours", "dart", True), ("G", "griffin", True),
    ]  # fmt: skip
    assert one.rows[1].params["remask.window"] == 3
    assert two.columns[1].field == "state_mib"


@pytest.mark.parametrize(("metric", "measured"), [("acc", False), ("flips", False), ("kl", True), ("top1,none", True)])
def test_dense_runs_beside_a_method_only_for_tables_that_show_how_far_it_is(tmp_path, metric, measured):
    column = {"Q": {"task": "smoke_questions", "metric": metric, "limit": 3}}
    spec = load(_file(tmp_path, tables=[*SMALL["tables"], {"name": "t", "title": "T", "columns": column}]),
                config_from(None, BASE))  # fmt: skip
    assert {c.kl for c in spec.configs} == {measured}


def test_limit_overrides_the_file(tmp_path):
    spec = load(_file(tmp_path), config_from(None, {**BASE, "limit": 5}))
    assert [c.asked["limit"] for c in spec.layouts[0].columns] == [5, 2]  # half of it for the second, rounded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tabels": []}, r"unknown key 'tabels'; did you mean tables\?"),
        ({"tables": []}, "has no tables"),
        ({"tables": [{**SMALL["tables"][0], "colums": {}}]}, "table 'one': unknown key 'colums'"),
        ({"tables": [{"name": "x", "title": "X"}]}, "needs columns"),
        ({"tables": [SMALL["tables"][0]] * 2}, "two tables have the same name"),
        ({"methods": {"A": "drat"}}, "unknown method 'drat'"),
        ({"methods": ["dart"]}, "map labels to methods"),
        ({"tables": [{"name": "x", "title": "X", "columns": {"Q": {"task": "t"}}}]}, "either a metric or a field"),
        ({"tables": [{"name": "x", "title": "X", "columns": {"Q": {"task": "t", "field": "sate"}}}]}, "unknown field"),
        (
            {"tables": [{"name": "x", "title": "X", "mean": True, "columns": {
                "Q": {"task": "t", "metric": "acc"}, "R": {"task": "t", "metric": "bleu"}}}]},
            "a mean needs columns with the same metric",
        ),
        (
            {"tables": [{"name": "x", "title": "X", "mean": True, "columns": {
                "Q": {"task": "t", "metric": "word_perplexity"}, "R": {"task": "u", "metric": "word_perplexity"}}}]},
            "a mean needs columns with the same metric, no cost or perplexity",
        ),
        (
            {"tables": [{"name": "x", "title": "X", "mean": True, "columns": {
                "Q": {"task": "t", "field": "state_mib"}}}]},
            "no cost or perplexity",
        ),
        ({"tables": [{"name": "x", "title": "X", "columns": {"read": {"task": "t", "metric": "acc"}}}]},
         "a column cannot be named 'read'"),
        ({"tables": [{"name": "x", "title": "X", "columns": {"Q": {"task": "smoke_*", "metric": "acc"}}}]},
         r"column 'Q': smoke_\* is a pattern; name the tasks"),
        ({"methods": {"A": {"method": "dart", "only": "llama"}}}, "no row of the table is for this model"),
        (
            {"tables": [{**SMALL["tables"][0], "reported": [
                {"label": "l", "sparsity": 0.5, "values": {"Z": 1}, "source": "s"}]}]},
            "unknown reported column 'Z'",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load(_file(tmp_path, **change), config_from(None, BASE))


def test_a_file_that_is_not_there_names_the_shipped_ones():
    with pytest.raises(UserError, match="dart, smoke"):
        load("fifteen", config_from(None, BASE))


@pytest.mark.parametrize("name", [p.stem.removeprefix("paper-") for p in SHIPPED.glob("paper-*.yaml")])
def test_shipped_files_are_understood(name):
    spec = load(name, config_from(None, BASE))
    assert {layout.name for layout in spec.layouts} >= {"accuracy", "summaries", "ablations", "overhead"}
    if name == "dart":
        heads = [c.head for c in spec.layouts[0].columns]
        assert " ".join(heads) == "BoolQ RTE HellaSwag WinoGrande ARC-E ARC-C OpenBookQA MMLU GPQA MedMCQA"
        assert [c.asked["num_fewshot"] for c in spec.layouts[0].columns] == [0] * 7 + [5] * 3


@pytest.mark.slow
def test_the_command_runs_writes_and_goes_on(tmp_path, saved_llama, monkeypatch):
    tables = [*SMALL["tables"], {
        "name": "three", "title": "Three", "columns": {"Q": {"task": "arc_easy", "metric": "acc", "limit": 2}},
    }]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    words = ["paper", _file(tmp_path, tables=tables), "--model", saved_llama, "--data-dir", "data", "--output", "out"]
    done = command(*words)
    assert done.code == 0, done.err
    assert done.err.count("done smoke_questions dart:remask.window=3 50 %") == 1  # in two tables, run once
    assert sorted(p.name for p in (tmp_path / "out" / "tables").iterdir()) == [
        "all.md", *(f"{n}.{e}" for n in ("one", "two") for e in ("csv", "md", "tex")),
    ]  # fmt: skip
    without = "Tables without a number: three. arc_easy: not measured (task arc_easy has no data in data"
    assert without in " ".join(done.out.split())
    text = (tmp_path / "out" / "tables" / "all.md").read_text()
    assert text.startswith("A small paper.")
    assert without in text.splitlines()[-1]
    assert "Q (n=3)" in text
    again = command(*words).err
    assert "6 of 6 cells are finished already" in again
    assert "done " not in again
    assert (tmp_path / "out" / "tables" / "all.md").read_text() == text


# -- settings ------------------------------------------------------------------------------------------------------

SET = {
    "sparsity": [0.5, 0.7], "max_new_tokens": 30, "chat_template": False,
    "methods": {
        "Dense": "dense", "8 bits": {"method": "dense", "ffn_bits": "8:128", "sparsity": 0.5}, "G": "griffin",
        "G, all": {"method": "griffin", "scope": "all"}, "of another": {"method": "dart", "only": "Llama-3.1-8B"},
    },
    "tables": [{
        "name": "one", "title": "One", "scope": "last", "columns": {
            "Q": {"task": "smoke_questions", "metric": "acc", "num_fewshot": 1},
            "4 bits": {"task": "smoke_questions", "metric": "acc", "ffn_bits": 4, "scope": "scored"},
        },
    }],
}  # fmt: skip


def test_the_nearest_setting_counts(tmp_path):
    """A column's before its table's before the file's; a row's scope and bits before all of them."""
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump(SET, sort_keys=False))
    spec = load(str(path), config_from(None, BASE))
    cells = {
        (task, method, sparsity, bits, c.scope, c.num_fewshot)
        for c in spec.configs for task in c.tasks for method in c.method for bits in c.ffn_bits
        for sparsity in (c.sparsity if method != "dense" else (c.sparsity if "8:128" in c.ffn_bits else ("-",)))
    }  # fmt: skip
    q = "smoke_questions"
    assert cells == {
        (q, "dense", "-", "16", "last", 1), (q, "dense", "-", "4", "scored", None),
        (q, "dense", 0.5, "8:128", "last", 1), (q, "dense", 0.5, "8:128", "scored", None),
        *((q, "griffin", s, "16", scope, 1) for s in (0.5, 0.7) for scope in ("last", "all")),
        *((q, "griffin", s, "4", scope, None) for s in (0.5, 0.7) for scope in ("scored", "all")),
    }  # fmt: skip
    assert {c.gen_kwargs for c in spec.configs} == {"max_gen_toks=30"}
    (layout,) = spec.layouts
    assert [(s, row.label) for _, s, row in layout.lines] == [
        (0.0, "Dense"), (0.5, "8 bits"), (0.5, "G"), (0.5, "G, all"), (0.7, "G"), (0.7, "G, all"),
    ]  # fmt: skip
    with_it = load(str(path), config_from(None, {**BASE, "model": "meta-llama/Llama-3.1-8B"}))
    assert "of another" in [row.label for row in with_it.layouts[0].rows]
    rows = {"All": "griffin", "L": {"method": "dart", "only": "Llama-3.1-8B"}}
    rows["D"] = {"method": "dart-code", "only": "gemma-3-270m"}
    for model, label in (("/models/Llama-3.1-8B", "L"), (None, "D")):  # of the file; the default
        found = load(_file(tmp_path, methods=rows, **({"model": model} if model else {})), config_from(None, BASE))
        assert [row.label for row in found.layouts[0].rows] == ["All", label]


def test_a_column_may_be_a_short_name_for_tasks(tmp_path):
    column = {"A": {"task": "arc", "metric": "acc"}}
    spec = load(_file(tmp_path, tables=[{"name": "x", "title": "X", "columns": column}]), config_from(None, BASE))
    assert spec.layouts[0].columns[0].tasks == spec.configs[0].tasks == ("arc_easy", "arc_challenge")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"method": "griffin", "num_fewshot": 3}, "row 'X': unknown key 'num_fewshot'"),
        ({"scope": "all"}, "row 'X' needs a method"),
        ({"method": "griffin", "scope": "al"}, "scope 'al' must be"),
        ({"method": "griffin", "ffn_bits": "x"}, "ffn-bits 'x' is not understood"),
    ],
)
def test_a_row_with_wrong_settings_is_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load(_file(tmp_path, methods={"X": row}), config_from(None, BASE))


def test_a_wrong_length_or_two_widths_are_refused(tmp_path):
    for settings, message in (
        ({"max_new_tokens": "many"}, "wrong kind"), ({"ffn_bits": "4,8"}, "one ffn_bits"), ({"scope": 3}, "scope"),
        ({"gen_kwargs": "x"}, "KEY=VALUE"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load(_file(tmp_path, **settings), config_from(None, BASE))


def test_rows_of_two_scopes_are_never_bold_against_each_other(tmp_path):
    all_of_b = dataclasses.replace(B, asked={"scope": "all"})
    paper = _paper(tmp_path, ("a", 30, {}), ("b", 10, {"params": {"x": 1}}))
    assert paper.table(_layout(rows=(A, B)))[0].bold == {(0, 2)}
    table, _ = paper.table(_layout(rows=(A, all_of_b)))
    assert table.bold == frozenset() and table.body[1][2] == "-"  # and there is no cell of that scope


def test_a_rows_scope_goes_before_its_columns_and_has_a_best_of_its_own(tmp_path):
    """A is far better than B, whose cell is of another scope: nobody is best among rows of two protocols."""
    store = Store(tmp_path)
    ours, theirs = _cell(store, "a", 30), _cell(store, "b", 10, params={"x": 1})
    theirs = dataclasses.replace(theirs, key="easy-b-all", inputs={**theirs.inputs, "scope": "all"}, samples=[
        {**s, "responses": ["a text"]} for s in store.samples(theirs)
    ])  # fmt: skip
    theirs = store.save("easy-b-all", theirs, [{"task": "easy", "doc_id": i, "target": "a text"} for i in range(N)])
    column = dataclasses.replace(ACC, asked={"scope": "scored"})
    rows = (A, dataclasses.replace(B, asked={"scope": "all"}))
    table, _ = Paper(store, {None: [ours, theirs]}, {}, "x").table(_layout((column,), rows))
    assert [row[2] for row in table.body] == ["75.0 ±5.0", "25.0 ±5.0"] and table.bold == frozenset()


def test_a_model_of_two_spellings_counts_once(tmp_path):
    store = Store(tmp_path)
    cell = _cell(store, "a", 20)
    columns = (ACC, dataclasses.replace(ACC, head="Again", model="./tiny"))
    table, _ = Paper(store, {None: [cell], "./tiny": [cell]}, {}, "x").table(_layout(columns, (A,)))
    assert table.body[0][2:4] == ["50.0 ±5.0", "50.0 ±5.0"] and table.columns[2] == "Easy (n=40)"


def test_a_metric_that_no_cell_has_is_named(tmp_path):
    columns = (ACC, PaperColumn("Hard", ("easy",), "acc_nrom"), PaperColumn("None", ("hard",), "acc"))
    table, _ = _paper(tmp_path, ("a", 20, {})).table(_layout(columns, (A,)))
    assert "Hard: its cells have no metric acc_nrom." in table.note and "None: " not in table.note


def test_guessing_has_a_line_below_the_unpruned_rows(tmp_path):
    cells = [("dense", 30, {"sparsity": 0.0}), ("a", 35, {}), ("b", 10, {"params": {"x": 1}})]
    paper = _paper(tmp_path, *cells)
    paper._metrics["chance"] = 0.25  # as of questions with four answers
    table, _ = paper.table(_layout())
    assert [row[0] for row in table.body] == ["Dense", "guessing", "A", "B"]
    assert table.body[1][1:3] == ["", "25.0"] and table.rules == {2} and table.bold == {(2, 2)}


def test_columns_of_two_models_stand_side_by_side(tmp_path):
    store = Store(tmp_path)
    ours = _cell(store, "a", 20)
    other = {**ours.inputs, "model": {**ours.inputs["model"], "name": "other", "weights": "0ther"}}
    theirs = dataclasses.replace(ours, key="other-a", inputs=other, samples=[], metrics=[
        dataclasses.replace(m, value=0.9) for m in ours.metrics
    ])  # fmt: skip
    theirs = store.save("other-a", theirs, [])
    paper = Paper(store, {None: [ours], "org/other": [theirs]}, {}, "x")
    columns = (ACC, dataclasses.replace(ACC, head="Other", model="org/other"))
    table, _ = paper.table(_layout(columns, (A,)))
    assert table.body == [["A", "50 %", "50.0 ±5.0", "90.0 ±5.0", "0.432", "0.500"]]
    assert "model tiny@f00d and other@0ther" in table.note


def test_the_picture_has_a_line_for_each_pruned_row(tmp_path):
    cells = [("dense", 30, {"sparsity": 0.0}), *(
        (name, right, {"sparsity": s, **more}) for s in (0.5, 0.7) for name, right, more in
        (("a", 25, {}), ("b", 20, {"params": {"x": 1}}))
    )]  # fmt: skip
    layout = dataclasses.replace(_layout(picture=True), sparsity=(0.5, 0.7))
    _, numbers = _paper(tmp_path, *cells).table(layout)
    assert (numbers["chance"] == 0).all() and "<!-- guessing -->" not in picture(layout, numbers).decode()
    numbers = numbers.assign(chance=0.25)  # as of questions with four answers
    drawn = picture(layout, numbers)
    text = drawn.decode()
    assert text.count("<!-- A -->") == 1 and text.count("<!-- B -->") == 1 and "<!-- Title: Easy" in text
    assert text.count("<!-- dense -->") == text.count("<!-- guessing -->") == 1
    assert "<!-- guessing -->" not in picture(layout, numbers.assign(chance=float("nan"))).decode()
    assert picture(layout, numbers.assign(value=float("nan"))) is None
    assert picture(layout, numbers[~numbers["prunes"]]) is None and picture(layout, numbers[:0]) is None


def test_a_picture_calls_the_unrounded_model_dense_wherever_its_row_stands(tmp_path, monkeypatch):
    store, seen = Store(tmp_path), []
    dense = _cell(store, "dense", 36, sparsity=0.0)
    rounded = dataclasses.replace(dense, key="8", inputs={**dense.inputs, "ffn_bits": "8"}, metrics=[
        dataclasses.replace(m, value=0.5) for m in dense.metrics
    ])  # fmt: skip
    rounded = store.save("8", dataclasses.replace(rounded, samples=store.samples(dense)))
    rows = (PaperRow("8 bits", "dense", {}, False, {"ffn_bits": "8"}), DENSE, A)
    layout = dataclasses.replace(_layout(rows=rows, picture=True), sparsity=(0.7, 0.5))
    cells = [rounded, dense, *(_cell(store, "a", 15, sparsity=s) for s in (0.5, 0.7))]
    _, numbers = Paper(store, {None: cells}, {}, "x").table(layout)
    real = charts.against_read
    monkeypatch.setattr(charts, "against_read", lambda *given: seen.append(given) or real(*given))
    picture(layout, numbers)
    ((_, _, lines, _, drawn, _),) = seen
    assert [p.value for p in drawn] == [90.0]
    assert [p.read for p in lines["A"]] == pytest.approx([0.5, 0.3])  # from the highest read, as a chart takes them


def test_a_row_of_unrounded_weights_stands_beside_rounded_ones(tmp_path):
    """The table rounds to 4 bits, one row says 16: its number is not that of the 4 bits."""
    methods = {"Dense": "dense", "16 bits": {"method": "dense", "ffn_bits": 16}}
    column = {"Q": {"task": "easy", "metric": "acc"}}
    spec = load(
        _file(tmp_path, ffn_bits=4, methods=methods, tables=[{"name": "t", "title": "T", "columns": column}]),
        config_from(None, BASE),
    )
    assert [c.ffn_bits for c in spec.configs] == [("4",), ("16",)]
    (layout,) = spec.layouts
    store, cells = Store(tmp_path / "out"), []
    for bits, right in (("4", 8), (None, 36)):
        made = _cell(store, "dense", right, sparsity=0.0, params=layout.rows[0].params)
        inputs = {**made.inputs, **layout.columns[0].asked, "ffn_bits": bits}
        made = dataclasses.replace(made, key=f"easy-{bits}", inputs=inputs, samples=store.samples(made))
        cells.append(store.save(f"easy-{bits}", made))
    table, _ = Paper(store, {None: cells}, {}, "x").table(layout)
    assert [row[2] for row in table.body] == ["20.0 ±5.0", "90.0 ±5.0"]


def test_a_row_with_a_table_of_layers_is_checked_at_the_tables_sparsities(tmp_path):
    methods = {"Dense": "dense", "Table": "dart:allocation=table:llama-3.1-8b-70"}
    spec = load(_file(tmp_path, sparsity=[0.7], methods=methods), config_from(None, BASE))
    assert [row.label for row in spec.layouts[0].rows] == ["Dense", "Table"]
    with pytest.raises(UserError, match=r"sparsity 0\.5 keeps 0\.500"):
        load(_file(tmp_path, sparsity=[0.5, 0.7], methods=methods), config_from(None, BASE))


def test_only_columns_without_a_number_are_not_measured_and_each_has_its_reason(tmp_path):
    """Five examples are too many in another table; a tag has the numbers of its tasks alone; a metric is misspelt."""
    few = {"easy": "task easy needs 5 few-shot examples, and has 0"}
    paper = _paper(tmp_path / "few", ("a", 20, {}), missing=few)
    assert "not measured" not in paper.table(_layout(rows=(A,)))[0].note
    other = PaperColumn("Five", ("easy",), "acc", asked={"num_fewshot": 5})
    assert "easy: not measured (task easy needs 5" in paper.table(_layout((ACC, other), (A,)))[0].note
    store = Store(tmp_path / "tag")
    made = _cell(store, "a", 20)
    made = dataclasses.replace(made, inputs={**made.inputs, "task": "arc"}, samples=store.samples(made))
    paper = Paper(store, {None: [store.save("arc", made)]}, {}, "x")
    said = paper.unmeasured([_layout((PaperColumn("ARC", ("arc",), "acc"),), (A,))])
    assert said == "Tables without a number: t. ARC: arc has no number of its own: name its tasks, easy."
    paper = _paper(tmp_path / "spelt", ("a", 20, {}))
    said = paper.unmeasured([_layout((PaperColumn("E", ("easy",), "acc_nrom"),), (A,))])
    assert said == "Tables without a number: t. E: its cells have no metric acc_nrom."
