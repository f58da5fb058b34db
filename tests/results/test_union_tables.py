"""`tables --view batch`: its tables, its picture, and folders without a read at batch."""

import dataclasses

import pytest

from dart_eval.cli.report import report
from dart_eval.results.report import unions
from tests.helpers.commands import command
from tests.helpers.records import answered, right, save


def cell(method, reads, sparsity=0.5, **more):
    """A cell with these reads of 1, 2, 4 ... sequences; tokens read half of the way."""
    of = {"sequences": {str(2**i): (read, 0.01, 32 >> i) for i, read in enumerate(reads)}}
    of["tokens"] = {str(2**i): ((read + reads[0]) / 2, None, 1) for i, read in enumerate(reads)}
    made = answered(more.pop("task", "arc"), right(0.5), method, 0.0 if method == "dense" else sparsity, **more)
    return dataclasses.replace(made, weights_read=reads[0], read_at_batch=of if len(reads) > 1 else None)


CELLS = [cell("dense", [1.0] * 6), cell("griffin", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]), cell("griffin", [0.3] * 6, 0.7),
         cell("rounding", [0.53] * 6)]  # fmt: skip


def test_a_table_says_where_a_method_stops_paying(tmp_path):
    sequences, tokens = unions.tables(CELLS)
    assert sequences.columns == ["method", "1", "2", "4", "8", "16", "32", "8 bits at", "90 % at"]
    assert sequences.body == [
        ["dense", *["1.000"] * 6, "1", "1"],
        ["griffin", "0.500", "0.600", "0.700", "0.800", "0.900", "0.950", "2", "32"],
        ["griffin", *["0.300"] * 6, "-", "-"],
        ["rounding", *["0.530"] * 6, "-", "-"],
    ]
    assert "standard errors up to 0.010" in sequences.note and "Cells without" not in sequences.note
    assert tokens.body[1] == ["griffin", "0.500", "0.550", "0.600", "0.650", "0.700", "0.725", "2", "-"]
    other = cell("griffin", [0.4, 0.5])
    (table, _) = unions.tables([*CELLS, dataclasses.replace(other, inputs={**other.inputs, "task": "sciq"})])
    assert table.columns[:2] == ["task", "method"] and table.body[-1][:5] == ["sciq", "griffin", "0.400", "0.500", "-"]


def test_the_chart_has_a_line_a_row_with_a_method_in_one_colour():
    sequences, tokens = unions.charts(CELLS, {"rounding": 0})
    assert (sequences.title, sequences.note) == ("Read at batch B", "arc, % of the FFN bytes")
    assert [line.name for line in sequences.lines] == ["dense 100 %", "griffin 50 %", "griffin 30 %", "rounding 53 %"]
    assert (
        len({line.number for line in sequences.lines}) == 3 and sequences.lines[1].number == sequences.lines[2].number
    )
    heights = [line["at"] for line in sequences.laid()["lines"]]
    assert len({*heights}) == 4  # no name covers another
    point = sequences.lines[1].points[2]
    assert (point.x, point.value, point.low, point.high) == pytest.approx((2, 70, 68.04, 71.96))
    assert point.text == "griffin 50 %, 4 sequences: 70 %"
    assert [text for _, text in sequences.ticks] == ["1", "2", "4", "8", "16", "32"]
    assert tokens.laid()["axis"] == "tokens of a sequence in a step"


def test_old_records_are_named_and_a_folder_of_them_is_refused_in_a_line(tmp_path):
    old = cell("flap", [0.5])
    (table, _) = unions.tables([*CELLS, old])
    assert "Cells without it: 1 (run with --read-at-batch, and --force for finished cells;" in table.note
    folder = save(tmp_path / "old", old)
    for options in ([], ["--save", tmp_path / "batch.svg"]):
        done = command("tables", folder, "--view", "batch", *options)
        assert done.code == 2 and done.err.count("\n") == 1
        assert "has a read at batch" in done.err and "run with --read-at-batch" in done.err
    assert "Read at batch" not in command("tables", folder, "--view", "all").out


def test_the_view_its_picture_and_the_report(tmp_path):
    folder = save(tmp_path / "out", *CELLS)
    done = command("tables", folder, "--view", "batch")
    assert done.code == 0 and "### Read at batch B" in done.out and "### Read of k tokens" in done.out
    (row,) = (line for line in done.out.splitlines() if "0.950" in line)
    assert [cell.strip() for cell in row.split("|")[8:10]] == ["2", "32"]
    assert "Read at batch B" in command("tables", folder, "--view", "all").out
    picture = tmp_path / "batch.svg"
    assert command("tables", folder, "--view", "batch", "--save", picture).code == 0
    assert "sequences in a step" in picture.read_text()
    both = save(tmp_path / "both", *CELLS, cell("griffin", [0.5, 0.6], task="sciq"))
    done = command("tables", both, "--view", "batch", "--save", picture)
    assert done.code == 2 and done.err.endswith("has reads at batch of 2; add --tasks NAME\n")
    report(folder, None, None, 0)
    page = (folder / "report.html").read_text()
    assert page.count("griffin 50 %, 4 sequences: 70 %") == 1 and page.count("<summary>Read of k tokens") == 1
