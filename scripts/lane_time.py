"""Does `make test-fast` take more than twice its usual time of processors? Exit status: 0; 1 (it does); 2 (it fails).

A yardstick is timed in the same run: fixed work in Python and torch, in two processes as the lane has them. Whatever
makes the machine slower does so to both.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence

USUAL = 18.0  # yardsticks that the lane took when this was last set
BOUND = 2.0  # times the usual
ROUNDS = 3000  # some five seconds in each process


def main() -> int:
    """Time both, print them and their ratio; the exit status."""
    yardstick, _ = seconds([[sys.executable, __file__, "yardstick"]] * 2)
    lane, failed = seconds([["make", "test-fast"]])
    ratio = lane / yardstick / USUAL
    print(f"The fast lane took {lane:.0f} s of a processor, a yardstick {yardstick:.1f} s: {ratio:.2f} times usual.")
    return 2 if failed else int(ratio > BOUND)


def seconds(commands: Sequence[Sequence[str]]) -> tuple[float, bool]:
    """Processor time of commands that run at once, with all processes that they start; whether one of them fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    codes = [process.wait() for process in [subprocess.Popen(words) for words in commands]]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(after[:2]) - sum(before[:2]), any(codes)


def work() -> int:
    """The yardstick: small products in torch, and Python's own lists, texts and numbers."""
    import torch

    torch.set_num_threads(1)
    x, w = torch.ones(8, 40), torch.eye(40)
    for i in range(ROUNDS):
        for _ in range(100):
            x = torch.nn.functional.layer_norm(torch.relu(x @ w), (40,))
        kept = {str(j): [j * 0.5, j % 7 == i % 7, None] for j in range(300)}
        x = x + len(json.loads(json.dumps(kept)))
    return 0


if __name__ == "__main__":
    sys.exit(work() if sys.argv[1:] else main())
