"""YAML to plain data with the line of every key, and back.

PyYAML reads `1e-6` as text and lets a later duplicate of a key win in silence; both are put right here.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from tandem.errors import ConfigError

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


_MOST_KEYS = 100_000
"""Aliases of aliases can stand for billions of keys; no configuration has so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """One YAML text: its mapping, and the line (from 1) of each dotted key."""

    data: dict[str, Any]
    lines: dict[str, int]


def parse(text: str, name: str) -> Parsed:
    """A YAML mapping; an empty text is an empty mapping."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Parsed(data={}, lines={})
        lines: dict[str, int] = {}
        _walk(node, "", name, lines, frozenset())
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: expected `key: value` lines, found {type(data).__name__}")
    return Parsed(data=data, lines=lines)


def _walk(node: yaml.Node, prefix: str, name: str, lines: dict[str, int], above: frozenset[int]) -> None:
    """Notes the line of every key; refuses duplicates and values that contain themselves."""
    if id(node) in above:
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: an alias (*) contains itself")
    if len(lines) > _MOST_KEYS:
        raise ConfigError(f"{name}: more than {_MOST_KEYS:,} keys")
    above |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{name}:{line}: a key must be a word, not a list or mapping")
            if key.value in seen:
                first = f"first in line {seen[key.value]}"
                raise ConfigError(f"{name}:{line}: {prefix}{key.value} is given twice, {first}")
            seen[key.value] = line
            lines[f"{prefix}{key.value}"] = line
            _walk(value, f"{prefix}{key.value}.", name, lines, above)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[f"{prefix}{i}"] = value.start_mark.line + 1
            _walk(value, f"{prefix}{i}.", name, lines, above)


def dump_yaml(data: dict[str, Any]) -> str:
    """YAML that `parse` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
