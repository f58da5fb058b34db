"""An interrupt at any point of leaving `prune()`: the model is as it was, and the interrupt is raised."""

import sys

import pytest
import torch

from dart_eval.kernels import mask_rows
from dart_eval.layers.guard import GUARD
from dart_eval.pruning.session import cache, calls, execution, hooks, session
from tests.helpers.models import biased, random_tokens, shallow
from tests.helpers.sessions import RESTLESS, bits, decoded, hooked, open_session, same

FILES = {m.__file__ for m in (session, cache, calls, hooks, execution, mask_rows, torch.utils.hooks)}
# What leads there, instruction by instruction; all else every seventh line.
CLOSELY = {
    "prune", "detach", "_leave", "to_the_end", "remove", "release", "leave", "_drop", "watch_ffns", "restore", "whole"
}  # fmt: skip
STRIDE = 7


class Stopped(BaseException):
    """As the command line raises at a signal: no Exception, and no KeyboardInterrupt."""


class Interrupt:
    """Raises at the n-th point that is looked at."""

    def __init__(self, at, error):
        self.left, self.error, self.lines = at, error, 0

    def __call__(self, frame, event, _arg):
        code = frame.f_code
        if code.co_filename not in FILES:
            return None
        closely = code.co_name in CLOSELY
        frame.f_trace_opcodes = closely
        self.lines += event == "line"
        if event == "opcode" or (event == "line" and not closely and self.lines % STRIDE == 0):
            self.left -= 1
            if not self.left:
                raise self.error
        return self


def untouched(model, before):
    """The bits of the weights, no hook, no method of another."""
    left = any(vars(m).keys() & {"forward", "generate", "_apply", GUARD} for m in model.modules())
    return same(model, before) and not left and not hooked(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "error", "every"),
    [("dart-choice", KeyboardInterrupt(), 3), ("dart", Stopped(), 5)],
    ids=["Ctrl-C", "signal"],
)
def test_an_interrupt_anywhere_on_the_way_out(method, error, every):
    model = shallow(biased("llama"))
    before, at, wrong, left = bits(model), 0, [], 0
    tracing = sys.gettrace()
    while left <= 0:
        at += every
        interrupt, raised = Interrupt(at, error), None
        try:
            with open_session(model, method, 0.5, execution="copied", **RESTLESS) as run:
                decoded(model, run, [random_tokens(4)], steps=1)
                assert run.copies is not None
                sys.settrace(interrupt)
        except BaseException as found:
            raised = found
        finally:
            sys.settrace(tracing)
        torch.set_grad_enabled(True)  # an interrupt may hit torch as it leaves `no_grad`
        left = interrupt.left
        if raised is not (error if left <= 0 else None) or not untouched(model, before):
            wrong.append(at)
            model = shallow(biased("llama"))
    assert not wrong, f"{len(wrong)} of {at} points, the first {wrong[:9]}"
    assert at > 300


def test_an_impatient_user_loses_nothing(monkeypatch):
    """Ctrl-C over and over on the way out: the first one is raised, at the end."""
    model = shallow(biased("llama"))
    before = bits(model)
    stops = [KeyboardInterrupt(i) for i in range(5)]
    restore = execution.Execution.restore

    def stopped(self):
        if stops[1:]:
            raise stops.pop(1)
        restore(self)

    def leave():
        with open_session(model, "dart", 0.5, execution="copied", **RESTLESS) as run:
            decoded(model, run, [random_tokens(4)], steps=1)
            monkeypatch.setattr(execution.Execution, "restore", stopped)

    with pytest.raises(KeyboardInterrupt) as raised:
        leave()
    assert raised.value.args == (1,)
    assert len(stops) == 1 and untouched(model, before)
