"""Published data that tests check against where it is: no part of the project."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("TANDEM_GSM8K", "gsm8k"))
"""With train.jsonl and test.jsonl of openai/grade-school-math."""


def needs(file: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not file.is_file(), reason=f"needs the published GSM8K in TANDEM_GSM8K, at {file}"
    )
