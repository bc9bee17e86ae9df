"""JSON files that others wrote: configs and indexes of model folders, which may be links into a cache."""

import json
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ConfigError` names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise ConfigError(f"{path} is not a readable JSON file: {cause}") from cause
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value
