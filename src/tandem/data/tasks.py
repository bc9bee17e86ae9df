"""Verifiable tasks that the project makes itself, so that a first run needs no download.

`addition`: two-digit sums with a carry. The right method adds the carry to the tens, the wrong one forgets it, so a
model that learned from a mixture of both holds the skill but shows it only sometimes: what reinforcement can change.
`countdown`: reach a target from given numbers with + - * /, each number used once.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem.errors import DataError

Row = dict[str, Any]
HELD_OUT = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    rows: Callable[[], list[Row]]
    """All questions in a fixed shuffled order; the last HELD_OUT are the test split."""
    right: Callable[[Row], str]
    """Answer text by the right method."""
    wrong: Callable[[Row], str]
    """Answer text by a method that is always wrong."""


def rows(name: str) -> list[Row]:
    """`TASK` or `TASK:test`: the rows for training or the held-out ones."""
    task, _, split = name.partition(":")
    every = find(task).rows()
    if split not in ("", "train", "test"):
        raise DataError(f"tandem:{name}: no split {split!r}; use tandem:{task} or tandem:{task}:test")
    return every[-HELD_OUT:] if split == "test" else every[:-HELD_OUT]


def find(name: str) -> Task:
    if name not in TASKS:
        raise DataError(f"tandem:{name}: no such task; there are {', '.join(sorted(TASKS))}")
    return TASKS[name]


def _addition_rows() -> list[Row]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a % 10 + b % 10 >= 10]
    random.Random(0).shuffle(pairs)
    return [{"question": f"{a}+{b}", "answer": str(a + b), "terms": [a, b]} for a, b in pairs]


def _add(row: Row, carry: bool) -> str:
    (a1, a0), (b1, b0) = (divmod(term, 10) for term in row["terms"])
    ones, tens = a0 + b0, a1 + b1 + carry
    work = f"{a0}+{b0}={ones} {a1}+{b1}{'+1' if carry else ''}={tens}"
    return f"<think>{work}</think><answer>{tens}{ones % 10}</answer>"


def _countdown_rows() -> list[Row]:
    rng = random.Random(0)
    return [_countdown_row(rng) for _ in range(4000 + HELD_OUT)]


def _countdown_row(rng: random.Random) -> Row:
    """Three numbers and a target that a + b * c, a * b - c, or the like reaches."""
    a, b, c = (rng.randint(1, 20) for _ in range(3))
    shapes = [
        (f"({a}+{b})*{c}", (a + b) * c),
        (f"{a}*{b}+{c}", a * b + c),
        (f"{a}+{b}-{c}", a + b - c),
        (f"{a}*{b}-{c}", a * b - c),
    ]
    work, target = rng.choice([shape for shape in shapes if shape[1] > 0] or shapes[:2])
    numbers = sorted((a, b, c))
    question = f"Reach {target} with {', '.join(map(str, numbers))}."
    return {"question": question, "answer": str(target), "numbers": numbers, "target": target, "work": work}


def _countdown_right(row: Row) -> str:
    return f"<think>{row['work']}={row['target']}</think><answer>{row['work']}</answer>"


def _countdown_wrong(row: Row) -> str:
    """Uses the target itself instead of the numbers."""
    return f"<think>{row['target']}={row['target']}</think><answer>{row['target']}</answer>"


TASKS: dict[str, Task] = {
    "addition": Task(rows=_addition_rows, right=lambda r: _add(r, True), wrong=lambda r: _add(r, False)),
    "countdown": Task(rows=_countdown_rows, right=_countdown_right, wrong=_countdown_wrong),
}
