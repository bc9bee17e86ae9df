"""The fixtures `own` and `scorer`; test modules take them by `pytest_plugins`."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.config.reward import Reward
from tandem.rewards.scorer import Scorer

OWN = Path(__file__).parent / "data" / "own_rewards.py"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """tests/data/own_rewards.py, in a folder of its own."""
    return Path(shutil.copy(OWN, tmp_path / "own.py"))


@pytest.fixture
def scorer() -> Iterator[Callable[..., Scorer]]:
    """Makes scorers from function names (or their settings) and closes them after the test."""
    made: list[Scorer] = []

    def make(*functions: str | dict[str, Any], **settings: Any) -> Scorer:
        named = [{"name": f} if isinstance(f, str) else f for f in functions]
        made.append(Scorer(Reward(functions=named, **settings), max_answer_tokens=100))
        return made[-1]

    yield make
    for one in made:
        one.close()
