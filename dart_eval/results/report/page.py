"""From a page's data to its text: the template, escaping, and a policy that lets nothing in or out."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from dart_eval.text import json_text, printable


def render(context: dict[str, Any], data: Any) -> str:
    """The HTML. `data` is what the page's script reads, or None."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    script, style = _file("page.js"), _file("style.css")
    text = environment.from_string(_file("template.html.j2")).render(
        **context, style=Markup(style), script=Markup(script), policy=_policy(script),
        data=None if data is None else Markup(script_json(data)),
    )  # fmt: skip
    return printable(text, lines=True)


def script_json(data: Any) -> str:
    """JSON that can stand inside <script>: nothing in it ends the element, starts a comment, or breaks a line."""
    text = json_text(_finite(data), None, separators=(",", ":"), sort_keys=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _policy(script: str) -> str:
    """Only this script runs, whatever a name or a text may hold; nothing is loaded and nothing is sent."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
            "base-uri 'none'; form-action 'none'")  # fmt: skip


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")
