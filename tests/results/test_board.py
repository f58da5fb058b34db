"""The board: what a row keeps of dense, which is best at its level of read, and whether that is more than noise."""

import dataclasses
import shlex

import numpy as np
import pytest

from dart_eval.bench import kept
from dart_eval.bench.ratio import Ratio
from dart_eval.cli.run import show_results
from dart_eval.executors.jobs import RunResult
from dart_eval.results import board_text, frontier, recovery, stats
from dart_eval.results.board import BEST, LEVEL_WITH_BEST, boards
from dart_eval.results.labels import exact
from dart_eval.results.outcomes import Measure, outcome, pairs
from dart_eval.results.record import Metric
from dart_eval.results.store import Store
from tests.helpers.commands import command
from tests.helpers.records import answered, perplexities, right, samples, save

GENERATOR = np.random.default_rng(5)
EASY = GENERATOR.random(200)  # how easy each question is, the same for all methods


def choices(share, task="arc", method="griffin", sparsity=0.7, read=None, **more):
    """A cell that answers the easiest questions right."""
    values = [{"acc": float(e < share)} for e in EASY]
    made = answered(task, values, method, 0.0 if method == "dense" else sparsity, **more)
    read = read if read is not None else 1.0 if method == "dense" else 1 - sparsity
    return dataclasses.replace(made, weights_read=read)


def board_of(tmp_path, *records, speeds=()):
    (made,) = boards(Store(save(tmp_path, *records)), records, speeds)
    return made


def places(board):
    return [[(row.label, row.mark) for row in level.rows] for level in board.levels]


def test_rows_stand_by_read_and_recovery_and_only_what_noise_explains_is_called_level(tmp_path):
    made = board_of(
        tmp_path, choices(0.8, method="dense"), choices(0.4, method="random"), choices(0.6, method="griffin"),
        choices(0.61, method="dart"), choices(0.75, method="griffin", sparsity=0.5),
    )  # fmt: skip
    assert places(made) == [
        [("dense", "")], [("griffin", "")],
        [("dart", BEST), ("griffin", LEVEL_WITH_BEST), ("random", "")],
    ]  # fmt: skip
    values = {(r.label, r.sparsity): r.recovery.value for level in made.levels[1:] for r in level.rows}
    share = {s: (s > EASY).mean() for s in (0.8, 0.75, 0.61, 0.6, 0.4)}
    assert values == pytest.approx({
        ("griffin", 0.5): share[0.75] / share[0.8], ("dart", 0.7): share[0.61] / share[0.8],
        ("griffin", 0.7): share[0.6] / share[0.8], ("random", 0.7): share[0.4] / share[0.8],
    })  # fmt: skip
    (*_, last) = made.levels
    assert last.verdict.startswith("At read 0.30 dart keeps the most of dense's quality: ")
    assert "%. Its lead over random is more than noise (paired, Holm p <" in last.verdict
    assert last.verdict.endswith("; its lead over griffin may be noise.")
    assert made.levels[1].verdict == ""  # nothing to compare a single row with


def test_rows_of_one_read_and_two_sparsities_say_their_own(tmp_path):
    """`dart` at 70 % and at 71 % stand in one level, which then names neither; a level of one sparsity does."""
    made = board_of(
        tmp_path, choices(0.8, method="dense"), choices(0.6, method="dart"), choices(0.5),
        choices(0.55, method="dart", sparsity=0.71), choices(0.7, method="dart", sparsity=0.5),
    )  # fmt: skip
    _, half, third = made.levels
    assert {row.name for row in third.rows} == {"dart 70 %", "griffin 70 %", "dart 71 %"}
    assert [row.name for row in half.rows] == ["dart"]
    assert [board_text.level_name(level.rows) for level in made.levels] == [
        "sparsity 0 %, read 1.00", "sparsity 50 %, read 0.50", "read 0.29 to 0.30",
    ]  # fmt: skip
    assert third.verdict.startswith("At read 0.30 dart 70 % keeps the most")


@pytest.mark.parametrize(("metric", "value", "stderr", "text"), [
    ("word_perplexity", 8376191463.6, 3666130209.8, "8.4e9 ±3.7e9"), ("word_perplexity", 1e6, 12.6, "1.0e6 ±1.3e1"),
    ("word_perplexity", 999999.0, 10.0, "999999.0 ±10.0"), ("word_perplexity", 9.876, None, "9.88"),
    ("acc", 0.25, 0.05, "25.0 ±5.0"), ("word_perplexity", float("inf"), 1.0, "no number"),
])  # fmt: skip
def test_a_value_takes_as_few_characters_as_say_it(metric, value, stderr, text):
    assert board_text.short(metric, value, stderr) == text


