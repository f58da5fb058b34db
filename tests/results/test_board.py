"""The board: rows in levels of read and blocks of tasks, and what they have above guessing."""

import dataclasses

import numpy as np
import pytest

from dart_eval.cli.run import show_results
from dart_eval.results import board, frame, speeds, stats, tables
from dart_eval.results.board import AHEAD, BEHIND, GUESSING, MATTERS, SPLIT, TIED, UNTESTED, verdicts
from dart_eval.results.record import Metric
from dart_eval.results.speeds import Ratio
from dart_eval.results.stats import Estimate
from dart_eval.results.store import Store
from dart_eval.util.errors import UserError
from tests.helpers.boards import EASY, board_of, choices, places, rows_of, said_of
from tests.helpers.commands import command
from tests.helpers.records import answered, choosing, perplexities, right, samples, save


def above(row, metric="acc"):
    return row.quality[metric].share.value


def test_rows_stand_by_read_and_by_what_they_have_above_guessing(tmp_path):
    """Four choices: guessing has .25, and what a row has above it is compared with what dense has above it."""
    made = board_of(
        tmp_path, choices(0.8, method="dense"), choices(0.4, method="random"), choices(0.6, method="griffin"),
        choices(0.61, method="dart"), choices(0.75, method="griffin", sparsity=0.5),
    )  # fmt: skip
    assert places(made) == [
        [("dense", "")], [("griffin", "")], [("dart", "~"), ("griffin", "~"), ("random", "")],
    ]  # fmt: skip
    share = {s: (s > EASY).mean() - 0.25 for s in (0.8, 0.75, 0.61, 0.6, 0.4)}
    values = {(r.label, r.sparsity): above(r) for r in made.blocks[0].rows if r.keys}
    assert values == pytest.approx({
        ("dense", 0.0): 1, ("griffin", 0.5): share[0.75] / share[0.8], ("dart", 0.7): share[0.61] / share[0.8],
        ("griffin", 0.7): share[0.6] / share[0.8], ("random", 0.7): share[0.4] / share[0.8],
    })  # fmt: skip
    guess = made.blocks[0].levels[0][-1]
    assert (guess.label, guess.quality["acc"].value, above(guess)) == (GUESSING, 0.25, 0.0)
    assert [row["FFN bytes read"] for row in rows_of(made)] == ["100 %", "", "50 %", "30 %", "30 %", "30 %"]


def test_noise_stands_beside_dense_and_is_no_pruner(tmp_path):
    made = board_of(
        tmp_path, choices(0.79, method="noise", sparsity=0.0, weights_read=1.0), choices(0.8, method="dense"),
        choices(0.4, method="random"), choices(0.6, method="griffin"),
    )  # fmt: skip
    assert places(made) == [[("dense", ""), ("noise", "")], [("griffin", "*"), ("random", "")]]


def test_over_tasks_it_is_one_ratio_of_sums(tmp_path):
    """A mean of the two ratios would be .36; a task on which dense only guesses is in the sums, and is named."""
    records = [choices(0.8, "arc", "dense"), choices(0.25, "rte", "dense"), choices(0.5, "arc"), choices(0.3, "rte")]
    made = board_of(tmp_path, *records)
    up = {s: (s > EASY).mean() - 0.25 for s in (0.8, 0.5, 0.3, 0.25)}
    (row,) = made.blocks[0].levels[1]
    assert above(row) == pytest.approx((up[0.5] + up[0.3]) / (up[0.8] + up[0.25]))
    assert made.blocks[0].at_chance == ("rte",)
    assert "guessing on rte." in said_of(made)


