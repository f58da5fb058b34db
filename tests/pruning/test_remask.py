"""Re-masks of some sequences of a batch, by hand; shared masks; where a block must end."""

import pytest
import torch

from dart_eval.kernels.top import top_k_mask
from tests.helpers.sessions import state_of

# A detector that flags every window of two tokens.
FLAGGED = {
    "remask.window": 2, "remask.sigma": -1000.0, "remask.floor": -3.0, "remask.patience": 1, "remask.cooldown": 0,
    "remask.min_windows": 1, "remask.ring": 9,
}  # fmt: skip
FIRST, SECOND = torch.tensor([True, False]), torch.tensor([False, True])


class Observed:
    """A state of two sequences and all that it was shown: `h` [2, T, F] and inputs `x` [2, T, D] of each layer."""

    def __init__(self, model, params, tokens=6, shared=False, lengths=()):
        torch.manual_seed(0)
        self.state = state_of("dart", model, batch=2, shared=shared, **{"allocation": "uniform", **params})
        self.ffns, self.remasking = self.state.ffns, self.state.remasking
        self.h = [torch.zeros(2, 0, f.size) for f in self.ffns]
        self.x = [torch.zeros(2, 0, f.width) for f in self.ffns]
        self.context(tokens, lengths)

    def context(self, tokens, lengths=()):
        valid = torch.arange(tokens) >= tokens - torch.tensor(lengths or (tokens, tokens))[:, None]
        for i, ffn in enumerate(self.ffns):
            h, x = torch.randn(2, tokens, ffn.size), torch.randn(2, tokens, ffn.width)
            y, z = torch.randn(2, tokens, 32), torch.randn(2, tokens, 32)
            self.state.observe(i, h, valid)
            self.state.observe_change(i, y, z * (1 + i * torch.tensor([1.0, -0.3])[:, None, None]), valid)
            self.remasking.observe_input(i, x, valid)
            self.h[i], self.x[i] = torch.cat([self.h[i], h], 1), torch.cat([self.x[i], x], 1)
        self.state.observe_attention(torch.randn(2, tokens, 32), valid)
        self.state.finish_context(valid)

    def decode(self, tokens=1, attention=None, ended=False):
        """A forward; ended: the second sequence is not in it. Returns what the FFNs took and the changes."""
        valid = torch.ones(2, tokens, dtype=torch.bool)
        valid[1] = not ended
        taken = []
        for i, ffn in enumerate(self.ffns):
            self.remasking.observe_input(i, torch.randn(2, tokens, ffn.width), valid)
            taken.append(torch.randn(2, tokens, ffn.size))
            self.state.prune(i, taken[i], valid)
        attention = torch.randn(2, tokens, 32) if attention is None else attention
        return taken, self.state.finish_decode(attention if self.remasking.detector else None, valid)


def test_a_re_mask_of_one_sequence_takes_its_own_counts_and_what_its_ring_holds(llama):
    """Six inputs in a ring of nine: the mean is over six. The overlap is the share of the old mask that stays."""
    seen = Observed(llama.float(), {**FLAGGED, "allocation": "depth", "remask.blend": 0.25})
    before, keep = [m.clone() for m in seen.state.masks], seen.state.mask_counts.clone()
    assert keep[0].tolist() != keep[1].tolist()
    (change,) = seen.state.remask(SECOND)
    for i, ffn in enumerate(seen.ffns):
        recent = ffn.intermediate(seen.x[i][1]).square().mean(0)
        score = 0.25 * seen.h[i][1].square().mean(0) + 0.75 * recent
        assert torch.equal(seen.state.masks[i][1], top_k_mask(score[None], keep[1:, i])[0])
        assert torch.equal(seen.state.masks[i][0], before[i][0])
        stays = (seen.state.masks[i][1] & before[i][1]).sum() / before[i][1].sum()
        assert change.overlap[i] == pytest.approx(float(stays))
    assert min(change.overlap) < 1


def test_a_shared_mask_is_made_from_the_mean_of_all_sequences_whatever_their_length(llama):
    seen = Observed(llama.float(), FLAGGED, shared=True, lengths=(6, 2))
    for i in range(3):
        score = seen.h[i][0].square().mean(0) + seen.h[i][1, 4:].square().mean(0)
        assert torch.equal(seen.state.masks[i], top_k_mask(score[None], torch.tensor([20])).expand(2, -1))


def test_dense_tokens_make_a_mask_on_their_own_each_time(llama):
    """Alarms after tokens 2 and 6; tokens 3 to 5 and 7 to 9 run dense, and windows that end meanwhile do not count."""
    seen = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": 3, "remask.blend": 0.0})
    taken = []
    for token in range(1, 10):
        h, changes = seen.decode()
        taken.append(h)
        assert seen.state.dense_now.tolist() == [token in (2, 3, 4, 6, 7, 8)] * 2
        assert len(changes) == 2 * (token in (5, 9))
        if changes:
            for i in range(3):
                score = torch.cat([h[i] for h in taken[-3:]], 1).square().mean(1)
                assert torch.equal(seen.state.masks[i], top_k_mask(score, torch.tensor([20, 20])))


def test_a_block_ends_where_the_first_sequence_stops_to_run_dense(llama):
    seen = Observed(llama.float(), {**FLAGGED, "remask.window": 9, "remask.dense_tokens": 8})
    seen.remasking.dense_left = torch.tensor([5, 3])
    assert seen.state.room() == 3


def test_a_turn_ends_what_was_to_run_dense(llama):
    seen = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": 3})
    seen.decode(2)
    assert seen.state.dense_now.tolist() == [True, True]
    seen.context(3)
    assert seen.state.dense_now.tolist() == [False, False]
    assert seen.state.step().read.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dense", [0, 3])
def test_an_alarm_of_one_sequence_is_that_of_all_that_share_its_mask(llama, dense):
    seen = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": dense}, shared=True)
    seen.remasking.detector.threshold = torch.tensor([2.0, -2.0])  # the first always drifts, the second never
    changes = seen.decode(2)[1]
    assert [c.sequence for c in changes] == ([] if dense else [0, 1])
    assert seen.remasking.dense_now.tolist() == [bool(dense)] * 2
    apart = Observed(llama.float(), {**FLAGGED, "remask.dense_tokens": dense})
    apart.remasking.detector.threshold = torch.tensor([2.0, -2.0])
    assert [c.sequence for c in apart.decode(2)[1]] == ([] if dense else [0])
    assert apart.remasking.dense_now.tolist() == [bool(dense), False]
