"""YAML files of users: read into a mapping, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import yaml

from dart_eval.util.errors import UserError
from dart_eval.util.files import read_text
from dart_eval.util.text import Json

MOST = 20_000  # values of a file: PyYAML reads as many in a second


class _Loader(yaml.SafeLoader):
    """A loader that refuses what YAML allows and nobody means.

    Duplicate keys, of which the last would win; values that contain themselves; files without end.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.name = "the file"
        self.composed, self.inside = 0, [""]  # values so far; anchors of the values around this one

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        self.composed += 1
        if self.composed > MOST:
            raise yaml.YAMLError(f"it has more than {MOST:,} values")
        anchor = event.anchor or ""
        if isinstance(event, yaml.AliasEvent) and anchor in self.inside:
            raise yaml.YAMLError(f"*{anchor} contains itself")
        self.inside.append(anchor)
        node = super().compose_node(parent, index)
        self.inside.pop()
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    """Return a whole number. `4:32` is a text here: YAML 1.1 would read it as 4 * 60 + 32, and `010` as 8."""
    if len(digits := node.value.lstrip("+-")) > 1 and digits[0] == "0":
        raise yaml.YAMLError(f"{node.value[:40]} is no decimal number")
    return str(node.value) if ":" in node.value else int(loader.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def read_mapping(
    path: str | Path, what: str, example: str, remedy: str = "give a YAML file", empty: bool = False
) -> Json:
    """Return the keys and values of a YAML file.

    Args:
        what: the file's name in messages, such as `config`. example: a possible line of it.
        remedy: for a file that cannot be read.
        empty: whether it may be empty.

    Raises:
        UserError: it cannot be read, is not YAML, has a key twice, or is not a mapping.
    """
    text = read_text(path, what, remedy)
    remedy = f"for example `{example}`"
    try:
        loaded = _Loader(text).get_single_data()
    except Exception as error:  # malformed dates and numbers raise errors of many kinds
        raise UserError(f"{what} {path} is not YAML ({str(error) or type(error).__name__})", remedy) from None
    if loaded is None and empty:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{what} {path} must contain keys and values", remedy)
    return loaded
