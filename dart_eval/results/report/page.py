"""The text of a page from its data: the template, escaping, and a policy without network access."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from dart_eval.util.text import printable

# Only the page's own script runs, whatever a name or a text contains; nothing is loaded and nothing is sent.
POLICY = (
    "default-src 'none'; script-src 'sha256-{}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


def render(context: dict[str, Any]) -> str:
    """Return the HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    environment.filters["breaks"] = lambda text: escape(text).replace(":", Markup(":<wbr>"))  # between a method's parts
    script, style = _file("sort.js") + _file("page.js"), _file("style.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.from_string(_file("template.html.j2")).render(
        **context, style=Markup(style), script=Markup(script), policy=POLICY.format(digest)
    )
    return printable(text, lines=True)


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")
