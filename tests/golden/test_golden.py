"""The numbers of the package are those of the file, in every case. `make golden` rewrites it and says what moved."""

import numpy as np
import pytest

from tests.golden import file
from tests.golden.cases import CONFIGS, SETTINGS, TEXTS
from tests.golden.measure import CASES


@pytest.fixture(scope="module")
def golden():
    return file.read()


# Of the fast lane is each method once, on the families in turn; its other settings have derivations there.
FIRST = {setting.method.partition(":")[0]: name for name, setting in reversed(SETTINGS.items())}
TURN = {f"{SETTINGS[name].families[i % len(SETTINGS[name].families)]}, {name}" for i, name in enumerate(FIRST.values())}
TURN |= {f"{family}, {name}, texts" for family, name in zip(CONFIGS, TEXTS, strict=False)}


@pytest.mark.parametrize(
    "case", [case if case in TURN else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_numbers_are_the_golden_ones(golden, case):
    moved = file.moved(golden[case], CASES[case]())
    assert not moved, f"{case}:\n{file.told(moved)}"


def test_every_line_of_the_file_is_a_case(golden):
    assert list(golden) == list(CASES)


BEFORE = {
    "sequences": [{"logits": np.array([[1.0, 2.0]]), "mask": np.array([True, False, True]), "text": [4, 5, 6]}],
    "cost": {"flops": 100, "share": 0.5},
    "detector": None,
}


CHANGES = [
    ({"sequences": [{**BEFORE["sequences"][0], "logits": np.array([[1.0, 2.5]])}]}, "sequences, logits", 1, 2, 0.5),
    ({"sequences": [{**BEFORE["sequences"][0], "mask": np.array([False, True, True])}]}, "sequences, mask", 2, 3, 1),
    ({"sequences": [{**BEFORE["sequences"][0], "text": [4, 5]}]}, "sequences, text", 1, 1, np.inf),
    ({"sequences": []}, "sequences", 1, 1, np.inf), ({"cost": {"flops": 101, "share": 0.5}}, "cost, flops", 1, 1, 1),
    ({"cost": {"flops": 100, "share": 0.5 + 1e-8}}, "cost, share", 1, 1, pytest.approx(1e-8)),
    ({"cost": {"flops": 100}}, "cost, share", 1, 1, np.inf),
    ({"detector": {"signal": [0.5]}}, "detector", 1, 1, np.inf),
    ({"copied": [{**BEFORE["sequences"][0], "text": [4, 5, 7]}]}, "copied, text", 1, 3, 1),
]  # fmt: skip


def test_what_moved_is_named_and_counted():
    for change, field, count, total, most in CHANGES:
        assert file.moved(BEFORE, {**BEFORE, **change}) == {field: file.Moved(count, total, most)}


def test_last_digits_of_sums_in_single_precision_may_move():
    near = {**BEFORE["sequences"][0], "logits": np.array([[1.0, 2.0 + 9e-6]])}
    assert not file.moved(BEFORE, {**BEFORE, "sequences": [near], "copied": [near]})
    assert file.moved(BEFORE, {**BEFORE, "sequences": [{**near, "logits": np.array([[np.nan, 2.0]])}]})


def test_the_file_gives_back_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(file, "FILE", tmp_path / "golden.json")
    mask, logits = np.arange(11) % 3 == 0, np.array([[1.5, -2.25]], np.float32)
    file.write({"a case": {"mask": mask, "logits": logits, "share": 1 / 3}, "another": {"text": [4, 5]}})
    found = file.read()
    assert not file.moved(found["a case"], {"mask": mask, "logits": logits, "share": 1 / 3})
    assert found["a case"]["mask"].tolist() == mask.tolist() and found["another"] == {"text": [4, 5]}
    assert len(file.FILE.read_text().splitlines()) == 2 + 2
