"""Small state as JSON that comes back as it went in: floats to the last bit, no NaN, keys unchanged."""

import json
import math
from pathlib import Path
from typing import Any

from tandem.errors import RunError

MAX_BYTES = 256 * 2**20
"""Larger files are refused before they are read: state is small, and a checkpoint may come from anyone. Nor are they
written, since nothing could go on from them."""


def write_json(path: Path, value: Any) -> None:
    """Write what `json_text` makes of a value, a line for each item."""
    text = json_text(value, path.name, indent=1) + "\n"
    if len(text) > MAX_BYTES:
        raise RunError(
            f"{path.name} would have {len(text):,} bytes, more than the {MAX_BYTES:,} that state may take"
        )
    path.write_text(text, encoding="ascii")


def json_text(value: Any, where: str, indent: int | None = None) -> str:
    """ASCII for dicts with text keys, lists (tuples come back as lists), texts, numbers, booleans and None; `where`
    begins the place that errors name."""
    _check(value, where)
    return json.dumps(value, indent=indent, allow_nan=False)


def read_json(path: Path) -> Any:
    return parse_json(read_text(path), path)


def read_text(path: Path) -> str:
    """The text of a JSON file of sane size; symbolic links and other oddities are refused."""
    try:
        if path.is_symlink() or not path.is_file():
            raise RunError(f"{path} is missing or not a regular file: take another checkpoint")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RunError(f"{path} has {size:,} bytes, more than the {MAX_BYTES:,} that state may take")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}; take another checkpoint") from error


def parse_json(text: str | bytes, path: Path) -> Any:
    """The value of a text read from `path`, which errors name."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid JSON: {error}; take another checkpoint") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _check(value: Any, where: str) -> None:
    """Refuse what JSON would alter or cannot hold, and say where it is."""
    match value:
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise TypeError(f"{where}: key {key!r} is not text and would come back as text")
                _check(item, f"{where}.{key}")
        case list() | tuple():
            for i, item in enumerate(value):
                _check(item, f"{where}[{i}]")
        case float() if not math.isfinite(value):
            raise RunError(f"{where} is {value}: state must be finite to be saved; see the metrics")
        case None | bool() | int() | float() | str():
            pass
        case _:
            raise TypeError(f"{where}: {type(value).__name__} does not fit into JSON")
