"""Rewrites the golden numbers and prints what moved, case by case: `make golden`."""

import sys

from dart_eval.util.quiet import silence
from tests.golden import file
from tests.golden.measure import CASES


def rewrite():
    """Measure every case and write the file; lines of cases in which nothing moved stay as they are.

    Returns:
        How many cases moved, are new or are gone.
    """
    before, now, changed = file.read(), {}, 0
    for case, measure in CASES.items():
        found = measure()
        if apart := file.moved(found, found):
            sys.exit(f"{case}: masks and copied weights disagree, nothing is written\n{file.told(apart)}")
        found.pop("copied", None)
        moved = file.moved(before[case], found) if case in before else None
        now[case] = before[case] if moved == {} else found
        if moved != {}:
            changed += 1
            print(f"{case}: new" if moved is None else f"{case}:\n{file.told(moved)}", flush=True)
    for case in before.keys() - now.keys():
        print(f"{case}: gone")
        changed += 1
    file.write(now)
    return changed


if __name__ == "__main__":
    silence()
    print(f"{count} of {len(CASES)} cases moved" if (count := rewrite()) else "nothing moved")