def test_the_best_pays_for_having_been_chosen_among_many(tmp_path):
    """Six methods that are equal but for luck: one is best, and none is worse by the test."""
    drawn = [answered("arc", right(0.5, n=80, seed=s), "griffin", params={"score.seed": s}) for s in range(6)]
    made = board_of(tmp_path, answered("arc", right(0.5, n=80, seed=99), "dense", 0.0), *drawn)
    (level,) = [level for level in made.levels if len(level.rows) > 1]
    assert [row.mark for row in level.rows] == [BEST, *[LEVEL_WITH_BEST] * 5]
    assert level.verdict.endswith("Its lead over 5 others may be noise (paired test).")


def drawn_values(kind, n):
    """Values of n documents under a pruned model and under dense, and whether higher is better."""
    if kind == "acc":
        sides = [[{kind: float(x)} for x in np.random.default_rng(s).random(n) + 0.2] for s in (1, 2)]
        return *sides, True
    pruned, dense = ([v["word_perplexity"] for v in perplexities(scale, n, seed=1)] for scale in (1.3, 1.0))
    if kind == "words":  # a mean of which less is better
        return (
            [{kind: float(w)} for _, w in pruned],
            [{kind: float(w) + 0.2 * i} for i, (_, w) in enumerate(dense)],
            False,
        )
    return [{kind: v} for v in pruned], [{kind: v} for v in dense], False


@pytest.mark.parametrize(("p", "mark"), [(0.02, LEVEL_WITH_BEST), (0.01, "")])
def test_each_p_counts_for_all_pairs_that_could_have_been_chosen(tmp_path, monkeypatch, p, mark):
    """Of three rows p counts 3 / 2 times, and Holm doubles the smaller of two: .02 becomes .06, and .01 .03."""
    monkeypatch.setattr(recovery, "difference", lambda a, b: p)
    pruned = [choices(s, method=m) for m, s in (("griffin", 0.6), ("dart", 0.5), ("random", 0.4))]
    made = board_of(tmp_path, choices(0.8, method="dense"), *pruned)
    assert [row.mark for row in made.levels[1].rows] == [BEST, mark, mark]


@pytest.mark.parametrize("kind", ["acc", "words", "word_perplexity", "bits_per_byte"])
def test_an_interval_is_as_wide_as_resampling_documents_says(kind):
    """The influence values, against recoveries of 2,000 resamples that are computed from the values themselves."""
    n = 150
    pruned, dense, up = drawn_values(kind, n)
    x, y = (
        outcome(answered("t", side, metrics=[Metric("t", kind, 0.0, None, n, up)]), samples("t", side))
        for side in (pruned, dense)
    )
    made = recovery.of_task(pairs(Measure("t", kind, up, ("t",)), x, y))
    spread = np.sqrt(n / (n - 1) * sum(u * u for u in made.units.values()))

    def ratio(rows):
        sums = [np.sum([side[i][kind] for i in rows], 0) for side in (pruned, dense)]
        found = [s / n for s in sums] if kind in ("acc", "words") else [-s[0] / s[1] for s in sums]
        if kind == "word_perplexity":
            found = [np.exp(f) for f in found]
        return found[0] / found[1] if up else found[1] / found[0]

    assert made.value == pytest.approx(ratio(range(n)))
    generator = np.random.default_rng(0)
    assert spread == pytest.approx(np.std([ratio(generator.integers(0, n, n)) for _ in range(2000)]), rel=0.08)


def test_log_likelihoods_tell_apart_what_few_answers_do_not(tmp_path):
    """Accuracies of 30 questions that are the same but for one, log-likelihoods that all fell by about a nat."""
    noise = np.random.default_rng(3).normal(0, 0.3, (3, 30))
    records = []
    for i, (method, fall) in enumerate((("dense", 0.0), ("griffin", 1.0), ("dart", 2.0))):
        values = [{"acc": float(j < 20 + i % 2), "gold_ll": -5 - fall + noise[i, j]} for j in range(30)]
        records.append(answered("arc", values, method, 0.0 if method == "dense" else 0.5))
    made = board_of(tmp_path, *records)
    (griffin, dart) = made.levels[1].rows
    fell = [np.mean([s["metrics"]["gold_ll"] for s in r.samples]) for r in records]
    assert [griffin.nats.value, dart.nats.value] == pytest.approx([fell[1] - fell[0], fell[2] - fell[0]])
    low, high = griffin.nats.interval
    assert low < griffin.nats.value < high < dart.nats.value + 2
    assert dart.mark == LEVEL_WITH_BEST
    assert made.levels[1].verdict.endswith(
        "By the log-likelihood of right answers griffin is better than dart (paired, Holm p < 0.001)."
    )
    assert "-1.0 [-1.2, -0.9]" in "\n".join(board_text.lines(made, 100))