def test_a_leader_that_fetches_more_than_it_reads_meets_the_rounding_that_fetches_as_much(tmp_path):
    """At its read the leader beats rounding; in lines of memory it fetches as much as a rounding that beats it."""

    def fetching(record, share):
        return dataclasses.replace(record, fetched=share)

    few, more = (choices(s, method="dense", read=r, ffn_bits=b) for s, r, b in ((0.3, 0.28, "4"), (0.8, 0.37, "6")))
    records = [choices(0.8, method="dense"), few, fetching(more, 0.37), choices(0.25, method="random")]
    scattered = fetching(choices(0.5), 0.36)
    made = board_of(tmp_path, *records, scattered)
    assert "griffin fetches 36 %, and rounding to as much (dense on 6 bits: " in said_of(made)
    assert said_of(made).index("Rounding (dense on 4 bits") < said_of(made).index(" is behind. griffin fetches")
    assert said_of(made).count("is ahead.") == 1 and places(made)[-1][0] == ("griffin", "*")
    known = {row["method"]: row["fetched"] for row in rows_of(made) if row["fetched"] != "-"}
    assert known == {"griffin": "36 %", "dense on 6 bits": "37 %"}
    assert tables.board_tables([made])[0].fitted(80)[1] == ["state", "memory", "work"]
    near = board_of(tmp_path / "near", *records, fetching(choices(0.5), 0.304))
    assert "fetched" not in rows_of(near)[0] and "fetches" not in said_of(near)
    for folder, there in ((tmp_path, True), (tmp_path / "near", False)):
        records = (store := Store(folder)).load()
        long = tables.quality(frame.lines(store, records), records)[0]
        assert ("fetched" in long.columns) is ("lines of 64 bytes" in " ".join(long.notes)) is there


def test_a_divergence_is_a_multiple_of_the_noise_of_unrounded_weights(tmp_path):
    def far(kl, **more):
        made = choices(0.8, **more)
        pairs = {"kl": [kl * 5, 5], "kl_reverse": [kl * 5, 5]}
        samples = [{**s, "metrics": {**s["metrics"], **pairs}} for s in made.samples]
        metrics = [*made.metrics, *(Metric("arc", name, kl, 0.0, len(samples), False) for name in pairs)]
        return dataclasses.replace(made, metrics=metrics, samples=samples)

    floor = {"method": "noise", "sparsity": 0.0}
    noise, rounded = far(2e-4, read=1.0, **floor), far(0.1, read=0.28, ffn_bits="4", **floor)
    made = board_of(tmp_path, choices(0.8, method="dense"), rounded, noise, far(0.004), far(0.1, method="random"))
    known = {row["method"]: row["KL nats x noise"] for row in rows_of(made)}
    assert known == {
        "dense": "0", "noise": "0.0002 1.000x", "noise on 4 bits": "0.1 500x", "griffin": "0.004 20.0x",
        "random": "0.1 500x", "guessing": "-",
    }  # fmt: skip


def test_texts_have_columns_on_their_lengths(tmp_path):
    def wrote(method, lengths):
        made = answered("xsum", [{"rougeL": 0.2 + 0.01 * n} for n in lengths], method, 0.7 * (method != "dense"))
        for s, n in zip(made.samples, lengths, strict=True):
            s.update(responses=["a"], token_ids=[1] * n, limited=n == 9)
        return made

    made = board_of(tmp_path, wrote("dense", [4, 6, 5, 9] * 5), wrote("griffin", [9, 6, 9, 9] * 5))
    heads = ("tokens x dense", "at the limit", "loops", "tokens like dense")
    found = [[row[head] for head in heads] for row in rows_of(made)]
    assert found == [["1.000x", "25 %", "0 %", "6.0"], ["1.38x", "75 %", "0 %", "6.0"]]


def test_no_mean_goes_over_an_accuracy_and_a_perplexity(tmp_path):
    """By such a mean an answerer that guesses, with an endless perplexity, had two thirds of dense's quality."""
    pairs = [v["word_perplexity"] for v in perplexities(1.0, 40, seed=1)]
    worse = [[{"word_perplexity": [times * ll, words]} for ll, words in pairs] for times in (1, 3)]
    made = board_of(
        tmp_path, choices(0.8, method="dense"), choices(0.25), answered("wiki", worse[0], "dense", 0.0, up=False),
        dataclasses.replace(answered("wiki", worse[1], "griffin", 0.7, up=False), weights_read=0.3),
    )  # fmt: skip
    (row,) = made.blocks[0].levels[1]
    low, high = row.quality["acc"].share.interval
    assert low < 0 < high and abs(above(row)) < 0.1
    times, (least, most) = row.quality["word_perplexity"].beside_dense("word_perplexity")
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
    assert [*rows_of(made)[2].values()].count("no number") == 2
    good = answered("wiki", [{"word_perplexity": [-40.0 - i % 7, 10.0]} for i in range(40)], "random", 0.7, up=False)
    best = board_of(tmp_path / "more", *records, good)
    assert [label for label, _ in places(best)[1]] == ["griffin", "random", "dart"]
    assert "is not tested against dart" in said_of(best)


