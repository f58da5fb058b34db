"""What the scheduler costs: cells that do nothing, on eight workers.

    python scripts/scale.py [CELLS] [WORKERS]

Prints seconds until the first worker began, then what a cell took of the driver's time.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import ray

from dart_eval.cluster.pool import Pool, Task


class Nothing:
    """A worker that tells one batch and ends."""

    def run(self, payload: Any, tell: Callable[[Any], None]) -> Any:
        tell(payload)
        return payload


class Count:
    """A driver that counts."""

    def __init__(self) -> None:
        self.done_cells: Counter[str] = Counter()
        self.began = 0.0

    def begin(self, task: Task) -> Any:
        self.began = self.began or time.perf_counter()
        return task.name

    def on_message(self, task: Task, message: Any) -> bool:
        assert message == task.name
        return True

    def on_done(self, task: Task, result: Any) -> Iterable[Task]:
        self.done_cells[result] += 1
        return []

    def on_failed(self, task: Task, problem: str, text: str) -> None:
        raise RuntimeError(text)

    def on_death(self, number: int, task: Task | None, problem: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def log(self, number: int, text: str) -> None:
        pass


def main() -> None:
    """Run, and print."""
    cells, workers = (int(a) for a in [*sys.argv[1:], *("500", "8")[len(sys.argv) - 1 :]])
    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    handler, start = Count(), time.perf_counter()
    with Pool(Nothing, workers, {"num_cpus": 1}) as pool:
        pool.run([Task(f"cell {i}") for i in range(cells)], handler)
    end = time.perf_counter()
    assert handler.done_cells == Counter(f"cell {i}" for i in range(cells)), "lost or doubled cells"
    print(f"{cells} cells on {workers} workers: none lost, none doubled")
    print(
        f"first worker after {handler.began - start:.1f} s; then {1000 * (end - handler.began) / cells:.1f} ms a cell"
    )


if __name__ == "__main__":
    main()