def test_tasks_weigh_the_same_in_the_mean_and_a_document_in_common_ties_no_two(tmp_path):
    records = [choices(0.8, task, "dense") for task in ("arc", "boolq")]
    records += [choices(0.4, "arc"), choices(0.6, "boolq")]
    (row,) = board_of(tmp_path, *records).levels[1].rows
    shares = [(s > EASY).mean() / (EASY < 0.8).mean() for s in (0.4, 0.6)]
    assert row.recovery.value == pytest.approx(sum(shares) / 2) and row.tasks == ("arc", "boolq")
    low, high = row.recovery.interval
    assert low < row.recovery.value < high


def test_a_row_that_lacks_a_task_takes_no_part(tmp_path):
    """It would be the best by its one task; the others are held against each other on both."""
    records = [choices(0.8, task, "dense") for task in ("arc", "boolq")]
    records += [choices(s, task, m) for m, s in (("griffin", 0.6), ("dart", 0.3)) for task in ("arc", "boolq")]
    made = board_of(tmp_path, *records, choices(0.79, "arc", "random"))
    assert places(made)[1] == [("griffin", BEST), ("dart", ""), ("random", "")]
    assert "random" not in made.levels[1].verdict
    assert "A row that lacks a task (-) stands last" in " ".join(board_text.lines(made, 120))


def test_rows_on_rounded_weights_say_their_sparsity(tmp_path):
    records = [choices(0.8, method="dense"), choices(0.3, sparsity=0.5, read=0.141, ffn_bits="4")]
    records += [
        choices(0.6, sparsity=0.442, read=0.157, ffn_bits="4"),
        choices(0.7, method="dart", read=0.15, ffn_bits="4"),
    ]
    made = board_of(tmp_path, *records)
    assert [row.name for row in made.levels[1].rows] == [
        "dart on 4 bits 70 %", "griffin on 4 bits 44.2 %", "griffin on 4 bits 50 %",
    ]  # fmt: skip
    assert len(frontier.curves(made)["griffin on 4 bits"]) == 2


def test_a_board_of_some_tasks_holds_rows_against_each_other_that_ran_on_these(tmp_path):
    records = [choices(0.8, task, "dense") for task in ("arc_easy", "boolq")]
    records += [choices(0.6, "arc_easy", "griffin"), choices(0.7, "arc_easy", "dart"), choices(0.5, "boolq", "griffin")]
    folder = save(tmp_path, *records)
    shown = command("tables", folder, "--tasks", "arc")  # stands for arc_easy and arc_challenge
    assert "boolq" not in shown.out and "takes no part in the test" not in shown.out
    assert "At read 0.30 dart keeps the most" in " ".join(shown.out.split())
    assert "boolq" in command("tables", folder, "--tasks", "arc_easy,boolq").out
    wrong = command("tables", folder, "--tasks", "bolq")
    assert (wrong.code, wrong.err) == (2, "error: the folder has no cell of task 'bolq'; did you mean boolq?\n")


@pytest.mark.parametrize(
    ("share", "wins", "said"),
    [(0.78, True, "more than that, and it is more than noise"), (0.61, False, "no difference that is more than noise"),
     (0.3, False, "less than that, and it is more than noise")],
)  # fmt: skip
def test_rounding_alone_stands_in_its_level_and_is_tested_against_the_best(tmp_path, share, wins, said):
    rounded = choices(share, method="dense", read=0.281, ffn_bits="4")
    made = board_of(tmp_path, choices(0.8, method="dense"), choices(0.6), rounded)
    assert made.levels[0].rows[0].label == "dense"
    last = made.levels[-1]
    assert {r.label: r.kind for r in last.rows} == {"griffin": "pruned", "dense on 4 bits": "rounding alone"}
    assert [r.recovery.value for r in last.rows] == sorted((r.recovery.value for r in last.rows), reverse=True)
    assert last.rounding_wins == wins and said in last.verdict and "(dense on 4 bits, read 0.28) keeps" in last.verdict
    first = board_text.lines(made, 100)[0]
    assert first == "At read 0.30 rounding alone keeps more than any pruned row." if wins else first.startswith("Model")
    assert ("rounding alone keeps more" in board_text.table(made).note) == wins


