"""Reward functions for the tests: good ones, and one for each way to be bad."""

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn


def _spin() -> NoReturn:
    while True:
        pass


def _raise() -> NoReturn:
    raise KeyError("the \x1b[31m column")


def _print() -> float:
    for _ in range(100):
        os.write(1, b"reward: 1.0\n" * 87382)
    return 1.0


def _fork() -> float:
    """One child that stays and one that ends at once."""
    for seconds in (3600, 0):
        if os.fork() == 0:
            time.sleep(seconds)
            os._exit(0)
    return 1.0


def _stats() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            yield path.read_text("utf-8")


BEHAVIOUR = {
    "sleep": lambda: time.sleep(3600),
    "loop": _spin,
    "power": lambda: float(len(str(9**9**9**9))),
    "raise": _raise,
    "quit": lambda: sys.exit(0),
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), 9),
    "segfault": lambda: ctypes.string_at(0),
    "nan": lambda: float("nan"),
    "inf": lambda: -float("inf"),
    "huge": lambda: 10**400,
    "large": lambda: -1e308,
    "largest": lambda: 3.4e38,
    "none": lambda: None,
    "text": lambda: "1.0",
    "list": lambda: [1.0],
    "true": lambda: True,
    "print": _print,
    "memory": lambda: float(len(bytearray(4 << 30))),
    "files": lambda: float(len([os.open(os.devnull, os.O_RDONLY) for _ in range(10_000)])),
    "fork": _fork,
    "children": lambda: float(sum(stat.split()[3] == str(os.getpid()) for stat in _stats())),
    "torch": lambda: float("torch" in sys.modules or "tandem.types" in sys.modules),
}


def behave(answer: str) -> Any:
    """Does what the answer says; 1 for any other answer."""
    return BEHAVIOUR[answer]() if answer in BEHAVIOUR else 1.0


def once(answer: str, question: str) -> float:
    """Kills its worker the first time it sees a question (a path), and scores the second time."""
    if answer == "once" and not Path(question).exists():
        Path(question).touch()
        os.kill(os.getpid(), 9)
    return 1.0


def everything(
    answer: str,
    truth: str,
    question: str,
    row: Mapping[str, Any],
    tokens: int,
    finish: str,
    *,
    bonus: float = 0.0,
) -> float:
    return row["n"] + tokens + bonus + (finish == "stop") + len(truth) + len(question) + len(answer)


def rank(answers: list[str], tokens: list[int], finish: list[str], truth: str) -> list[float]:
    order = sorted(range(len(answers)), key=lambda i: tokens[i])
    return [float(order.index(i)) for i in range(len(answers))]


def short(answers: list[str]) -> list[float]:
    return [1.0] * (len(answers) - 1)


def one_bad(answers: list[str]) -> list[float | None]:
    return [None if answer == "bad" else 1.0 for answer in answers]


def nothing(answers: list[str]) -> None:
    return None


async def group_later(answers: list[str]) -> list[float]:
    await asyncio.sleep(0.01)
    return [2.0] * len(answers)


async def later(answer: str) -> float:
    if answer == "block":
        time.sleep(3600)
    if answer == "raise":
        raise RuntimeError("no judge")
    await asyncio.sleep(3600 if answer == "sleep" else 0.3)
    return float(len(answer))


def pid(answer: str) -> float:
    return float(os.getpid())


def needs_more(answer: str, judge: str, limit: int) -> float:
    return 0.0


def both(answer: str, answers: list[str]) -> float:
    return 0.0


constant = 3
