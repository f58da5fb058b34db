"""Everything that a first GPU shows: is it right, is it fast, and with a model one column of a table.

    python scripts/gpu_check.py              # on a CUDA GPU, under eight minutes; writes results/gpu/CARD.json
    python scripts/gpu_check.py --dry        # the same checks on a CPU, on tiny shapes; times mean nothing
    python scripts/gpu_check.py --minutes 60 --model DIR --data-dir DIR

It needs no network, and nothing but torch and transformers: a check that needs more is skipped and says why. Each check
runs in a process of its own: one that fails, or runs over its time, is noted and the others go on.
Exit status: 0, 1 (a check failed), 2 (no GPU, or wrong arguments).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 7.5  # for all checks together
# check -> the most seconds that it may take in these minutes, in the order in which they run
LIMITS = {
    "parity": 60, "executions": 60, "rate": 20, "ffn": 60, "flash": 40, "scoring": 60, "sweep": 60, "column": 240,
    "decode_eager": 90, "graphs": 60, "compile": 60, "decode_graph": 180, "decode_compiled": 180,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print the tables, write the file; the exit status."""
    given = _given(arguments)
    names = [name for name in given.only.split(",") if name]
    if unknown := [name for name in names if name not in LIMITS]:
        print(f"error: no check {', '.join(unknown)}; there are {', '.join(LIMITS)}", file=sys.stderr)
        return 2
    prepare(given.dry)
    import gpu_checks
    from gpu_tables import line, report

    asked = {"numbers": {"card": "CPU (dry)"}} if given.dry else isolated(gpu_checks.card, (), 60)
    card = asked["numbers"]
    if not card.get("card"):
        why = f" ({asked['why']})" if "why" in asked else ""
        print(f"error: no CUDA GPU is at hand{why}; --dry runs the same checks on a CPU, tiny shapes", file=sys.stderr)
        return 2
    folder = given.output or (None if given.dry else ROOT / "results" / "gpu")
    column = given.model, given.data_dir, given.task, given.limit, folder and folder / "column"
    begun, found = time.monotonic(), []
    for name in names:
        left = 60 * given.minutes - (time.monotonic() - begun)
        limit = min(LIMITS[name] * max(1, given.minutes / MINUTES), left)
        more = column if name == "column" else ()
        found.append({"check": name, **isolated(getattr(gpu_checks, name), (given.dry, *more), limit)})
        print(line(found[-1]), flush=True)
    made = {**card, "dry": given.dry, "seconds": round(time.monotonic() - begun, 1), "checks": found}
    print(report(made))
    if folder is not None:
        print(f"written: {save(made, folder)}")
    return int(any(f["status"] == "failed" for f in found))


def _given(arguments: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="on a CPU, on tiny shapes: no time or goal means anything")
    parser.add_argument("--only", default=",".join(LIMITS), help="checks, comma-separated (default: all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all checks together (default: {MINUTES})")
    parser.add_argument("--model", help="for `column`: a folder, or a name that the hub's cache has")
    parser.add_argument("--data-dir", help="for `column`: local data (docs/data.md; default: the hub's cache)")
    parser.add_argument("--task", default="arc_easy", help="for `column` (default: arc_easy)")
    parser.add_argument("--limit", type=int, default=100, help="for `column`: documents (default: 100)")
    parser.add_argument("--output", type=Path, help="folder of the JSON (default: results/gpu; --dry: none)")
    return parser.parse_args(arguments)


def prepare(dry: bool) -> None:
    """What must stand before torch is imported."""
    sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from dart_eval.util.quiet import hush_warnings

    hush_warnings()
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # it touches the GPU, and no fork may have
    if dry:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as tiny shapes have it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def isolated(check: Callable[..., Any], arguments: tuple[Any, ...], limit: float) -> dict[str, Any]:
    """A check in a process of its own: `status`, `seconds`, its `numbers`, and why it was skipped or failed.

    The process is a fork, which has the imports and no GPU yet: this one never touches the GPU.
    """
    if limit <= 0:
        return {"status": "failed", "seconds": 0.0, "why": "no time was left for it", "numbers": {}}
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(check, arguments, theirs))
    begun = time.monotonic()
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(limit) else {"status": "failed", "why": f"it ran over its {limit:.0f} s"}
    except EOFError:
        process.join()
        answer = {"status": "failed", "why": f"its process ended with status {process.exitcode}"}
    _end(process)
    return {"numbers": {}, **answer, "seconds": round(time.monotonic() - begun, 1)}


def _child(check: Callable[..., Any], arguments: tuple[Any, ...], answer: Connection) -> None:
    """Run a check and send what it found."""
    os.setsid()  # so that what it starts (a compiler's workers) ends with it
    from gpu_checks import Skip

    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries' chatter; a failure is told whole in the file
        os.dup2(nowhere, stream)
    try:
        answer.send({"status": "passed", "numbers": check(*arguments)})
    except Skip as reason:
        answer.send({"status": "skipped", "why": str(reason)})
    except BaseException as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        answer.send({"status": "failed", "why": why, "traceback": traceback.format_exc()[-4000:]})


def _end(process: Any) -> None:
    process.join(5)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.pid is not None:
            try:
                os.killpg(process.pid, number)
            except (ProcessLookupError, PermissionError):
                break
        process.join(5)


def save(report: dict[str, Any], folder: Path) -> Path:
    """Write the JSON, whole or not at all; its name is the card's, made safe."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9]+", "-", report["card"]).strip("-") or "unknown"
    path, half = folder / f"{name}.json", folder / f".{name}.{os.getpid()}"
    half.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    half.replace(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
