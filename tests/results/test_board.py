"""The board: rows in levels of read and blocks of tasks, what they have above guessing, what may be said of them."""

import dataclasses
import shlex
from types import SimpleNamespace

import numpy as np
import pytest

from dart_eval.cli.run import show_results
from dart_eval.results import board_text, frame, speeds, tables, verdict
from dart_eval.results.blocks import GUESSING
from dart_eval.results.board import boards
from dart_eval.results.format import multiple, small_share
from dart_eval.results.labels import exact
from dart_eval.results.ratio import Ratio
from dart_eval.results.record import Metric
from dart_eval.results.report import charts
from dart_eval.results.seeds import mean_record
from dart_eval.results.store import Store
from dart_eval.results.verdict import BEST, LEVEL_WITH_BEST, Stand
from dart_eval.sweep.run import RunResult
from tests.helpers.commands import command
from tests.helpers.records import answered, choosing, perplexities, right, samples, save

GENERATOR = np.random.default_rng(5)
EASY = GENERATOR.random(200)  # how easy each question is, the same for all methods


def choices(share, task="arc", method="griffin", sparsity=0.7, read=None, **more):
    """A cell that answers the easiest questions right."""
    values = [{"acc": float(e < share)} for e in EASY]
    made = choosing(answered(task, values, method, 0.0 if method == "dense" else sparsity, **more))
    read = read if read is not None else 1.0 if method == "dense" else 1 - sparsity
    return dataclasses.replace(made, weights_read=read)


def board_of(tmp_path, *records, speeds=()):
    store = Store(save(tmp_path, *records))
    saved = {r.key: r for r in store.load()}
    (made,) = boards(store, [saved[r.key] for r in records], speeds)
    return made


def places(board, block=0):
    rows = [[r for r in level.rows if r.kind != GUESSING] for level in board.blocks[block].levels]
    return [[(row.label, row.mark) for row in level] for level in rows]


def text_of(board, width=100, **more):
    return " ".join(" ".join(board_text.lines(board, width, **more)).split())


def above(row, metric="acc"):
    return row.quality[metric].share.value


def test_rows_stand_by_read_and_by_what_they_have_above_guessing(tmp_path):
    """Four choices: guessing has .25, and what a row has above it is compared with what dense has above it."""
    made = board_of(
        tmp_path, choices(0.8, method="dense"), choices(0.4, method="random"), choices(0.6, method="griffin"),
        choices(0.61, method="dart"), choices(0.75, method="griffin", sparsity=0.5),
    )  # fmt: skip
    assert places(made) == [
        [("dense", "")], [("griffin", "")],
        [("dart", BEST), ("griffin", LEVEL_WITH_BEST), ("random", "")],
    ]  # fmt: skip
    share = {s: (s > EASY).mean() - 0.25 for s in (0.8, 0.75, 0.61, 0.6, 0.4)}
    values = {(r.label, r.sparsity): above(r) for r in made.rows if r.keys}
    assert values == pytest.approx({
        ("dense", 0.0): 1, ("griffin", 0.5): share[0.75] / share[0.8], ("dart", 0.7): share[0.61] / share[0.8],
        ("griffin", 0.7): share[0.6] / share[0.8], ("random", 0.7): share[0.4] / share[0.8],
    })  # fmt: skip
    guess = made.blocks[0].levels[0].rows[-1]
    assert (guess.label, guess.quality["acc"].value, above(guess)) == (GUESSING, 0.25, 0.0)
    (*_, last) = made.blocks[0].levels
    assert (
        last.sentences[0].startswith("At 30 % dart is the best pruned row: ")
        and "above guessing [" in last.sentences[0]
    )
    assert "; better than random by accuracy (paired, Holm p <" in last.sentences[0]
    assert last.sentences[0].endswith(", not told apart from griffin.")
    assert made.blocks[0].levels[1].sentences == ()  # nothing to compare a single row with
    table = [line for line in board_text.lines(made, 80) if " ±" in line or line[11:].startswith(GUESSING)]
    assert [line[:5].strip() for line in table] == ["100 %", "", "50 %", "30 %", "30 %", "30 %"]


def test_over_tasks_it_is_one_ratio_of_sums(tmp_path):
    """A mean of the two ratios would be .36; a task on which dense only guesses is in the sums, and is named."""
    records = [choices(0.8, "arc", "dense"), choices(0.25, "rte", "dense"), choices(0.5, "arc"), choices(0.3, "rte")]
    made = board_of(tmp_path, *records)
    up = {s: (s > EASY).mean() - 0.25 for s in (0.8, 0.5, 0.3, 0.25)}
    (row,) = made.blocks[0].levels[1].rows
    assert above(row) == pytest.approx((up[0.5] + up[0.3]) / (up[0.8] + up[0.25]))
    assert made.blocks[0].at_chance == ("rte",)
    assert "! dense is not significantly better than guessing on rte " in text_of(made)


def test_a_share_has_no_value_where_dense_only_guesses(tmp_path):
    made = board_of(tmp_path, choices(0.25, method="dense"), choices(0.3), choices(0.2, method="random"))
    assert all(row.quality["acc"].share is None for row in made.rows if row.keys)
    assert " % above guessing" not in text_of(made)


