"""YAML files that a user writes: read into a mapping, or told in one line what is wrong with them."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import yaml

from dart_eval.util.errors import UserError
from dart_eval.util.files import read_text


class _Loader(yaml.SafeLoader):
    """YAML's own would let the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_mapping(
    path: str | Path, what: str, example: str, remedy: str = "give a YAML file", empty: bool = False
) -> dict[Any, Any]:
    """The keys and values of a YAML file.

    Args:
        what: what the file is, e.g. `config`. example: a line that could stand in it. remedy: where it cannot be read.
        empty: whether it may say nothing.

    Raises:
        UserError: it cannot be read, is no YAML, holds a key twice, or is no mapping.
    """
    text = read_text(path, what, remedy)
    remedy = f"for example `{example}`"
    try:
        loader = _Loader(text)
        loader.name = "the file"
        loaded = loader.get_single_data()
    except RecursionError:
        raise UserError(f"{what} {path} is nested too deeply", remedy) from None
    except Exception as error:  # a date or number that is none has an error of its own for every kind
        raise UserError(f"{what} {path} is not YAML ({str(error) or type(error).__name__})", remedy) from None
    if loaded is None and empty:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{what} {path} must hold keys and values", remedy)
    return loaded


def shown(value: Any) -> str:
    """A value for a message: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except Exception:  # whole numbers of thousands of digits have no text
        return f"a value of kind {type(value).__name__}"