DENSE = choices(0.8, method="dense")
TWO_TASKS = [
    choices(s, task, m) for m, s in (("dense", 0.8), ("griffin", 0.6), ("dart", 0.3)) for task in ("arc", "boolq")
]
ROUNDED = choices(0.8, method="dense", read=0.281, ffn_bits="4")
KNOWS = choices(0.79, method="oracle")
KNOWS.settings["upper_bound"] = True
CALIBRATED = {"calibration": "a text", "calibration_tokens": 512}
ONE, FIRST = [("dense", "")], ("dense on 4 bits", "")


@pytest.mark.parametrize(("records", "blocks"), [
    # Rows that ran on other tasks stand in a block of their own, beside all others that ran them: or a row could be
    # called best that is not.
    ([*TWO_TASKS, choices(0.79, "arc", "random")],
     [[ONE, [("griffin", "*"), ("dart", "")]], [ONE, [("random", "*"), ("griffin", ""), ("dart", "")]]]),
    # So do rows of other scopes, beside one dense; dense in two scopes is one row.
    ([DENSE, choices(0.5), choices(0.2, method="random"), choices(0.78, scope="last"),
      choices(0.6, method="random", scope="last"), ROUNDED],
     [[ONE, [FIRST, (f"griffin (scope={s})", "*"), (f"random (scope={s})", "")]] for s in ("scored", "last")]),
    ([DENSE, choices(0.8, method="dense", scope="all"), choices(0.5)], [[ONE, [("griffin", "")]]]),
    ([*TWO_TASKS[:2], choices(0.7, "arc", "dart", scope="last"), choices(0.4, "boolq", "dart")],
     [[ONE, [("dart", "")]]] * 2),
    # And rows of other documents: as far as their values go the one with fewer documents would lead.
    ([choices(0.9, method="dense", limit=100), choices(0.85, method="dart", limit=100),
      choices(0.8, method="dense", limit=200), choices(0.5, limit=200)],
     [[[("dense (limit=200)", "")], [("griffin (limit=200)", "")]],
      [[("dense (limit=100)", "")], [("dart (limit=100)", "")]]]),
    # Upper bounds are never best.
    ([DENSE, KNOWS, choices(0.5), choices(0.2, method="random")],
     [[ONE, [("oracle", ""), ("griffin", "*"), ("random", "")]]]),
    # A mean over seeds is not called by one of them: griffin ran under 0 and 1, dart under 2 and 3.
    ([*(choices(0.8, method="dense", seed=seed) for seed in range(4)),
      *(choices(0.6 + 0.1 * (s > 1), method="dart" if s > 1 else "griffin", seed=s) for s in range(4))],
     [[ONE, [("dart", "*"), ("griffin", "")]]]),
    # Cells of other calibrations have other masks: none is an older run of another, or its other seed.
    ([choices(0.8, method="dense", calibration=None),
      *(choices(s, method="flap", **CALIBRATED, calibration_seed=i, created=f"2026-0{i + 1}-01")
        for i, s in enumerate((0.7, 0.3)))],
     [[ONE, [("flap (calibration_seed=0)", "*"), ("flap (calibration_seed=1)", "")]]]),
    # Cells of several versions keep their names: nothing but the code differs, and a field that an older one lacked.
    ([*(choices(0.8, task, "dense", code="old") for task in ("arc", "piqa")),
      choices(0.5, "arc", params={"choice": "none"}, code="old"),
      choices(0.6, "piqa", params={"choice": "none", "routing": "own"}, code="new")], [[ONE, [("griffin", "")]]]),
])  # fmt: skip
def test_rows_stand_in_blocks_and_under_names_of_their_own(tmp_path, records, blocks):
    made = board_of(tmp_path, *records)
    assert [places(made, i) for i in range(len(made.blocks))] == blocks