def test_no_mean_goes_over_an_accuracy_and_a_perplexity(tmp_path):
    """By such a mean an answerer that guesses, with an endless perplexity, had two thirds of dense's quality."""
    worse = {
        m: [
            {
                "word_perplexity": [
                    3 * v["word_perplexity"][0] if m else v["word_perplexity"][0],
                    v["word_perplexity"][1],
                ]
            }
            for v in perplexities(1.0, 40, seed=1)
        ]
        for m in (0, 1)
    }
    made = board_of(
        tmp_path, choices(0.8, method="dense"), choices(0.25), answered("wiki", worse[0], "dense", 0.0, up=False),
        dataclasses.replace(answered("wiki", worse[1], "griffin", 0.7, up=False), weights_read=0.3),
    )  # fmt: skip
    (row,) = made.blocks[0].levels[1].rows
    low, high = row.quality["acc"].share.interval
    assert low < 0 < high and abs(above(row)) < 0.1
    times, (least, most) = row.quality["word_perplexity"].times
    ll, words = (sum(v["word_perplexity"][i] for v in worse[0]) for i in (0, 1))
    assert times == pytest.approx(np.exp(-2 * ll / words)) and least < times < most


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_what_is_no_number_is_worst_and_told_apart_from_nothing(tmp_path, lost):
    values = [v["word_perplexity"] for v in perplexities(1.0, 40, seed=1)]
    records = [answered("wiki", [{"word_perplexity": list(v)} for v in values], m, 0.7 * (m != "dense"), up=False)
               for m in ("dense", "griffin")]  # fmt: skip
    broken = [{"word_perplexity": [-lost, v[1]]} for v in values]
    metric = dataclasses.replace(records[0].metrics[0], value=lost)
    records.append(answered("wiki", broken, "dart", 0.7, up=False, metrics=[metric]))
    made = board_of(tmp_path, *records)
    assert places(made)[1] == [("griffin", ""), ("dart", "")]
    (row,) = [line for line in board_text.lines(made, 100) if "dart" in line and "%" in line[:6]]
    assert row.count("no number") == 2
    good = answered("wiki", [{"word_perplexity": [-40.0 - i % 7, 10.0]} for i in range(40)], "random", 0.7, up=False)
    best = board_of(tmp_path / "more", *records, good).blocks[0].levels[1]
    assert [row.mark for row in best.rows] == [BEST, "", ""] and "not tested against dart" in best.sentences[0]


def test_rows_that_ran_on_other_tasks_stand_in_a_block_of_their_own(tmp_path):
    """Beside all others that ran them, or a row could be called best that is not; no mean is over other tasks."""
    records = [choices(0.8, task, "dense") for task in ("arc", "boolq")]
    records += [choices(s, task, m) for m, s in (("griffin", 0.6), ("dart", 0.3)) for task in ("arc", "boolq")]
    made = board_of(tmp_path, *records, choices(0.79, "arc", "random"))
    assert places(made)[1] == [("griffin", BEST), ("dart", "")]
    assert places(made, 1) == [[("dense", "")], [("random", BEST), ("griffin", ""), ("dart", "")]]
    assert [block.tasks for block in made.blocks] == [{"acc": ("arc", "boolq")}, {"acc": ("arc",)}]
    assert "On these tasks alone: arc x 200" in text_of(made)


def test_a_row_beside_others_shows_no_mean_over_fewer_tasks(tmp_path):
    """griffin stands beside random on arc, and lacks one of the two texts that random ran."""

    def text(task, method):
        values = [{"word_perplexity": v["word_perplexity"]} for v in perplexities(1.0, 40, seed=len(task))]
        return dataclasses.replace(
            answered(task, values, method, 0.7 * (method != "dense"), up=False), weights_read=0.3
        )

    records = [choices(0.8, task, "dense") for task in ("arc", "boolq")] + [text(w, "dense") for w in ("w", "wiki")]
    records += [choices(0.6, task) for task in ("arc", "boolq")] + [text("w", "griffin")]
    records += [choices(0.7, "arc", "random")] + [text(w, "random") for w in ("w", "wiki")]
    block = board_of(tmp_path, *records).blocks[1]
    shown = {row.label: set(row.quality) for row in block.rows if row.keys}
    assert block.tasks == {"acc": ("arc",), "word_perplexity": ("w", "wiki")}
    assert shown["random"] == {"acc", "word_perplexity"} and shown["griffin"] == {"acc"}


def test_the_best_pays_for_having_been_chosen_among_many(tmp_path):
    """Six methods that are equal but for luck: none is best, and no mark says so."""
    drawn = [answered("arc", right(0.5, n=80, seed=s), "griffin", params={"score.seed": s}) for s in range(6)]
    made = board_of(tmp_path, answered("arc", right(0.5, n=80, seed=99), "dense", 0.0), *drawn)
    (level,) = [level for level in made.blocks[0].levels if len(level.rows) > 2]
    assert {row.mark for row in level.rows} == {""}
    assert level.sentences[0].startswith(f"At 50 % no row is told apart from {level.rows[0].label}, which has ")


@pytest.mark.parametrize(("p", "mark"), [(0.02, LEVEL_WITH_BEST), (0.01, "")])
def test_each_p_counts_for_all_pairs_that_could_have_been_chosen(tmp_path, monkeypatch, p, mark):
    """Of three rows p counts 3 / 2 times, and Holm doubles the smaller of two: .02 becomes .06, and .01 .03."""
    real = verdict._differences

    def told(a, b):
        return ((metric, SimpleNamespace(p=p, value=d.value)) for metric, d in real(a, b))

    monkeypatch.setattr(verdict, "_differences", told)
    pruned = [choices(s, method=m) for m, s in (("griffin", 0.6), ("dart", 0.5), ("random", 0.4))]
    made = board_of(tmp_path, choices(0.8, method="dense"), *pruned)
    assert [row.mark for row in made.blocks[0].levels[1].rows] == [BEST if not mark else "", *(["", ""])]


