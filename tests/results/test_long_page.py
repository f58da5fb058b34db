"""The page on long answers: what a re-mask gains is counted by hand here."""

import pytest

from scripts.long_page import gain


def line(kl, remasks=()):
    return {"kl": kl, "remasks": [*remasks], "alarms": [*remasks]}


def test_a_re_mask_gains_what_the_tokens_after_it_lose_less():
    never = {0: line([1.0, 1, 1, 1, 1]), 1: line([2.0, 2, 2]), 2: line([3.0, 3])}
    dart = {0: line([1.0, 0.5, 0.25, 1, 0], [1, 2]), 1: line([2.0, 2, 3], [2]), 2: line([9.0, 9])}
    near, count = gain(dart, never, 2)  # tokens 1 to 3 of the first answer, the last of the second
    assert count == 3 and near.value == pytest.approx((0.5 + 0.75 + 0 - 1) / 4)
    whole, _ = gain(dart, never, 1 << 30)
    assert whole.value == pytest.approx((0.5 + 0.75 + 0 + 1 - 1) / 5) and len(whole.units) == 2
    assert gain({2: dart[2]}, never, 2) is None  # no re-mask