def test_the_best_rounding_that_reads_no_more_counts_and_none_that_reads_more(tmp_path):
    dense, at_half = choices(0.8, method="dense"), choices(0.6, sparsity=0.5)
    better, more = [choices(s, method="dense", read=r, ffn_bits=b) for s, r, b in ((0.7, 0.41, "6"), (0.79, 0.53, "8"))]
    worse = choices(0.3, method="dense", read=0.28, ffn_bits="4")
    made = board_of(tmp_path / "a", dense, at_half, better, worse, more)
    (verdict,) = [level.verdict for level in made.levels if level.verdict]
    assert "(dense on 6 bits, read 0.41) keeps" in verdict and "4 bits" not in verdict and "8 bits" not in verdict
    assert board_text.lines(made, 100)[0] == "At read 0.50 rounding alone keeps more than any pruned row."
    made = board_of(tmp_path / "b", dense, at_half, more)
    assert not any(level.verdict for level in made.levels)


def test_last_bits_are_left_out_by_rounding(tmp_path):
    planes = choices(0.78, method="planes", read=0.29)
    planes.settings["granularity"] = "last bits"
    last = board_of(tmp_path, choices(0.8, method="dense"), choices(0.6), planes).levels[-1]
    assert {r.label: r.kind for r in last.rows} == {"griffin": "pruned", "planes": "rounding alone"}
    assert last.rounding_wins and "(planes, read 0.29) keeps" in last.verdict


def test_recoveries_are_of_the_dense_model_that_is_not_rounded(tmp_path):
    rounded = choices(0.7, method="dense", read=0.281, ffn_bits="4")
    alone = board_of(tmp_path / "a", rounded, choices(0.6, ffn_bits="4"))
    assert all(r.recovery is None for r in alone.rows) and "There is no dense cell" in " ".join(alone.notes)
    both = board_of(tmp_path / "b", rounded, choices(0.8, method="dense"), choices(0.6, read=0.08, ffn_bits="4"))
    kept = {r.label: r.recovery.value for r in both.rows if r.recovery}
    of = (EASY < 0.8).mean()
    assert kept == pytest.approx(
        {"dense on 4 bits": (EASY < 0.7).mean() / of, "griffin on 4 bits": (EASY < 0.6).mean() / of}
    )


def test_upper_bounds_stand_apart_and_are_never_best(tmp_path):
    knows = choices(0.79, method="oracle")
    knows.settings["upper_bound"] = True
    made = board_of(tmp_path, choices(0.8, method="dense"), knows, choices(0.5), choices(0.2, method="random"))
    assert places(made)[1] == [("oracle", ""), ("griffin", BEST), ("random", "")]
    assert "Upper bounds, which know what no method can know in time: oracle." in " ".join(board_text.lines(made, 100))


def test_methods_that_calibrate_are_named(tmp_path):
    """Each once, whatever the sparsity, and by `calibration` in the inputs: None where a method reads no text."""
    dense, griffin = choices(0.8, method="dense", calibration=None), choices(0.5, method="griffin", calibration=None)
    flap = [choices(0.6, method="flap"), choices(0.4, read=0.3, sparsity=0.7, method="flap")]
    said = " ".join(board_text.lines(board_of(tmp_path / "a", dense, griffin, *flap), 100))
    assert " Calibrated on a text before any prompt: flap." in said
    alone = board_of(tmp_path / "b", dense, griffin)
    assert "Calibrated" not in " ".join(board_text.lines(alone, 100))


def test_another_granularity_has_levels_of_its_own_and_no_part_in_the_test(tmp_path):
    def finer(of, value, **inputs):
        record = choices(value, **inputs)
        record.settings["granularity"] = of
        return record

    columns, weights = finer("input channels", 0.79, method="teal"), finer("single weights", 0.78, method="wanda")
    made = board_of(
        tmp_path, choices(0.8, method="dense"), columns, choices(0.5), choices(0.2, method="random"), weights
    )
    assert places(made)[1:] == [[("griffin", BEST), ("random", "")], [("teal", "")], [("wanda", "")]]
    text = "\n".join(board_text.lines(made, 100))
    assert "input channels, sparsity 70 %, read 0.30" in text and "single weights, sparsity 70 %" in text
    assert "griffin keeps the most" in text.replace("\n", " ")