def test_a_bound_on_p_is_that_of_all_metrics_it_names():
    row = SimpleNamespace(read=0.5, name="griffin", quality={"acc": None}, keys=("a",))
    stands = [Stand(SimpleNamespace(name="dart", keys=("b",)), {"accuracy": 1e-80, "log-likelihood": 0.02}, {}, True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "_amounts", lambda row, ends=False: "x")
        assert "by accuracy and log-likelihood (paired, Holm p < 0.05)" in verdict._quality(row, stands, row)
        level = [Stand(stands[0].row, {}, {}, True)]
        assert verdict._quality(row, level, row) == "At 50 % no row is told apart from griffin, which has x."
        assert verdict._quality(row, level, level[0].row).startswith("At 50 % griffin is the first row that no test")


@pytest.mark.slow
def test_however_many_rows_a_clear_lead_is_told(tmp_path):
    """No resample gives less than 1 / 10001, which hundreds of tests would make .05 and more."""
    rows = [choices(0.75, method="dart"), *(choices(0.3, params={"draw": str(i)}) for i in range(30))]
    made = board_of(tmp_path, choices(0.8, method="dense"), *rows)
    assert "dart is the best pruned row: " in text_of(made) and "better than every other pruned row" in text_of(made)


def likely(falls, right_of=20, n=30):
    """Methods whose accuracies are the same but for one answer, and whose log-likelihoods fell by so many nats."""
    noise = np.random.default_rng(3).normal(0, 0.3, (len(falls), n))
    records = []
    for i, (method, fall) in enumerate(falls.items()):
        values = [{"acc": float(j < right_of + i % 2), "gold_ll": -5 - fall + noise[i, j]} for j in range(n)]
        records.append(choosing(answered("arc", values, method, 0.0 if method == "dense" else 0.5)))
    return records


def test_log_likelihoods_tell_apart_what_few_answers_do_not(tmp_path):
    made = board_of(tmp_path, *likely({"dense": 0.0, "griffin": 1.0, "dart": 2.0}))
    assert places(made)[1] == [("griffin", BEST), ("dart", "")]
    assert "better than dart by log-likelihood (paired, Holm p < 0.001)" in text_of(made)


def test_the_row_with_more_right_answers_is_not_best_where_log_likelihoods_say_otherwise(tmp_path):
    """griffin has one answer more, which is noise, and is a nat worse in every answer."""
    made = board_of(tmp_path, *likely({"dense": 0.0, "griffin": 2.0, "dart": 1.0}))
    assert places(made)[1] == [("griffin", ""), ("dart", BEST)]
    assert "At 50 % dart is the best pruned row: " in text_of(made)


def test_no_row_is_best_where_tests_favour_each_of_two(tmp_path):
    dense, griffin = likely({"dense": 0.0, "griffin": 3.0}, 150, 200)
    golds = [s["metrics"]["gold_ll"] + 2 + 0.1 * (j % 3) for j, s in enumerate(griffin.samples)]
    values = [{"acc": float(j < 90), "gold_ll": gold} for j, gold in enumerate(golds)]
    made = board_of(tmp_path, dense, griffin, choosing(answered("arc", values, "dart", 0.5)))
    assert places(made)[1] == [("griffin", ""), ("dart", "")]
    said = "At 50 % no row is best: griffin is first, and dart is better by log-likelihood and worse by accuracy."
    assert said in text_of(made)


@pytest.mark.parametrize(
    ("share", "wins", "said"),
    [(0.78, True, "is better by accuracy."), (0.61, False, "is not told apart from it."),
     (0.3, False, "is worse by accuracy.")],
)  # fmt: skip
def test_rounding_stands_in_its_level_and_is_tested_against_the_best(tmp_path, share, wins, said):
    rounded = choices(share, method="dense", read=0.281, ffn_bits="4")
    first = choices(0.2, method="rounding", read=0.29)
    first.settings["granularity"] = "last bits"
    made = board_of(tmp_path, choices(0.8, method="dense"), choices(0.6), rounded, first)
    last = made.blocks[0].levels[-1]
    kinds = {r.label: r.kind for r in last.rows}
    assert kinds == {"griffin": "pruned", "dense on 4 bits": "rounding", "rounding": "rounding"}
    assert last.rounding_wins == wins and "The best rounding here (dense on 4 bits, 28 %: " in last.sentences[0]
    assert last.sentences[0].endswith(said)
    assert ("Rounding is better than the best pruned row at 30 %." in text_of(made)) == wins


def test_the_best_rounding_that_reads_no_more_counts_and_none_that_reads_more(tmp_path):
    dense, at_half = choices(0.8, method="dense"), choices(0.6, sparsity=0.5)
    better, more = [choices(s, method="dense", read=r, ffn_bits=b) for s, r, b in ((0.7, 0.41, "6"), (0.79, 0.53, "8"))]
    worse = choices(0.3, method="dense", read=0.28, ffn_bits="4")
    text = text_of(board_of(tmp_path / "a", dense, at_half, better, worse, more))
    assert "The best rounding here (dense on 6 bits, 41 %: " in text and "(dense on 8 bits" not in text
    assert "Rounding is better than the best pruned row at 50 %." in text
    assert "The best rounding" not in text_of(board_of(tmp_path / "b", dense, at_half, more))


def test_rows_are_held_against_the_dense_model_that_is_not_rounded(tmp_path):
    rounded = choices(0.7, method="dense", read=0.281, ffn_bits="4")
    alone = board_of(tmp_path / "a", rounded, choices(0.6, ffn_bits="4"))
    assert all(r.quality["acc"].share is None for r in alone.rows)
    assert "There is no dense cell for arc: run --method dense too, for recoveries." in alone.notes
    both = board_of(tmp_path / "b", rounded, choices(0.8, method="dense"), choices(0.6, read=0.08, ffn_bits="4"))
    of = (EASY < 0.8).mean() - 0.25
    assert {r.label: above(r) for r in both.rows if r.keys} == pytest.approx(
        {"dense": 1, "dense on 4 bits": ((EASY < 0.7).mean() - 0.25) / of,
         "griffin on 4 bits": ((EASY < 0.6).mean() - 0.25) / of}
    )  # fmt: skip


def test_other_prompts_are_not_held_against_each_other_and_the_last_run_of_a_cell_counts(tmp_path):
    other = choices(0.5)
    other.samples[3]["prompt_hash"] = "another"
    made = board_of(tmp_path / "a", choices(0.8, method="dense"), other)
    (note,) = made.notes
    assert note.startswith("Not compared with dense: arc ") and "1 of 200 prompts differ" in note
    old, new = choices(0.2, created="2026-01-01", code="old"), choices(0.6, created="2026-02-01", code="new")
    made = board_of(tmp_path / "b", choices(0.8, method="dense", code="new"), old, new)
    assert made.blocks[0].levels[1].rows[0].keys == (new.key,)
    assert made.notes == ("Left out: 1 older run of cells. The last run of each counts.",)


def test_rows_of_two_scopes_stand_in_blocks_of_their_own_beside_one_dense(tmp_path):
    made = board_of(
        tmp_path, choices(0.8, method="dense"), choices(0.5), choices(0.2, method="random"),
        choices(0.78, scope="last"), choices(0.6, method="random", scope="last"),
        choices(0.8, method="dense", read=0.281, ffn_bits="4"),
    )  # fmt: skip
    assert places(made) == [
        [("dense", "")], [("dense on 4 bits", ""), ("griffin (scope=scored)", BEST), ("random (scope=scored)", "")],
    ]  # fmt: skip
    assert places(made, 1) == [
        [("dense", "")], [("dense on 4 bits", ""), ("griffin (scope=last)", BEST), ("random (scope=last)", "")],
    ]  # fmt: skip
    assert "Scope last: arc x 200" in text_of(made)


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_a_board_fits_and_numbers_stay_whole(tmp_path, width):
    """Names of methods go over several lines where there is no room."""
    records = []
    for task in ("arc", "hellaswag", "piqa", "rte"):
        records.append(choices(0.8, task, "dense"))
        records += [choices(0.5 - 0.02 * i, task, "dart", params={"remask.window": i}) for i in range(3)]
    for r in records:
        if r.inputs["params"]:
            r.settings["method"] = f"dart:remask.window={r.inputs['params']['remask.window']}:allocation=uniform"
    text = board_text.lines(board_of(tmp_path, *records), width, explain=True)
    assert max(map(len, text)) <= width
    rows = [line for line in text if "±" in line and "[" in line and ":" not in line[60:]]
    assert len(rows) == 3 and all(line.count("±") == 1 for line in rows)
    assert "remask.window=1" in "".join(text).replace(" ", "")
    assert "above guessing: (accuracy - guessing)" in "".join(text)


def test_rows_are_sorted_and_chosen_as_asked(tmp_path):
    made = board_of(
        tmp_path, choices(0.8, method="dense"), choices(0.5), choices(0.6, method="dart"), choices(0.7, sparsity=0.5)
    )
    text = board_text.lines(made, 100, sort="accuracy", level=0.3)
    assert " 50 %" not in "\n".join(text) and any(line[11:].startswith("dense") for line in text)
    names = [line[11:].split()[0] for line in text if "±" in line and line[11:].split()]
    assert names.index("dart") < names.index("griffin")
    folder = save(tmp_path / "out", *[choices(s, method=m) for m, s in (("dense", 0.8), ("griffin", 0.5))])
    assert "no cell has metric 'acc_nrm'" in command("tables", folder, "--metric", "acc_nrm").err
    assert command("tables", folder, "--metric", "acc", "--sort", "accuracy", "--explain").code == 0


def test_rows_on_rounded_weights_say_their_sparsity(tmp_path):
    records = [choices(0.8, method="dense"), choices(0.3, sparsity=0.5, read=0.141, ffn_bits="4")]
    records += [
        choices(0.6, sparsity=0.442, read=0.157, ffn_bits="4"),
        choices(0.7, method="dart", read=0.15, ffn_bits="4"),
    ]
    made = board_of(tmp_path, *records)
    assert [row.name for row in made.blocks[0].levels[1].rows] == [
        "dart on 4 bits 70 %", "griffin on 4 bits 44.2 %", "griffin on 4 bits 50 %",
    ]  # fmt: skip
    assert len(charts.curves(made.blocks[0])["griffin on 4 bits"]) == 2


def test_a_board_of_some_tasks_holds_rows_against_each_other_that_ran_on_these(tmp_path):
    records = [choices(0.8, task, "dense") for task in ("arc_easy", "boolq")]
    records += [choices(0.6, "arc_easy", "griffin"), choices(0.7, "arc_easy", "dart"), choices(0.5, "boolq", "griffin")]
    folder = save(tmp_path, *records)
    shown = command("tables", folder, "--tasks", "arc")  # stands for arc_easy and arc_challenge
    assert "boolq" not in shown.out
    assert "At 30 % dart is the best pruned row" in " ".join(shown.out.split())
    assert "boolq" in command("tables", folder, "--tasks", "arc_easy,boolq").out
    wrong = command("tables", folder, "--tasks", "bolq")
    assert (wrong.code, wrong.err) == (2, "error: the folder has no cell of task 'bolq'; did you mean boolq?\n")


def test_upper_bounds_stand_apart_and_are_never_best(tmp_path):
    knows = choices(0.79, method="oracle")
    knows.settings["upper_bound"] = True
    made = board_of(tmp_path, choices(0.8, method="dense"), knows, choices(0.5), choices(0.2, method="random"))
    assert places(made)[1] == [("oracle", ""), ("griffin", BEST), ("random", "")]
    assert "Upper bounds, which look ahead: oracle." in " ".join(board_text.lines(made, 100))


def test_methods_that_calibrate_are_named(tmp_path):
    """Each once, whatever the sparsity, and by `calibration` in the inputs: None where a method reads no text."""
    dense, griffin = choices(0.8, method="dense", calibration=None), choices(0.5, method="griffin", calibration=None)
    flap = [choices(0.6, method="flap"), choices(0.4, read=0.3, sparsity=0.7, method="flap")]
    said = " ".join(board_text.lines(board_of(tmp_path / "a", dense, griffin, *flap), 100))
    assert "Calibrated on a text in advance: flap." in said
    alone = board_of(tmp_path / "b", dense, griffin)
    assert "Calibrated" not in " ".join(board_text.lines(alone, 100))


def test_reads_that_are_about_are_marked_and_no_test_is_made_at_equal_reads(tmp_path):
    rows = [choices(0.8, method="dense"), choices(0.75, method="dart"), choices(0.3)]
    assert "dart is the best pruned row" in text_of(board_of(tmp_path / "exact", *rows))
    rows = [dataclasses.replace(row, settings={**row.settings, "about": True}) for row in rows]
    made = board_of(tmp_path / "about", *rows)
    said = text_of(made)
    assert "≈30 % dart" in said and "no test is made at equal reads" in said and "best pruned row:" not in said
    assert places(made)[1] == [("dart", ""), ("griffin", "")]
    assert "are about: by the bits of its configuration" in tables.costs(rows).note


def test_dense_in_two_scopes_is_one_row(tmp_path):
    made = board_of(tmp_path, choices(0.8, method="dense"), choices(0.8, method="dense", scope="all"), choices(0.5))
    assert places(made) == [[("dense", "")], [("griffin", "")]]


def test_the_board_of_a_run_has_the_folders_dense_cells_and_what_it_suggests_next_works(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = [choices(0.5, sparsity=0.5, params={"draw": "seed"}), choices(0.4, "piqa", method="flap", params={})]
    old = [choices(0.8, method="dense", params={}), choices(0.6, sparsity=0.5, params={"draw": "best"})]
    flap = choices(0.4, method="flap", sparsity=0.5, params={})
    save(tmp_path / "out", *old, *new, flap)
    show_results(RunResult([new[0], flap, new[1]], [], {}), "out")
    shown = capsys.readouterr().out
    assert "  dense  " in shown and "There is no dense cell for piqa: run" in " ".join(shown.split())
    suggested = shlex.split(shown.splitlines()[-1].rpartition("dart-eval ")[2])
    assert suggested == ["compare", "out", "--method", "griffin:draw=seed,flap"]
    assert command(*suggested).code == 0
    refused = command("compare", "out", "--method", "griffin,flap").err
    assert "griffin stands for several cells: " in refused
    assert refused.endswith("; say which: griffin:draw=best or griffin:draw=seed\n")


def test_a_method_is_told_from_others_of_its_name_by_as_little_as_can_be():
    settings = [{"remask": "none"}, {"remask": "drift", "remask.window": 8}, {"remask": "drift", "remask.window": 4}]
    made = [answered("arc", right(0.5), "griffin", params=p) for p in settings] + [answered("arc", right(0.5), "flap")]
    assert list(exact(made).values()) == [
        "griffin:remask=none", "griffin:remask.window=8", "griffin:remask.window=4", "flap",
    ]  # fmt: skip
    older = answered("arc", right(0.5), "griffin", params={})
    plain = [older, answered("arc", right(0.5), "griffin", params={"draw": "sample"})]
    assert list(exact(plain).values()) == ["griffin:draw=best", "griffin:draw=sample"]


def test_cells_of_several_versions_keep_their_names_and_are_counted(tmp_path):
    """Nothing but the code differs, and a field that an older version did not have."""
    dense = [choices(0.8, task, "dense", code="old") for task in ("arc", "piqa")]
    first = choices(0.5, "arc", params={"choice": "none"}, code="old")
    later = choices(0.6, "piqa", params={"choice": "none", "routing": "own"}, code="new")
    made = board_of(tmp_path, *dense, first, later)
    assert places(made) == [[("dense", "")], [("griffin", "")]]
    assert set(made.blocks[0].levels[1].rows[0].values) == {"arc", "piqa"}
    assert made.notes == ("The cells come from 2 versions of the code: 3 of old, 1 of new.",)


def test_measured_speed_stands_beside_its_row(tmp_path):
    pruned = choices(0.5)
    ratio = Ratio(1.523, 1.5, 1.6, 30)
    speed = speeds.Speed(
        "griffin", pruned.inputs["params"], 0.7, pruned.inputs["model"], "float32", "cpu", "2 threads", None, 128, 0.3,
        ratio, ratio, 1.8, "2026-01-01",
    )  # fmt: skip
    made = board_of(
        tmp_path,
        choices(0.8, method="dense"),
        pruned,
        choices(0.4, method="random", params={"seed": 1}),
        speeds=[speed],
    )
    text = "\n".join(board_text.lines(made, 100))
    assert {row.label: row.speed for row in made.rows if row.speed} == {"griffin": speed}
    assert "1.52x" in text and "griffin decodes 1.52x as fast as dense." in text and " none" not in text
    untimed = dataclasses.replace(speed, speedup=None, control=None, times="bytes only")
    folder = board_of(tmp_path / "other", choices(0.8, method="dense"), pruned, speeds=[untimed])
    (row,) = [line for line in board_text.lines(folder, 100) if "griffin" in line and "±" in line]
    assert row.rstrip().endswith(" none")


def test_costs_of_several_seeds_are_means_too():
    a, b = (
        dataclasses.replace(choices(0.5, read=read, seed=seed), flops={"overhead_share": share})
        for seed, (read, share) in enumerate(((0.3, 0.1), (0.4, 0.3)))
    )
    found = mean_record([a, b])
    assert (found.weights_read, found.flops["overhead_share"]) == pytest.approx((0.35, 0.2))


@pytest.mark.surface
def test_tables_shows_the_board_and_long_tables_on_request(tmp_path):
    folder = save(tmp_path, choices(0.8, method="dense"), choices(0.5), choices(0.4, method="random"))
    done = command("tables", folder)
    assert done.code == 0 and "* griffin" in done.out and "At 30 % griffin is the best pruned row" in done.out
    long = command("tables", folder, "--view", "long")
    assert "### Accuracy" in long.out and "In all rows: n 200" in long.out and "FLOPs" not in long.out
    assert "| dense" in command("tables", folder, "--format", "md").out
    wrong = command("tables", folder, "--view", "bord")
    assert wrong.code == 2 and "did you mean board?" in wrong.err
    retired = command("tables", folder, "--view", "frontier")
    assert retired.code == 2 and "frontier left in 0.3" in retired.err
    picture = tmp_path / "board.svg"
    assert command("tables", folder, "--save", picture).code == 0
    assert picture.read_text().startswith("<?xml")
    weak = save(tmp_path / "weak", choices(0.25, method="dense"), choices(0.3))
    refused = command("tables", weak, "--save", picture)
    assert refused.code == 2 and "has nothing to draw: dense is not above guessing on arc; raise --limit" in refused.err


def test_a_row_with_the_same_answers_is_not_told_apart(tmp_path):
    """Re-masks that no alarm called for: no document differs, so there is nothing to test by."""
    dense, best = choices(0.9, method="dense"), choices(0.8, method="dart", params={"remask": "drift"})
    twin, other = choices(0.8, method="dart", params={"remask": "off"}), choices(0.4)
    text = text_of(board_of(tmp_path, dense, best, twin, other))
    assert "not told apart from dart:remask=off" in text and "not tested" not in text


def test_a_run_that_is_repeated_does_not_make_a_family_larger(tmp_path):
    """p_holm is over the tasks of a method and metric, each counted once."""
    runs = [("arc", "2026-01-01"), ("piqa", "2026-01-01"), ("arc", "2026-01-02")]
    cells = [choices(s, task, method, created=created, versions={"torch": created})
             for task, created in runs for s, method in ((0.6, "dense"), (0.45, "griffin"))]  # fmt: skip
    store = Store(save(tmp_path / "twice", *cells))
    again = [
        line for line in frame.lines(store, store.load()) if line["method"] == "griffin" and line["metric"] == "acc"
    ]
    assert len(again) == 3 and all(line["p_holm"] == pytest.approx(2 * line["p"]) for line in again)


def test_cells_of_two_scopes_are_two_blocks(tmp_path):
    """Tasks that were run in another scope: no mean is over both."""
    cells = [choices(0.8, task, "dense") for task in ("arc", "boolq")]
    cells += [choices(0.7, "arc", "dart", scope="last"), choices(0.4, "boolq", "dart")]
    made = board_of(tmp_path, *cells)
    assert [(block.scope, [*block.tasks["acc"]]) for block in made.blocks] == [("scored", ["boolq"]), ("last", ["arc"])]
    found = [row for row in made.rows if row.label == "dart"]
    assert [len(row.keys) for row in found] == [1, 1]


def test_a_level_keeps_or_leaves_whole_rows(tmp_path):
    """A method whose tasks read .28 and .46 reads .37, and is not about .30 on one of them."""
    cells = [choices(0.8, task, "dense") for task in ("arc", "sciq")]
    cells += [choices(0.5, task, read=0.3) for task in ("arc", "sciq")]
    cells += [choices(0.7, task, "top-p", read=read) for task, read in (("arc", 0.28), ("sciq", 0.46))]
    shown = command("tables", save(tmp_path, *cells), "--level", "0.3")
    assert "griffin" in shown.out and "top-p" not in shown.out and "On these tasks alone" not in shown.out


def test_a_column_without_room_still_sorts(tmp_path):
    cells = [choices(0.8, method="dense")]
    cells += [dataclasses.replace(choices(0.4, method=m), memory={"weights": 1, "beside": size, "state": 1})
              for m, size in (("griffin", 900_000), ("dart", 500), ("flap", 90))]  # fmt: skip
    lines = board_text.lines(board_of(tmp_path, *cells), 60, sort="memory")
    names = [line[11:].split()[0] for line in lines if line[:5].strip() == "30 %"]
    assert names == ["flap", "dart", "griffin"] and any("no room for" in line for line in lines)
    old = board_of(tmp_path / "old", *(dataclasses.replace(cell, memory={"weights": 1, "state": 9}) for cell in cells))
    assert all(row.memory is None for row in old.rows)
    shares = {0.0: "0 %", 5e-5: "< 0.01 %", 0.0012: "0.12 %", 0.993: "99 %", 0.996: "100 %", 1.284: "128 %"}
    assert {value: small_share(value) for value in shares} == shares


def test_several_seeds_are_one_row_with_their_mean(tmp_path):
    """Of the run, and of parts that took the run's seed; a part with a seed of its own is another row."""

    def drawn(share, seed, own=None):
        return choices(share, method="random", seed=seed, params={"score.seed": seed if own is None else own})

    dense = [choices(0.8, method="dense", seed=seed) for seed in (0, 1)]
    made = board_of(tmp_path, *dense, drawn(0.4, 0), drawn(0.5, 1), drawn(0.6, 0, own=7))
    assert sorted(row.label for row in made.rows if row.keys) == ["dense", "random:score.seed=0", "random:score.seed=7"]
    (row,) = [row for row in made.rows if row.label.endswith("=0")]
    shares = [np.mean([(s > EASY).mean() for s in some]) for some in ((0.4, 0.5), (0.8, 0.8))]
    assert row.quality["acc"].value == pytest.approx(shares[0])
    assert above(row) == pytest.approx((shares[0] - 0.25) / (shares[1] - 0.25))
    assert "Rows are means over the seeds 0, 1; 1 of 3 cells ran under fewer of them." in made.notes
    both = board_of(tmp_path / "b", *dense, drawn(0.4, 0), drawn(0.5, 1))
    assert "Rows are means over the seeds 0, 1." in both.notes


def test_cells_of_other_calibrations_are_rows_of_their_own(tmp_path):
    """They have other masks: none is an older run of another, or its other seed."""
    text = {"calibration": "a text", "calibration_tokens": 512}
    flaps = [choices(s, method="flap", **text, calibration_seed=i, created=f"2026-0{i + 1}-01")
             for i, s in enumerate((0.7, 0.3))]  # fmt: skip
    made = board_of(tmp_path, choices(0.8, method="dense", calibration=None), *flaps)
    (level,) = places(made)[1:]
    assert [label for label, _ in level] == ["flap (calibration_seed=0)", "flap (calibration_seed=1)"]
    assert not any("older run" in note or "seeds" in note for note in made.notes)


def test_rows_that_are_paired_with_dense_and_others_have_one_scale(tmp_path):
    """Griffin's questions are others than dense's, so that it has an accuracy and no difference from dense's."""
    made = board_of(tmp_path, choices(0.8, method="dense"), choices(0.78, method="dart"), unpaired := choices(0.3))
    assert [r for r, _ in places(made)[1]] == ["dart", "griffin"]
    others = [{**s, "doc_hash": "another"} for s in unpaired.samples]
    unpaired = dataclasses.replace(unpaired, samples=others)
    made = board_of(tmp_path / "b", choices(0.8, method="dense"), choices(0.78, method="dart"), unpaired)
    assert [r for r, _ in places(made)[1]] == ["dart", "griffin"] and made.blocks[0].levels[1].take.label == "dart"
    sorted_ = board_text.lines(made, 100, sort="accuracy")
    starts = [line.split()[:1] for line in sorted_]
    assert starts.index(["100"]) < starts.index(["guessing"])


def test_too_few_questions_say_nothing_of_guessing(tmp_path):
    values = [{"acc": 1.0}] * 5
    made = board_of(
        tmp_path, choosing(answered("arc", values, "dense", 0.0)), choosing(answered("arc", values, "dart"))
    )
    assert made.blocks[0].at_chance == () and "guessing on" not in text_of(made)


def test_a_level_without_rows_is_said(tmp_path):
    made = board_of(tmp_path, choices(0.5, sparsity=0.5))
    assert "no row reads about 30 % of the FFN bytes" in text_of(made, level=0.3)


def test_bits_are_compared_as_nats(tmp_path):
    """One bit a byte more is twice the perplexity of a byte."""

    def cell(bits, method, sparsity):
        values = [{"bits_per_byte": (-bits * (9 + i % 2) * np.log(2), 9 + i % 2)} for i in range(20)]
        metric = Metric("pile", "bits_per_byte", bits, 0.01, 20, False, None)
        return answered("pile", values, method, sparsity, False, metrics=[metric])

    store = Store(save(tmp_path, cell(1.0, "dense", 0.0), cell(2.0, "griffin", 0.5)))
    (row,) = (r for r in frame.lines(store, store.load()) if r["method"] == "griffin")
    assert row["recovery"] == pytest.approx(0.5)


def test_an_interval_may_have_no_end():
    assert multiple(4e7, 0.0, float("inf")) == "4.0e7x [0, inf]"


def test_faster_rows_are_no_also_where_the_first_is_slower(tmp_path):
    dense, griffin = choices(0.8, method="dense"), choices(0.3, params={"mask": "griffin"})
    dart = choices(0.78, method="dart")
    for ratio, said in ((0.8, "Faster than dense: griffin"), (1.3, "Also faster than dense: griffin")):
        timed = [
            speeds.Speed(r.inputs["method"], r.inputs["params"], 0.7, r.inputs["model"], "float32", "cpu", "1 thread",
                         None, 8, 0.3, Ratio(x, x - 0.05, x + 0.05, 9), None, 2.0, "2026-01-01")
            for r, x in ((dart, ratio), (griffin, 1.4))
        ]  # fmt: skip
        text = text_of(board_of(tmp_path / str(ratio), dense, dart, griffin, speeds=timed))
        assert said in text


def test_rows_of_another_level_take_no_task_from_the_level_that_is_shown(tmp_path):
    """One level ran on seven tasks, the other on six of them."""
    tasks = ["arc_easy", "arc_challenge", "boolq", "winogrande", "openbookqa", "rte", "hellaswag"]
    cells = [choices(share, t, method) for t in tasks for method, share in (("dense", 0.8), ("griffin", 0.6))]
    folder = save(tmp_path / "out", *cells, *[choices(0.5, t, sparsity=0.9) for t in tasks[:-1]])
    assert "Tasks left out of means" in command("tables", folder).out
    shown = command("tables", folder, "--level", "0.3").out
    assert "7 choice tasks" in shown and "left out" not in shown and " 10 %" not in shown


def test_rows_of_other_documents_are_no_rivals(tmp_path):
    """As far as their values go the one with fewer documents would lead."""
    few = [choices(s, method=m, limit=100) for m, s in (("dense", 0.9), ("dart", 0.85))]
    many = [choices(s, method=m, limit=200) for m, s in (("dense", 0.8), ("griffin", 0.5))]
    made = board_of(tmp_path, *few, *many)
    assert len(made.blocks) == 2
    assert [len([r for r in block.rows if r.kind == "pruned"]) for block in made.blocks] == [1, 1]
    assert "best pruned row" not in text_of(made)


def test_rows_that_were_not_tested_are_not_called_equal(tmp_path):
    """A group of four members has too few units."""
    values = [{"acc": float(i % 3 > 0)} for i in range(8)]
    cells = [choosing(answered("arc", [{"acc": v["acc"] * keep} for v in values[:5]], m, s))
             for m, s, keep in (("dense", 0.0, 1), ("dart", 0.7, 1), ("griffin", 0.7, 0))]  # fmt: skip
    text = text_of(board_of(tmp_path, *cells))
    assert "not tested against griffin" in " ".join(text.split()) and "no row is told apart" not in text


def test_two_perplexities_have_columns_of_their_own(tmp_path):
    """LAMBADA's perplexity beside that of a text's words: both titles are `perplexity`."""

    def lambada(times, method, sparsity):
        values = [{"perplexity": -times * (2 + i % 3), "acc": 1.0} for i in range(30)]
        ms = [Metric("lambada", "perplexity", float(np.exp(times * 3)), 0.1, 30, False),
              Metric("lambada", "acc", 1.0, 0.1, 30, True)]  # fmt: skip
        return answered("lambada", values, method, sparsity, metrics=ms)

    def text(times, method, sparsity):
        values = [{"word_perplexity": [-times * (90.0 + i % 3), 60]} for i in range(60)]
        return answered("wikitext", values, method, sparsity, up=False)

    rows = ("dense", 0.0, 1.0, 1.0), ("griffin", 0.5, 1.5, 1.1)
    folder = save(tmp_path, *[make(t, m, s) for m, s, *ts in rows for make, t in zip((lambada, text), ts, strict=True)])
    shown = command("tables", folder, "--metric", "perplexity")
    (row,) = [line for line in shown.out.splitlines() if line[11:].startswith("griffin")]
    assert row.count("4.48x") == 1 and row.count("1.16x") == 1
    assert " word_perplexity" in shown.out


def test_a_metric_that_is_asked_for_is_that_of_the_first_filter_as_on_the_board(tmp_path):
    def gsm(strict, flexible, method, sparsity):
        means = ("strict", strict), ("flexible", flexible)
        sides = {f: [{"exact_match": float(i % 10 < 10 * v)} for i in range(60)] for f, v in means}
        ms = [Metric("gsm", f"exact_match,{f}", v, 0.05, 60, True) for f, v in means]
        lines = [s for f, values in sides.items() for s in samples("gsm", values, filter_=f)]
        return answered("gsm", sides["strict"], method, sparsity, lines=lines, metrics=ms)

    folder = save(tmp_path, gsm(0.6, 0.8, "dense", 0.0), gsm(0.3, 0.5, "griffin", 0.5))
    assert command("tables", folder, "--metric", "exact_match").out == command("tables", folder).out


def test_a_mean_over_seeds_is_not_called_by_one_of_them(tmp_path):
    """Griffin ran under seeds 0 and 1, dart under 2 and 3, dense under all of them."""
    dense = [choices(0.8, method="dense", seed=seed) for seed in range(4)]
    pruned = [choices(0.6 + 0.1 * (s > 1), method="dart" if s > 1 else "griffin", seed=s) for s in range(4)]
    made = board_of(tmp_path, *dense, *pruned)
    assert {row.label for row in made.rows if row.keys} == {"dense", "griffin", "dart"}


def test_a_distance_over_other_tasks_is_no_rival(tmp_path):
    """KL was measured on one task under griffin, on another one under dart."""

    def measured(task, method, kl=None):
        values = [{"acc": float(e < 0.6), **({} if kl is None else {"kl": [10 * kl, 10]})} for e in EASY]
        return choosing(answered(task, values, method, 0.7))

    cells = [choices(0.8, task, "dense") for task in ("arc", "piqa")]
    cells += [measured("arc", "griffin", 0.2), measured("piqa", "griffin")]
    cells += [measured("arc", "dart"), measured("piqa", "dart", 2.0)]
    made = board_of(tmp_path, *cells)
    assert all(row.kl is None for row in made.rows)


def test_a_level_keeps_the_rounding_that_beats_it(tmp_path):
    """The method `rounding` reads less than the level that is shown, and is still its rival, as rounded weights are."""
    rounding = choices(0.78, method="rounding", sparsity=0.72)
    rounding.settings["granularity"] = "last bits"
    folder = save(tmp_path, choices(0.8, method="dense"), choices(0.5, sparsity=0.5), rounding)
    said = "Rounding is better than the best pruned row at 50 %."
    assert said in command("tables", folder).out and said in command("tables", folder, "--level", "0.5").out
