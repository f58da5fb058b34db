"""YAML files of users: read into a mapping, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import yaml

from dart_eval.util.errors import UserError
from dart_eval.util.files import read_text
from dart_eval.util.text import Json


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys; YAML's own would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    """Return a whole number. `4:32` is a text here: YAML 1.1 would read it as 4 * 60 + 32."""
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
        loader = _Loader(text)
        loader.name = "the file"
        loaded = loader.get_single_data()
    except Exception as error:  # malformed dates and numbers raise errors of many kinds
        raise UserError(f"{what} {path} is not YAML ({str(error) or type(error).__name__})", remedy) from None
    if loaded is None and empty:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{what} {path} must contain keys and values", remedy)
    return loaded
