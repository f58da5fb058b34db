"""Ways to damage a file: its bytes, its text, the values of its JSON."""

from __future__ import annotations

import copy
import json
import math
from random import Random
from typing import Any

LONG = "x" * 5000
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 1e-320, math.inf, -math.inf, math.nan, 10**30, 2**31, 2**63, "",
    "x", "0.5", "nan", "a\0b", "\ud800", "../../etc/passwd", "/dev/zero", "\x1b[31mred", "\u202e", "::error::pwn",
    "=HYPERLINK(1)", "<script>alert(1)</script>", "a\nb", LONG, [], {}, [[]], [None], {"a": 1}, ["x", 1], {"": {}},
)  # fmt: skip
# Pieces of YAML: tags, anchors, kinds of values, keys twice, bombs.
PIECES = (
    "!!python/object/apply:os.system [touch escaped]", "!!timestamp x", "!!binary x", "!!set {a, b}", "&a [*a]", "*a",
    "<<: *a", "? [a]", "- ", ": ", "{", "}", "[", "]", "'", '"', "|", ">", "%YAML 1.1", "---", "...", "#", "\t", "\0",
    "2024-13-45", "2024-01-01", "0x" + "f" * 60, "1e400", ".nan", ".inf", "~", "yes", "1_000", "0o17", "12:30:45",
    "\ufeff", "\x07", "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]", "[" * 3000, "{a: " * 500, "- " * 500,
    LONG, "é", "\n", "  ",
)  # fmt: skip


def of_bytes(random: Random, data: bytes) -> bytes:
    """Bytes with up to three of: bits flipped, a cut, a piece gone, twice, zeroed, moved, or garbage."""
    for _ in range(random.choice((1, 1, 2, 3))):
        if not data:
            return b"\0"
        at, size = random.randrange(len(data)), random.choice((1, 2, 4, 8, 64, 512))
        piece = data[at : at + size]
        changed = {
            "bit": bytes([data[at] ^ 1 << random.randrange(8)]) + piece[1:],
            "byte": bytes([random.randrange(256)]) + piece[1:],
            "gone": b"",
            "twice": piece * 2,
            "zeroed": bytes(len(piece)),
            "garbage": random.randbytes(len(piece)),
            "more": piece + random.randbytes(size),
        }
        how = random.choice([*changed, "cut", "moved"])
        if how == "cut":
            data = data[:at]
        elif how == "moved":
            rest = data[:at] + data[at + size :]
            to = random.randrange(len(rest) + 1)
            data = rest[:to] + piece + rest[to:]
        else:
            data = data[:at] + changed[how] + data[at + size :]
    return data


def of_text(random: Random, text: str, pieces: tuple[str, ...] = PIECES) -> bytes:
    """Text with pieces set in, in place of words, or over its ends; or damaged as bytes."""
    if random.random() < 0.3:
        return of_bytes(random, text.encode())
    for _ in range(random.choice((1, 1, 2, 3))):
        words = [i for i, c in enumerate(text) if not c.isalnum()] or [0]
        a = random.choice(words) + 1
        b = a if random.random() < 0.5 else min((i for i in words if i > a), default=len(text))
        text = text[:a] + random.choice(pieces) + text[b:]
    return text.encode("utf-8", "surrogatepass")


def of_value(random: Random, value: Any) -> Any:
    """JSON data in which one value or two are odd, gone, doubled, nested, or another's."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2))):
        places = list(_places(value))
        if not places:
            return random.choice(ODD)
        holder, key = random.choice(places)
        how = random.random()
        if how < 0.55:
            holder[key] = random.choice(ODD)
        elif how < 0.7:
            del holder[key]
        elif how < 0.8:
            other, there = random.choice([(h, k) for h, k in places if h is not holder] or [(holder, key)])
            holder[key] = copy.deepcopy(other[there])
        elif how < 0.9:
            holder[key] = [holder[key]] if random.random() < 0.5 else {"more": holder[key]}
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[random.choice(("more", "", "schema", "part_of"))] = random.choice(ODD)
    return value


def _places(value: Any) -> Any:
    """(holder, key) of everything below a value."""
    for key, below in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(below, (dict, list)):
            yield from _places(below)


def as_json(value: Any) -> bytes:
    """JSON as Python writes it: also NaN, infinity and halves of characters."""
    return json.dumps(value).encode()
