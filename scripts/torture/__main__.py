"""Kill it, wear it out, feed it rubbish: does dart-eval come through unharmed?

    python -m scripts.torture                            # all of it, about half an hour on two cores
    python -m scripts.torture --short --seed 202648      # a minute or two, as CI does it
    python -m scripts.torture --only fuzz/gguf           # those of a part, or of one kind

Three parts: `kills` stops a sweep by signals at random moments, `rounds` prunes and restores models again and again,
`fuzz` damages everything that is read. Each unit of work is written to OUTPUT/state.jsonl as it ends, and the same
command goes on from there. What is random follows from the seed and the unit's name, not from what ran before.
Exit status: 0; 1 (something fell); 2 (wrong arguments, or the folder is another torture's).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

from scripts.torture.ledger import ROOT, Ledger, Unit, page, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked and not yet known, print a line for each unit, write the summary; the exit status."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="a little of everything")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--only", default="", help="units whose name begins so, such as kills or fuzz/records")
    parser.add_argument("--output", type=Path, default=Path("torture-output"), help="folder of the state and summary")
    parser.add_argument("--page", type=Path, help="write the summary as a page, Markdown")
    given = parser.parse_args(arguments)
    folder = given.output.resolve()
    try:
        ledger = Ledger(folder, given.seed, given.short)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settle(folder)
    units = [unit for unit in every(folder, given.seed, given.short) if unit.name.startswith(given.only)]
    if not units:
        print(f"error: no unit's name begins with {given.only!r}", file=sys.stderr)
        return 2
    for number, unit in enumerate(units, 1):
        if unit.name in ledger.known:
            continue
        begun = time.monotonic()
        result = unit.work()
        ledger.add(unit, result, time.monotonic() - begun)
        said = ", ".join(f"{count} {word}" for word, count in sorted(result.told.items()))
        print(
            f"[{number}/{len(units)}] {unit.name}: {result.tried} tried, {len(result.fell)} fell ({said})", flush=True
        )
        for line in result.fell:
            print(f"  FELL {line}", flush=True)
    summary = ledger.summary()
    print(table(summary))
    if given.page:
        given.page.write_text(page(summary), encoding="utf-8")
    return int(any(row["fell"] for row in summary["rows"]))


def every(folder: Path, seed: int, short: bool) -> Iterator[Unit]:
    """All units, in the order in which they run."""
    from scripts.torture import fuzz, kills, rounds

    yield from kills.units(folder, seed, short)
    yield from rounds.units(folder, seed, short)
    yield from fuzz.units(folder, seed, short)


def settle(folder: Path) -> None:
    """Caches go into the folder, too: what the user's own hold neither changes an answer nor is changed."""
    for name in ("DART_EVAL_CACHE", "HF_DATASETS_CACHE", "TMPDIR"):
        place = folder / "cache" / name.lower()
        place.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(place)
    os.environ["PYTHONPATH"] = str(ROOT)  # of new processes, wherever they run
    os.environ["PYTHONFAULTHANDLER"] = "1"  # one that does not end says where it stands
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # what killed ones leave open


if __name__ == "__main__":
    sys.exit(main())