def test_a_share_has_no_value_where_dense_only_guesses_and_few_questions_say_nothing_of_guessing(tmp_path):
    made = board_of(tmp_path / "a", choices(0.25, method="dense"), choices(0.3), choices(0.2, method="random"))
    assert all(row.quality["acc"].share is None for row in made.blocks[0].rows if row.keys)
    few = [choosing(answered("arc", [{"acc": 1.0}] * 5, m, 0.5 * (m != "dense"))) for m in ("dense", "dart")]
    assert board_of(tmp_path / "b", *few).blocks[0].at_chance == ()


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


def test_rows_are_held_against_the_dense_model_that_is_not_rounded(tmp_path):
    rounded = choices(0.7, method="dense", read=0.281, ffn_bits="4")
    alone = board_of(tmp_path / "a", rounded, choices(0.6, ffn_bits="4"))
    assert all(r.quality["acc"].share is None for r in alone.blocks[0].rows)
    assert any("no dense cell for arc" in note for note in alone.notes)
    both = board_of(tmp_path / "b", rounded, choices(0.8, method="dense"), choices(0.6, read=0.08, ffn_bits="4"))
    of = (EASY < 0.8).mean() - 0.25
    assert {r.label: above(r) for r in both.blocks[0].rows if r.keys} == pytest.approx(
        {"dense": 1, "dense on 4 bits": ((EASY < 0.7).mean() - 0.25) / of,
         "griffin on 4 bits": ((EASY < 0.6).mean() - 0.25) / of}
    )  # fmt: skip


def test_other_prompts_are_not_held_against_each_other_and_the_last_run_of_a_cell_counts(tmp_path):
    other = choices(0.5)
    other.samples[3]["prompt_hash"] = "another"
    made = board_of(tmp_path / "a", choices(0.8, method="dense"), other)
    (note,) = made.notes
    assert "1 of 200 documents differ, or their prompts" in note
    old, new = choices(0.2, created="2026-01-01", code="old"), choices(0.6, created="2026-02-01", code="new")
    made = board_of(tmp_path / "b", choices(0.8, method="dense", code="new"), old, new)
    assert made.blocks[0].levels[1][0].keys == (new.key,) and "1 older run" in made.notes[0]


def test_a_board_of_some_tasks_holds_rows_against_each_other_that_ran_on_these(tmp_path):
    records = [choices(0.8, task, "dense") for task in ("arc_easy", "boolq")]
    records += [choices(0.6, "arc_easy", "griffin"), choices(0.7, "arc_easy", "dart"), choices(0.5, "boolq", "griffin")]
    shown = command("tables", save(tmp_path, *records), "--tasks", "arc").out  # for arc_easy and arc_challenge
    assert "boolq" not in shown and "dart" in shown


def test_reads_that_are_about_are_marked_and_no_test_is_made_at_equal_reads(tmp_path):
    rows = [choices(0.8, method="dense"), choices(0.75, method="dart"), choices(0.3)]
    assert places(board_of(tmp_path / "exact", *rows))[1] == [("dart", "*"), ("griffin", "")]
    rows = [dataclasses.replace(row, settings={**row.settings, "about": True}) for row in rows]
    made = board_of(tmp_path / "about", *rows)
    assert places(made)[1] == [("dart", ""), ("griffin", "")] and rows_of(made)[2]["FFN bytes read"] == "≈30 %"


