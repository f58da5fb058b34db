"""From matplotlib's SVG file to an SVG that lives inside an HTML page, beside others."""

from __future__ import annotations

import re
from xml.etree import ElementTree

# Placeholder colours, each standing for a variable of the page's style sheet.
INK, GRID, MUTED, ALARM = "#010101", "#010102", "#010103", "#010104"
SERIES = 8  # colours of series in the style sheet
_VARIABLES = {INK: "currentColor", GRID: "var(--grid)", MUTED: "var(--muted)", ALARM: "var(--alarm)"}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def series_colour(style: int) -> str:
    """Placeholder of a series' colour."""
    return f"#0202{style % SERIES:02x}"


def embed(text: str, prefix: str) -> str:
    """The SVG as an element of HTML: no prolog, no metadata, no style sheet, its ids its own, the page's colours.

    prefix: makes ids unique in the page. Width and height are left to the style sheet (viewBox keeps the shape).
    """
    root = ElementTree.fromstring(text)
    _drop(root, {f"{_SVG}metadata", f"{_SVG}style"})
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w.-]+)", text))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            name = name.removeprefix(_XLINK)
            if name == "id" and value not in used:
                continue
            element.set(name, _attribute(name, value, prefix))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("aria-hidden", "true")  # the figure around it has the words
    root.set("focusable", "false")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    value = re.sub(r"url\(#", f"url(#{prefix}-", value)
    if name == "href":
        return re.sub(r"^#", f"#{prefix}-", value)
    if name == "style":
        value = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
        return re.sub(r"#0[12]\w{4}", lambda m: _variable(m.group()), value)
    if name in ("d", "points", "x", "y", "transform"):
        return re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m.group()):.2f}", value)
    return value


def _variable(colour: str) -> str:
    return _VARIABLES.get(colour) or f"var(--series-{int(colour[-2:], 16)})"


def _drop(element: ElementTree.Element, tags: set[str]) -> None:
    for child in list(element):
        if child.tag in tags:
            element.remove(child)
        else:
            _drop(child, tags)