def test_rows_of_two_scopes_stand_in_levels_of_their_own_beside_one_dense(tmp_path):
    made = board_of(
        tmp_path, choices(0.8, method="dense"), choices(0.5), choices(0.2, method="random"),
        choices(0.78, scope="last"), choices(0.6, method="random", scope="last"),
        choices(0.8, method="dense", read=0.281, ffn_bits="4"), choices(0.8, scope="decode", read=1.0),
        choices(0.8, method="random", scope="decode", read=1.0),
    )  # fmt: skip
    assert places(made) == [
        [("dense", "")],
        [("dense on 4 bits", ""), ("griffin (scope=scored)", BEST), ("random (scope=scored)", "")],
        [("griffin (scope=decode)", ""), ("random (scope=decode)", "")],
        [("griffin (scope=last)", BEST), ("random (scope=last)", "")],
    ]
    assert all(row.recovery is not None for row in made.rows[1:])
    text = " ".join(board_text.lines(made, 100))
    assert "scope last, sparsity 70 %, read 0.30" in text and "scope decode, read 1.00" in text
    assert "Nothing ran pruned under scope decode: its rows are dense." in text
    assert "compare rows of one scope" in text


def test_a_board_of_one_other_scope_says_it_and_takes_rounding_alone_into_it(tmp_path):
    rounded = choices(0.8, method="dense", read=0.281, ffn_bits="4")
    made = board_of(tmp_path, choices(0.8, method="dense"), rounded, choices(0.5, scope="last-50"))
    assert [row.label for row in made.levels[1].rows] == ["dense on 4 bits", "griffin"]
    assert board_text.level_name(made.levels[1].rows) == "scope last-50, sparsity 70 %, read 0.28 to 0.30"
    assert board_text.level_name(made.levels[0].rows) == "sparsity 0 %, read 1.00"


def test_dense_in_two_scopes_is_one_row(tmp_path):
    made = board_of(tmp_path, choices(0.8, method="dense"), choices(0.8, method="dense", scope="all"), choices(0.5))
    assert places(made) == [[("dense", "")], [("griffin", "")]]


def test_what_is_missing_is_said(tmp_path):
    made = board_of(tmp_path, choices(0.5), choices(0.4, method="random"))
    assert all(row.recovery is None for level in made.levels for row in level.rows)
    assert made.notes == ("There is no dense cell for arc: run --method dense too, for recoveries.",)
    text = "\n".join(board_text.lines(made, 100))
    assert "recovery" not in text.splitlines()[2] and "griffin" in text


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
    assert suggested == ["compare", "out", "--methods", "griffin:draw=seed,flap"]
    assert command(*suggested).code == 0
    refused = command("compare", "out", "--methods", "griffin,flap").err
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


def test_cells_with_other_prompts_are_not_held_against_each_other(tmp_path):
    other = choices(0.5)
    other.samples[3]["prompt_hash"] = "another"
    made = board_of(tmp_path, choices(0.8, method="dense"), other)
    assert made.levels[1].rows[0].recovery is None
    (note,) = made.notes
    assert note.startswith("Without a recovery: arc ") and "1 of 200 prompts differ" in note


def test_of_two_runs_of_one_cell_the_last_counts(tmp_path):
    old = choices(0.2, created="2026-01-01", code="old")
    new = choices(0.6, created="2026-02-01", code="new")
    made = board_of(tmp_path, choices(0.8, method="dense", code="new"), old, new)
    assert places(made) == [[("dense", "")], [("griffin", "")]]
    assert made.levels[1].rows[0].keys == (new.key,)
    assert made.notes == ("1 cells of older runs are left out: the last run of each counts.",)


def test_cells_of_several_versions_keep_their_names_and_are_counted(tmp_path):
    """Nothing but the code differs, and a field that an older version did not have."""
    dense = [choices(0.8, task, "dense", code="old") for task in ("arc", "piqa")]
    first = choices(0.5, "arc", params={"choice": "none"}, code="old")
    later = choices(0.6, "piqa", params={"choice": "none", "routing": "own"}, code="new")
    made = board_of(tmp_path, *dense, first, later)
    assert places(made) == [[("dense", "")], [("griffin", "")]]
    assert set(made.levels[1].rows[0].values) == {"arc", "piqa"}
    assert made.notes == ("The cells are of 2 versions of the code: 3 of old, 1 of new.",)


