"""Speeds beside results: what was kept is read back, the right cells find theirs, and what is damaged is named."""

import dataclasses
import json
import subprocess
import sys

import pytest

from dart_eval.results import speeds
from dart_eval.results.speeds import Ratio
from tests.helpers.commands import command

MODEL = {"name": "tiny", "revision": None, "weights": "f00d"}
PARAMS = {"mask": "prompt", "remask": "drift", "remask.window": 8}
RATIO = {"median": 1.7, "low": 1.6, "high": 1.8, "n": 75}
SPEED = {
    "method": "griffin:remask=drift", "params": PARAMS, "sparsity": 0.7, "model": MODEL, "dtype": "bfloat16",
    "device": "cpu", "hardware": "2 threads", "compiled": None, "prompt_tokens": 128, "read": 0.3, "speedup": RATIO,
    "control": RATIO, "ceiling": 1.84, "created": "2026-01-02T00:00:00+00:00", "ffn_bits": None,
    "more": {"overhead": {"median": 0.02}, "state_bytes": 5}, "environment": {"torch": "2.9"},
}  # fmt: skip


def of(folder):
    """The moments of the speeds in a folder."""
    return [speed.created for speed in speeds.load_speeds(folder)]


def read(**changes):
    """A speed as boards read it."""
    known = {**SPEED, **changes, "speedup": Ratio(**RATIO) if changes.get("speedup", RATIO) else None}
    return speeds.Speed(**{field.name: known[field.name] for field in dataclasses.fields(speeds.Speed)[:-1]})


def test_what_was_kept_is_read_back_oldest_first(tmp_path):
    assert speeds.load_speeds(tmp_path) == speeds.load_speeds(tmp_path / "none") == []
    earlier = {"sparsity": 0.5, "created": "2026-01-01T00:00:00+00:00", "method": "a/b:c=d"}
    untimed = {"speedup": None, "control": None, "times": "bytes only", "created": "2026-02-01", "sparsity": 0.4}
    for changes in ({}, untimed, earlier):
        path = speeds.keep(tmp_path, {**SPEED, **changes})
        assert path.parent == tmp_path / "bench"
    assert path.name.startswith("decode-a_b-0.5-")
    assert speeds.load_speeds(tmp_path) == [read(**earlier), read(), read(**untimed)]
    assert json.loads(path.read_text()) == {**SPEED, **earlier, "schema": 1}


def test_measured_again_it_replaces_what_was_there(tmp_path):
    speeds.keep(tmp_path, SPEED)
    speeds.keep(tmp_path, {**SPEED, "created": "2026-01-03", "environment": {"torch": "3.0"}})
    assert of(tmp_path) == ["2026-01-03"]
    for change in (
        {"hardware": "4 threads"}, {"prompt_tokens": 1024}, {"dtype": "float32"}, {"ffn_bits": "4"},
    ):  # fmt: skip
        speeds.keep(tmp_path, {**SPEED, **change})
    assert len(speeds.load_speeds(tmp_path)) == 5


def test_a_file_has_the_name_that_its_earlier_measurement_had(tmp_path):
    names = [speeds.keep(tmp_path, {**SPEED, "ffn_bits": bits}).name for bits in (None, "4:128")]
    assert names == ["decode-griffin-0.7-ddd1d70bc5598fae.json", "decode-griffin-4-128bit-0.7-997e16a6e5de8c2e.json"]


@pytest.mark.parametrize(("change", "fits"), [
    ({}, True), ({"device": "cuda"}, True), ({"model": {**MODEL, "name": "other"}}, True),
    ({"model": {**MODEL, "weights": "beef"}}, False), ({"params": {**PARAMS, "remask.window": 9}}, False),
    ({"params": {**PARAMS, "routing": "own"}}, True),  # as older versions did, which had no such part
    ({"params": {**PARAMS, "routing": "fewer"}}, False), ({"sparsity": 0.5}, False),
    ({"dtype": "float32"}, False), ({"model": {**MODEL, "weights": None}}, False), ({"ffn_bits": "4"}, False),
])  # fmt: skip
def test_a_speed_belongs_to_cells_of_its_method_and_model(change, fits):
    inputs = {"model": MODEL, "params": PARAMS, "sparsity": 0.7, "dtype": "bfloat16", "device": "cpu", "task": "arc"}
    assert (speeds.of_cell([read()], inputs | change) is not None) == fits


def test_a_cell_gets_what_was_measured_last_and_the_words_only_where_nothing_was():
    inputs = {"model": MODEL, "params": PARAMS, "sparsity": 0.7, "dtype": "bfloat16"}
    words = read(speedup=None, device="cuda", created="2026-01-09")
    older, newer = read(), read(hardware="4 threads")
    assert speeds.of_cell([older, newer, words], inputs) is newer
    assert speeds.of_cell([words], inputs) is words and speeds.of_cell([words], inputs | {"sparsity": 0.5}) is None


def test_a_damaged_file_is_named_and_left_out(tmp_path, capsys):
    other = speeds.keep(tmp_path, {**SPEED, "sparsity": 0.5})
    data = json.loads(speeds.keep(tmp_path, SPEED).read_text())
    for text, why in (
        ("{", "Invalid JSON"), ("[]", "speed: Input should be an object"),
        (json.dumps({**data, "schema": 2}), "speed.schema: Input should be 1"),
        (json.dumps({**data, "speedup": 1.7}), "speed.speedup: Input should be an object"),
        (json.dumps({k: v for k, v in data.items() if k != "dtype"}), "speed.dtype: Field required"),
    ):  # fmt: skip
        other.write_text(text)
        assert speeds.load_speeds(tmp_path) == [read()]
        said = capsys.readouterr().err
        assert said.startswith(f"note: left out: {other} cannot be read (") and why in said


def test_a_folder_that_takes_no_file_is_refused_beforehand(tmp_path):
    (tmp_path / "bench").write_text("a file")
    done = command("bench", "decode", "--method", "griffin", "--output", tmp_path)
    assert done.code == 2 and "cannot be written" in done.err


@pytest.mark.process
def test_reading_needs_no_torch():
    code = (
        "import sys; from dart_eval.results import speeds; speeds.load_speeds('none'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
