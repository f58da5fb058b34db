"""Speeds beside results: what was kept is read back, the right cells find theirs, and what is damaged is named."""

import dataclasses
import json
import subprocess
import sys

import pytest

from dart_eval.results import speeds
from dart_eval.results.ratio import Ratio
from dart_eval.util.errors import UserError

MODEL = {"name": "tiny", "revision": None, "weights": "f00d"}
PARAMS = {"mask": "prompt", "remask": "drift", "remask.window": 8}
SPEED = speeds.Speed(
    "griffin:remask=drift", PARAMS, 0.7, MODEL, "bfloat16", "cpu", "2 threads", None, 128, 0.3,
    Ratio(1.7, 1.6, 1.8, 75), Ratio(1.0, 0.97, 1.03, 75), 1.84, "2026-01-02T00:00:00+00:00",
    {"overhead": {"median": 0.02}, "state_bytes": 5}, {"torch": "2.9"},
)  # fmt: skip


def speed(**changes):
    return dataclasses.replace(SPEED, **changes)


def test_what_was_kept_is_read_back_oldest_first(tmp_path):
    assert speeds.load_speeds(tmp_path) == speeds.load_speeds(tmp_path / "none") == []
    earlier = speed(sparsity=0.5, created="2026-01-01T00:00:00+00:00", method="a/b:c=d")
    untimed = speed(speedup=None, control=None, times="bytes only", created="2026-02-01", sparsity=0.4)
    for one in (SPEED, untimed, earlier):
        path = speeds.keep(tmp_path, one)
        assert path.parent == tmp_path / "bench"
    assert path.name.startswith("decode-a_b-0.5-")
    assert speeds.load_speeds(tmp_path) == [earlier, SPEED, untimed]


def test_measured_again_it_replaces_what_was_there(tmp_path):
    speeds.keep(tmp_path, SPEED)
    again = speed(speedup=Ratio(1.5, 1.4, 1.6, 75), created="2026-01-03", environment={"torch": "3.0"})
    speeds.keep(tmp_path, again)
    assert speeds.load_speeds(tmp_path) == [again]
    for change in ({"hardware": "4 threads"}, {"compiled": "default"}, {"prompt_tokens": 1024}, {"dtype": "float32"}):
        speeds.keep(tmp_path, speed(**change))
    assert len(speeds.load_speeds(tmp_path)) == 5


@pytest.mark.parametrize(("change", "fits"), [
    ({}, True), ({"device": "cuda"}, True), ({"model": {**MODEL, "name": "other"}}, True),
    ({"model": {**MODEL, "weights": "beef"}}, False), ({"params": {**PARAMS, "remask.window": 9}}, False),
    ({"params": {**PARAMS, "routing": "own"}}, True),  # as older versions did, which had no such part
    ({"params": {**PARAMS, "routing": "fewer"}}, False), ({"sparsity": 0.5}, False),
    ({"dtype": "float32"}, False), ({"model": {**MODEL, "weights": None}}, False),
])  # fmt: skip
def test_a_speed_belongs_to_cells_of_its_method_and_model(change, fits):
    inputs = {"model": MODEL, "params": PARAMS, "sparsity": 0.7, "dtype": "bfloat16", "device": "cpu", "task": "arc"}
    assert SPEED.is_of(inputs | change) == fits


def test_a_cell_gets_what_was_measured_last_and_the_words_only_where_nothing_was():
    inputs = {"model": MODEL, "params": PARAMS, "sparsity": 0.7, "dtype": "bfloat16"}
    words = speed(speedup=None, control=None, times="bytes only", device="cuda", created="2026-01-09")
    older, newer = SPEED, speed(hardware="4 threads")
    assert speeds.of_cell([older, newer, words], inputs) is newer
    assert speeds.of_cell([words], inputs) is words and speeds.of_cell([words], inputs | {"sparsity": 0.5}) is None


def test_a_damaged_file_is_named_and_left_out(tmp_path, capsys):
    other = speeds.keep(tmp_path, speed(sparsity=0.5))
    data = json.loads(speeds.keep(tmp_path, SPEED).read_text())
    for text, why in (
        ("{", "Invalid JSON"), ("[]", "file is []"), (json.dumps({**data, "schema": 2}), "schema is 2: should be 1"),
        (json.dumps({**data, "speedup": 1.7}), "speed.speedup is 1.7: should be an object"),
        (json.dumps({k: v for k, v in data.items() if k != "ceiling"}), "lacks 'ceiling'"),
    ):  # fmt: skip
        other.write_text(text)
        assert speeds.load_speeds(tmp_path) == [SPEED]
        said = capsys.readouterr().err
        assert said.startswith(f"note: left out: {other} cannot be read (") and why in said


def test_a_folder_that_takes_no_file_is_refused_beforehand(tmp_path):
    (tmp_path / "bench").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        speeds.check_folder(tmp_path)
    speeds.check_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.process
def test_reading_needs_no_torch():
    code = (
        "import sys; from dart_eval.results import speeds; speeds.load_speeds('none'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
