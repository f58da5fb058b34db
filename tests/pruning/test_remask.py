"""Re-masks of some sequences of a batch, by hand; shared masks; where a block must end."""

from types import SimpleNamespace

import pytest
import torch

from dart_eval.kernels.top import top_k_mask
from dart_eval.pruning.log import Log
from tests.helpers.sessions import rows_of

# A detector that flags every window of two tokens.
FLAGGED = {
    "remask.window": 2, "remask.sigma": -1000.0, "remask.floor": -3.0, "remask.patience": 1, "remask.cooldown": 0,
    "remask.min_windows": 1, "remask.ring": 9,
}  # fmt: skip
SECOND = torch.tensor([False, True])


class Observed:
    """Two sequences and all that their method was shown: `h` [2, T, F] and inputs `x` [2, T, D] of each layer."""

    def __init__(self, model, params, tokens=6, shared=False, lengths=()):
        torch.manual_seed(0)
        params = {"allocation": "uniform", **params}
        self.method, self.rows = rows_of("dart", model, batch=2, shared=shared, **params)
        self.ffns, self.watch, self.log = self.method.ffns, self.rows.watch, Log()
        self.h = [torch.zeros(2, 0, f.size) for f in self.ffns]
        self.x = [torch.zeros(2, 0, f.width) for f in self.ffns]
        self.context(tokens, lengths)

    def context(self, tokens, lengths=()):
        valid = torch.arange(tokens) >= tokens - torch.tensor(lengths or (tokens, tokens))[:, None]
        for i, ffn in enumerate(self.ffns):
            h, x = torch.randn(2, tokens, ffn.size), torch.randn(2, tokens, ffn.width)
            y, z = torch.randn(2, tokens, 32), torch.randn(2, tokens, 32)
            self.rows.sums[i] = self.method.add(self.rows.sums[i], ffn, h, valid)
            if self.rows.change is not None:
                self.rows.change.observe(i, y, z * (1 + i * torch.tensor([1.0, -0.3])[:, None, None]), valid)
            self.remember(i, x, valid)
            self.h[i], self.x[i] = torch.cat([self.h[i], h], 1), torch.cat([self.x[i], x], 1)
        self.watch.drift.observe(torch.randn(2, tokens, 32), valid)
        self.rows.seen = self.rows.seen + valid.sum(1)
        self.method.finish(self.rows, valid)

    def remember(self, layer, x, valid):
        if self.watch.ring is not None:
            self.watch.ring.write(layer, x, valid)

    def decode(self, tokens=1):
        """A forward. Returns what the FFNs took, and the sequences that it re-masked."""
        valid, taken, before = torch.ones(2, tokens, dtype=torch.bool), [], len(self.log.events)
        self.method.session = SimpleNamespace(going=valid)
        for i, ffn in enumerate(self.ffns):
            self.remember(i, torch.randn(2, tokens, ffn.width), valid)
            taken.append(torch.randn(2, tokens, ffn.size))
            self.method.decode(ffn, taken[i], self.rows)
        self.method.attention = torch.randn(2, tokens, 32)
        self.method.after(self.rows, valid, self.log)
        return taken, [event["sequence"] for event in self.log.events[before:]]


def test_a_re_mask_of_one_sequence_takes_its_own_counts_and_what_its_ring_holds(llama):
    """Six inputs in a ring of nine: the mean is over six. The overlap is the share of the old mask that stays."""
    seen = Observed(llama.float(), {**FLAGGED, "allocation": "depth", "remask.blend": 0.25})
    before, keep = [mask.clone() for mask in seen.rows.mask], seen.rows.counts[..., 0].clone()
    assert keep[0].tolist() != keep[1].tolist()
    overlaps = seen.method.make_masks(seen.rows, SECOND)
    for i, ffn in enumerate(seen.ffns):
        recent = ffn.intermediate(seen.x[i][1]).square().mean(0)
        score = 0.25 * seen.h[i][1].square().mean(0) + 0.75 * recent
        assert torch.equal(seen.rows.mask[i][1], top_k_mask(score[None], keep[1:, i])[0])
        assert torch.equal(seen.rows.mask[i][0], before[i][0])
        stays = (seen.rows.mask[i][1] & before[i][1]).sum() / before[i][1].sum()
        assert overlaps[i] == pytest.approx([float(stays)])
    assert min(overlaps) < [1]


def test_a_shared_mask_is_made_from_the_mean_of_all_sequences_whatever_their_length(llama):
    seen = Observed(llama.float(), FLAGGED, shared=True, lengths=(6, 2))
    for i in range(3):
        score = seen.h[i][0].square().mean(0) + seen.h[i][1, 4:].square().mean(0)
        assert torch.equal(seen.rows.mask[i], top_k_mask(score[None], torch.tensor([20])).expand(2, -1))


def test_dense_tokens_make_a_mask_on_their_own_each_time(llama):
    """Alarms after tokens 2 and 6; tokens 3 to 5 and 7 to 9 run dense, and windows that end meanwhile do not count."""
    seen = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": 3, "remask.blend": 0.0})
    taken = []
    for token in range(1, 10):
        h, remasked = seen.decode()
        taken.append(h)
        assert seen.watch.dense.tolist() == [token in (2, 3, 4, 6, 7, 8)] * 2
        assert remasked == [0, 1] * (token in (5, 9))
        if remasked:
            for i in range(3):
                score = torch.cat([h[i] for h in taken[-3:]], 1).square().mean(1)
                assert torch.equal(seen.rows.mask[i], top_k_mask(score, torch.tensor([20, 20])))


def test_a_block_ends_where_the_first_sequence_stops_to_run_dense(llama):
    seen = Observed(llama.float(), {**FLAGGED, "remask.window": 9, "remask.dense_tokens": 8})
    seen.watch.dense_left = torch.tensor([5, 3])
    assert seen.method.room(seen.rows) == 3


def test_a_turn_ends_what_was_to_run_dense(llama):
    seen = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": 3})
    seen.decode(2)
    assert seen.watch.dense.tolist() == [True, True]
    seen.context(3)
    assert seen.method.dense_now(seen.rows).tolist() == [False, False]
    assert seen.method.read(seen.rows).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dense", [0, 3])
def test_an_alarm_of_one_sequence_is_that_of_all_that_share_its_mask(llama, dense):
    seen = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": dense}, shared=True)
    seen.watch.drift.threshold = torch.tensor([2.0, -2.0])  # the first always drifts, the second never
    assert seen.decode(2)[1] == ([] if dense else [0, 1])
    assert seen.watch.dense.tolist() == [bool(dense)] * 2
    apart = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": dense})
    apart.watch.drift.threshold = torch.tensor([2.0, -2.0])
    assert apart.decode(2)[1] == ([] if dense else [0])
    assert apart.watch.dense.tolist() == [bool(dense), False]
