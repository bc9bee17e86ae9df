"""Writing a small configuration, and what is said where one is refused."""

from pathlib import Path

import pytest

from tandem.config import load
from tandem.errors import ConfigError

SMALL = """\
model: {new: {}}
data: {train: "tandem:addition"}
reward: {functions: [{name: answer_number}]}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)