def test_the_board_of_a_run_has_the_folders_dense_cells(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = [choices(0.5, sparsity=0.5, params={"draw": "seed"}), choices(0.4, "piqa", method="flap", params={})]
    old = [choices(0.8, method="dense", params={}), choices(0.6, sparsity=0.5, params={"draw": "best"})]
    save(tmp_path / "out", *old, *new)
    show_results(Store("out"), new)
    shown = capsys.readouterr().out
    assert "  dense  " in shown and "no dense cell for piqa" in " ".join(shown.split())


def test_measured_speed_stands_beside_its_row(tmp_path):
    pruned, of = choices(0.5), choices(0.5).inputs
    ratio = Ratio(1.523, 1.5, 1.6, 30)
    speed = speeds.Speed(of["params"], 0.7, of["model"], "float32", "cpu", "2 threads", None, ratio, "2026-01-01")
    other = choices(0.4, method="random", params={"seed": 1})
    made = board_of(tmp_path, DENSE, pruned, other, speeds=[speed])
    assert {row.label: row.speed for row in made.rows if row.speed} == {"griffin": speed}


def test_a_run_that_is_repeated_does_not_make_a_family_larger(tmp_path):
    """p_holm is over the tasks of a method and metric, each counted once."""
    runs = [("arc", "2026-01-01"), ("piqa", "2026-01-01"), ("arc", "2026-01-02")]
    cells = [choices(s, task, method, created=created, versions={"torch": created})
             for task, created in runs for s, method in ((0.6, "dense"), (0.45, "griffin"))]  # fmt: skip
    store = Store(save(tmp_path / "twice", *cells))
    lines = frame.lines(store, store.load())
    again = lines[(lines["method"] == "griffin") & (lines["metric"] == "acc")]
    assert len(again) == 3 and again["p_holm"].tolist() == pytest.approx((2 * again["p"]).tolist())


def test_a_level_keeps_or_leaves_whole_rows(tmp_path):
    """A method whose tasks read .28 and .46 reads .37, and is not about .30 on one of them."""
    cells = [choices(0.8, task, "dense") for task in ("arc", "sciq")]
    cells += [choices(s, task, sparsity=1 - s) for task in ("arc", "sciq") for s in (0.3, 0.5)]
    cells += [choices(0.7, task, "top-p", read=read) for task, read in (("arc", 0.28), ("sciq", 0.46))]
    made = board_of(tmp_path, *cells)
    (table,) = tables.board_tables([made], 0.3)
    assert [row[2] for row in table.body] == ["dense", GUESSING, "griffin"]
    with pytest.raises(UserError) as refused:
        tables.board_tables([made], 0.9)
    assert "0.3" in refused.value.remedy


def test_several_seeds_are_one_row_with_their_mean(tmp_path):
    """Of the run, and of parts that took the run's seed; a part with a seed of its own is another row."""

    def drawn(share, seed, own=None):
        return choices(share, method="random", seed=seed, params={"score.seed": seed if own is None else own})

    dense = [choices(0.8, method="dense", seed=seed) for seed in (0, 1)]
    made = board_of(tmp_path, *dense, drawn(0.4, 0), drawn(0.5, 1), drawn(0.6, 0, own=7))
    labels = sorted(row.label for row in made.blocks[0].rows if row.keys)
    assert labels == ["dense", "random:score.seed=0", "random:score.seed=7"]
    (row,) = [row for row in made.blocks[0].rows if row.label.endswith("=0")]
    shares = [np.mean([(s > EASY).mean() for s in some]) for some in ((0.4, 0.5), (0.8, 0.8))]
    assert row.quality["acc"].value == pytest.approx(shares[0])
    assert above(row) == pytest.approx((shares[0] - 0.25) / (shares[1] - 0.25))
    assert any("seeds 0, 1" in note for note in made.notes)
    costs = [dataclasses.replace(choices(0.5, read=read, seed=seed), flops={"overhead_share": share})
             for seed, (read, share) in enumerate(((0.3, 0.1), (0.4, 0.3)))]  # fmt: skip
    (row,) = board_of(tmp_path / "b", *dense, *costs).blocks[0].levels[1]
    assert (row.read, row.overhead) == pytest.approx((0.35, 0.2))


def test_rows_that_are_paired_with_dense_and_others_have_one_scale(tmp_path):
    """Griffin's questions are others than dense's, so that it has an accuracy and no difference from dense's."""
    unpaired = choices(0.3)
    unpaired.samples[:] = [{**s, "doc_hash": "another"} for s in unpaired.samples]
    made = board_of(tmp_path, DENSE, choices(0.78, method="dart"), unpaired)
    assert [r for r, _ in places(made)[1]] == ["dart", "griffin"]
    row = made.blocks[0].levels[1][1]
    assert row.quality["acc"].value == (EASY < 0.3).mean() and row.quality["acc"].better is None


def test_two_perplexities_have_columns_of_their_own(tmp_path):
    """LAMBADA's perplexity beside that of a text's words: both titles are `perplexity`."""
    for method, sparsity, times, more in (("dense", 0.0, 1.0, 1.0), ("griffin", 0.5, 1.5, 1.1)):
        values = [{"perplexity": -times * (2 + i % 3), "acc": 1.0} for i in range(30)]
        found = (("perplexity", float(np.exp(times * 3)), 0.1, 30, False), ("acc", 1.0, 0.1, 30, True))
        text = [{"word_perplexity": [-more * (90.0 + i % 3), 60]} for i in range(60)]
        save(tmp_path, answered("wikitext", text, method, sparsity, up=False),
             answered("lambada", values, method, sparsity, metrics=[Metric("lambada", *m) for m in found]))  # fmt: skip
    shown = command("tables", tmp_path, "--metric", "perplexity", "--format", "md").out
    heads, row = (next(line for line in shown.splitlines() if name in line) for name in ("FFN bytes", "griffin"))
    assert row.count("4.48x") == 1 and row.count("1.16x") == 1 and " word_perplexity" in heads


def test_a_metric_that_is_asked_for_is_that_of_the_first_filter_or_of_the_one_named(tmp_path):
    def gsm(method, sparsity, **means):
        sides = {f: [{"exact_match": float(i % 10 < 10 * v)} for i in range(60)] for f, v in means.items()}
        ms = [Metric("gsm", "exact_match", v, 0.05, 60, True, filter=f) for f, v in means.items()]
        lines = [s for f, values in sides.items() for s in samples("gsm", values, filter_=f)]
        return answered("gsm", sides["strict"], method, sparsity, lines=lines, metrics=ms)

    folder = save(tmp_path, gsm("dense", 0.0, strict=0.6, flexible=0.8), gsm("griffin", 0.5, strict=0.3, flexible=0.5))
    assert command("tables", folder, "--metric", "exact_match").out == command("tables", folder).out
    assert "| 50.0 ±5.0" in command("tables", folder, "--metric", "exact_match,flexible", "--format", "md").out


def test_a_distance_over_other_tasks_is_no_rival(tmp_path):
    """KL was measured on one task under griffin, on another one under dart."""

    def measured(task, method, kl=None):
        values = [{"acc": float(e < 0.6), **({} if kl is None else {"kl": [10 * kl, 10]})} for e in EASY]
        return choosing(answered(task, values, method, 0.7))

    cells = [choices(0.8, task, "dense") for task in ("arc", "piqa")]
    cells += [measured("arc", "griffin", 0.2), measured("piqa", "griffin")]
    cells += [measured("arc", "dart"), measured("piqa", "dart", 2.0)]
    made = board_of(tmp_path, *cells)
    assert all(row.kl is None for block in made.blocks for row in block.rows)


# -- what is best at equal reads: beyond noise and beyond what matters; of equals the cheaper -------------------------


def verdict_of(board, level=1):
    return verdicts(board.blocks[0])[level]


def words_of(board, level=1):
    """Where each pruned row stands beside the leader."""
    judged = verdict_of(board, level)
    return {judged.leader.label: "leader", **{row.label: word for row, word in judged.stands.items()}}


def likely(falls, right_of=20, n=30):
    """Methods with the same right answers but for one, whose log-likelihoods fell by so many nats."""
    drawn = np.random.default_rng(3).normal(0, 0.3, (len(falls), n))
    records = []
    for i, (method, fall) in enumerate(falls.items()):
        values = [{"acc": float(j < right_of + i % 2), "gold_ll": -5 - fall + drawn[i, j]} for j in range(n)]
        records.append(choosing(answered("arc", values, method, 0.0 if method == "dense" else 0.5)))
    return records


def texts(changes, n=100):
    """A text's cells whose log-likelihood a word is lower than dense's by so much, at each method's work."""
    generator = np.random.default_rng(1)
    base = generator.normal(-3, 0.5, n)
    records = []
    for method, (loss, overhead) in changes.items():
        small = 0.0 if method == "dense" else generator.normal(0, 1e-4, n)
        values = [{"word_perplexity": [100 * x, 100]} for x in (base - loss + small).tolist()]
        record = answered("wiki", values, method, 0.0 if method == "dense" else 0.5, up=False)
        records.append(dataclasses.replace(record, flops={"overhead_share": overhead}))
    return records


@pytest.mark.parametrize(("lead", "word", "take"), [
    (0.8 * MATTERS, TIED, "griffin"), (1.5 * MATTERS, BEHIND, "dart"), (0.0, TIED, "griffin"),
])  # fmt: skip
def test_a_lead_counts_beyond_noise_and_beyond_what_matters(tmp_path, lead, word, take):
    """Noise of 1e-5 nats a word, so that each lead is beyond noise; griffin adds less work than dart."""
    made = board_of(tmp_path, *texts({"dense": (0, 0), "dart": (0.1, 0.2), "griffin": (0.1 + lead, 0.1)}))
    judged = verdict_of(made)
    better = judged.leader.quality["word_perplexity"].better
    assert abs(better.value + 0.1) < 1e-3 and better.stderr < 1e-4
    assert [*judged.stands.values()] == [word] and judged.take.label == take
    assert (judged.best is None) == (word == TIED)
    assert [mark for _, mark in places(made)[1]] == (["*", ""] if word == BEHIND else ["", ""])


def test_of_rows_that_are_tied_the_one_with_less_memory_is_named_if_they_work_alike(tmp_path):
    sizes = {"dense": 0, "dart": 5_000, "griffin": 3_000}
    records = [
        dataclasses.replace(r, memory={"weights": 1, "beside": sizes[r.inputs["method"]], "state": 1})
        for r in texts({"dense": (0, 0), "dart": (0.1, 0.1), "griffin": (0.1, 0.1)})
    ]
    assert verdict_of(board_of(tmp_path, *records)).take.label == "griffin"


def lead_of(value, spread, n=40):
    slopes = np.random.default_rng(0).normal(0, spread / np.sqrt(n), n)
    return Estimate(value, {str(i): s for i, s in enumerate(slopes - slopes.mean())})


def test_the_p_of_a_lead_is_of_what_lies_beyond_what_matters():
    """A lead of MATTERS and a margin is tested as that margin against 0, on both sides; a smaller one has p 1."""
    for sign in (1, -1):
        lead = lead_of(sign * (MATTERS + 0.02), 0.01)
        assert board._p(lead) == dataclasses.replace(lead, value=sign * 0.02).p
        assert board._p(lead_of(sign * 0.9 * MATTERS, 1e-6)) == 1.0
    few = Estimate(0.001, {str(i): 0.0 for i in range(stats.MIN_CLUSTERS - 1)})
    assert board._p(few) is None
    assert board._p(lead_of(float("nan"), 1.0)) is board._p(lead_of(float("inf"), 1.0)) is None


def test_the_best_pays_for_having_been_chosen_among_many(tmp_path):
    """Six methods that are equal but for luck: none is best, and no mark says so."""
    drawn = [answered("arc", right(0.5, n=80, seed=s), "griffin", params={"score.seed": s}) for s in range(6)]
    made = board_of(tmp_path, answered("arc", right(0.5, n=80, seed=99), "dense", 0.0), *drawn)
    (level,) = [level for level in places(made) if len(level) > 2]
    assert {mark for _, mark in level} == {""} and len(verdict_of(made).of(TIED)) == 5


@pytest.mark.parametrize(("p", "best"), [(0.02, False), (0.01, True)])
def test_each_p_counts_for_all_pairs_that_could_have_been_chosen(tmp_path, monkeypatch, p, best):
    """Of three rows p counts 3 / 2 times, and Holm doubles the smaller of two: .02 becomes .06, and .01 .03."""
    monkeypatch.setattr(board, "_p", lambda lead: p)
    pruned = [choices(s, method=m) for m, s in (("griffin", 0.6), ("dart", 0.5), ("random", 0.4))]
    made = board_of(tmp_path, choices(0.8, method="dense"), *pruned)
    assert (verdict_of(made).best is not None) == best
    assert [mark for _, mark in places(made)[1]] == (["*", "", ""] if best else ["", "", ""])


@pytest.mark.slow
def test_however_many_rows_a_clear_lead_is_told(tmp_path):
    """No resample gives less than 1 / 10001, which hundreds of tests would make .05 and more."""
    rows = [choices(0.75, method="dart"), *(choices(0.3, params={"draw": str(i)}) for i in range(30))]
    assert verdict_of(board_of(tmp_path, choices(0.8, method="dense"), *rows)).best.label == "dart"


@pytest.mark.parametrize(("griffin", "dart", "marked"), [
    (1.0, 2.0, [("griffin", "*"), ("dart", "")]),
    # griffin has one answer more, which is noise, and is a nat worse in every answer.
    (2.0, 1.0, [("griffin", ""), ("dart", "*")]),
])  # fmt: skip
def test_log_likelihoods_tell_apart_what_few_answers_do_not(tmp_path, griffin, dart, marked):
    made = board_of(tmp_path, *likely({"dense": 0.0, "griffin": griffin, "dart": dart}))
    assert places(made)[1] == marked and [*verdict_of(made).stands.values()] == [BEHIND]
    assert verdict_of(made).leader.label == ("griffin" if griffin < dart else "dart")


def test_no_row_is_best_where_each_of_two_is_ahead_in_a_metric(tmp_path):
    dense, griffin = likely({"dense": 0.0, "griffin": 3.0}, 150, 200)
    golds = [s["metrics"]["gold_ll"] + 2 + 0.1 * (j % 3) for j, s in enumerate(griffin.samples)]
    values = [{"acc": float(j < 90), "gold_ll": gold} for j, gold in enumerate(golds)]
    made = board_of(tmp_path, dense, griffin, choosing(answered("arc", values, "dart", 0.5)))
    assert places(made)[1] == [("griffin", ""), ("dart", "")]
    judged = verdict_of(made)
    assert [*judged.stands.values()] == [SPLIT] and judged.best is None


@pytest.mark.parametrize(("share", "word", "take"), [
    (0.78, AHEAD, "dense on 4 bits"), (0.603, TIED, "griffin"), (0.3, BEHIND, "griffin"),
])  # fmt: skip
def test_the_best_rounding_that_reads_no_more_stands_beside_the_leader(tmp_path, share, word, take):
    rounded = choices(share, method="dense", read=0.281, ffn_bits="4")
    first = choices(0.2, method="rounding", read=0.29)
    first.settings["granularity"] = "last bits"
    made = board_of(tmp_path, choices(0.8, method="dense"), choices(0.6), rounded, first)
    kinds = {r.label: r.kind for r in made.blocks[0].levels[-1]}
    assert kinds == {"griffin": "pruned", "dense on 4 bits": "rounding", "rounding": "rounding"}
    judged = verdict_of(made)
    assert (judged.control[0].label, judged.control[1], judged.take.label) == ("dense on 4 bits", word, take)


def test_rounding_that_reads_more_takes_no_part_and_that_of_a_lower_level_does(tmp_path):
    dense, at_half = choices(0.8, method="dense"), choices(0.6, sparsity=0.5)
    better, more = [choices(s, method="dense", read=r, ffn_bits=b) for s, r, b in ((0.7, 0.41, "6"), (0.79, 0.53, "8"))]
    worse = choices(0.3, method="dense", read=0.28, ffn_bits="4")
    made = board_of(tmp_path / "a", dense, at_half, better, worse, more)
    (judged,) = [one for one in verdicts(made.blocks[0]) if one]
    assert (judged.control[0].label, judged.control[1]) == ("dense on 6 bits", AHEAD)
    alone = board_of(tmp_path / "b", dense, at_half, more)
    (judged,) = [one for one in verdicts(alone.blocks[0]) if one]
    assert judged.control is None


def test_a_row_with_the_same_answers_is_tied(tmp_path):
    """Re-masks that no alarm called for: no document differs, so there is nothing to test by."""
    dense, best = choices(0.9, method="dense"), choices(0.8, method="dart", params={"remask": "drift"})
    twin, other = choices(0.8, method="dart", params={"remask": "off"}), choices(0.4)
    made = board_of(tmp_path, dense, best, twin, other)
    assert [*words_of(made).values()] == ["leader", TIED, BEHIND]
    assert verdict_of(made).best is None and [mark for _, mark in places(made)[1]] == ["~", "~", ""]


def test_rows_that_were_not_tested_are_not_called_tied(tmp_path):
    """Five documents are too few units, alone and beside texts that do not differ."""
    few = [choosing(answered("arc", [{"acc": float(i % 3 > 0) * keep} for i in range(5)], m, s))
           for m, s, keep in (("dense", 0.0, 1), ("dart", 0.5, 1), ("griffin", 0.5, 0))]  # fmt: skip
    for name, same in {"alone": [], "beside": texts({"dense": (0, 0), "dart": (0.1, 0), "griffin": (0.1, 0)})}.items():
        assert words_of(board_of(tmp_path / name, *few, *same)) == {"dart": "leader", "griffin": UNTESTED}
