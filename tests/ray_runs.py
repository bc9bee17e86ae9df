"""Runs placed with Ray as a user starts them, what they leave behind, and the processes they consist of."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from tandem.journal import read_metrics, repeatable

PID = re.compile(r"tandem\.worker (\w+)-(\d+): .* pid (\d+)")
SMALL = {
    "steps": 20,
    "threads": 1,
    "data": {"eval": "tandem:addition:test", "limit": 200},
    "eval": {"every": 10, "questions": 8, "answers": 2},
    "algorithm": {"kl": {"coef": 0.05}},
    "checkpoint": {"every": None},
    "journal": {"samples": 0, "sinks": ["jsonl"]},
}
"""Over the recipe of `small_recipe`: with a reference and evaluation."""


def trajectory(folder: Path) -> list[dict[str, Any]]:
    """All that the journal says which no clock decides. Beside training, questions are drawn at their own pace; a
    reward function of the test's own has its folder in its name."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if k == "step" or (repeatable(k) and k != "epoch" and ":" not in k)}
        for row in rows
    ]


def pids(folder: Path, role: str) -> list[int]:
    """Of the processes that had a role so far, the latest of each rank last."""
    found = []
    for log in sorted((folder / "logs").glob(f"{role}-*.log")):
        found += [int(match[3]) for match in PID.finditer(log.read_text())]
    return found


def wait_until(what: str, holds: Any, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:g} s until {what}"
        time.sleep(0.1)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return sum(1 for row in read_metrics(path) if "reward/mean" in row) if path.exists() else 0


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def alive(processes: list[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        except psutil.NoSuchProcess:
            continue
    return found


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