def four_tasks(methods):
    names = ("arc_easy", "hellaswag", "piqa", "xsum")
    made = []
    for task in names:
        made.append(choices(0.8, task, "dense"))
        made += [choices(0.5 - 0.02 * i, task, "dart", params={"remask.window": i}) for i in range(methods)]
    for r in made:
        if r.inputs["params"]:
            r.settings["method"] = f"dart:remask.window={r.inputs['params']['remask.window']}:allocation=uniform"
    return made


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_board_of_four_tasks_fits(tmp_path, width):
    """Numbers stay whole; names of methods go over several lines where there is no room."""
    made = board_of(tmp_path, *four_tasks(3))
    text = board_text.lines(made, width)
    head = next(i for i, line in enumerate(text) if line.startswith("method"))
    table = text[head : text.index("", head)]
    assert max(map(len, table)) <= width
    assert all(task in table[0] for task in made.columns)
    rows = [line for line in table if "±" in line]
    assert len(rows) == 4 and all(line.count("±") == 4 and line.count("[") == (line[2:7] != "dense") for line in rows)
    assert ":remask.window=1" in "".join(table) and ":allocation=uniform" in "".join(table)


def test_many_tasks_share_a_column_for_each_metric(tmp_path):
    records = [choices(s, f"task{i}", m) for i in range(6) for m, s in (("dense", 0.8), ("griffin", 0.5))]
    text = board_text.lines(board_of(tmp_path, *records), 80)
    (head,) = [line for line in text if line.startswith("method")]
    assert "acc of 6" in head and "task0" not in head
    (row,) = [line for line in text if line.lstrip("* ").startswith("griffin") and "±" in line]
    shares = (EASY < 0.5).mean()
    assert f"{100 * shares:.1f} ±{100 * 0.01 / 6**0.5:.1f}" in row


def test_measured_speed_stands_beside_its_row(tmp_path):
    pruned = choices(0.5)
    ratio = Ratio(1.523, 1.5, 1.6, 30)
    speed = kept.Speed(
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
    assert [row.speed for level in made.levels for row in level.rows] == [None, speed, None]
    assert "1.52x" in text and "as `bench decode` measured it" in text and "bytes only" not in text
    untimed = dataclasses.replace(speed, speedup=None, control=None, times="bytes only")
    folder = board_of(tmp_path / "other", choices(0.8, method="dense"), pruned, speeds=[untimed])
    (row,) = [line for line in board_text.lines(folder, 100) if line.lstrip("* ").startswith("griffin") and "±" in line]
    assert row.rstrip().endswith("bytes only")


@pytest.mark.surface
def test_tables_shows_the_board_and_long_tables_on_request(tmp_path):
    folder = save(tmp_path, choices(0.8, method="dense"), choices(0.5), choices(0.4, method="random"))
    done = command("tables", folder)
    assert done.code == 0 and "* griffin" in done.out and "At read 0.30 griffin keeps the most" in done.out
    long = command("tables", folder, "--view", "long")
    assert "### Accuracy" in long.out and "In all rows: n 200" in long.out and "FLOPs" not in long.out
    assert "| dense" in command("tables", folder, "--format", "md").out
    wrong = command("tables", folder, "--view", "bord")
    assert wrong.code == 2 and "did you mean board?" in wrong.err
    picture = tmp_path / "frontier.svg"
    assert command("tables", folder, "--view", "frontier", "--save", picture).code == 0
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("points", "kept_share", "expected"),
    [
        ([(0.5, 0.9), (0.3, 0.7)], 0.95, (0.75, True)),
        ([(0.5, 0.9), (0.3, 0.7)], 0.8, (0.4, True)),
        ([(0.5, 0.99)], 0.95, (0.5, False)),
        ([(0.5, 1.02), (0.3, 0.9)], 0.96, (0.4, True)),
    ],
)
def test_how_far_a_method_can_go_is_read_off_the_line_between_two_levels(points, kept_share, expected):
    read, crossed = frontier.reach(points, kept_share)
    assert (read, crossed) == (pytest.approx(expected[0]), expected[1])


def test_a_handful_of_documents_gives_no_interval():
    few = recovery.Recovery(0.9, {str(i): 0.01 * (-1) ** i for i in range(stats.MIN_CLUSTERS - 1)})
    assert few.interval is None
    assert recovery.difference(few, recovery.Recovery(0.8, {})) is None
