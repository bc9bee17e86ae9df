"""A recipe file of a tiny run, and the command line as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

EVEN = '''"""Rewards of a random model that differ: is the number of characters even, and how many are there?"""


def even(answer: str) -> float:
    return float(len(answer) % 2 == 0)


def length(answer: str) -> float:
    return len(answer) / 10
'''


def recipe(folder: Path, **changes: Any) -> Path:
    """Four steps of a random model; `changes` are sections merged over it, one level deep."""
    (folder / "own.py").write_text(EVEN)
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "steps": 4,
        "threads": 1,
        "model": {"new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "max_positions": 128}},
        "data": {"train": "tandem:addition", "eval": "tandem:addition:test", "limit": 200},
        "sampling": {"prompts_per_step": 4, "answers_per_prompt": 4, "max_answer_tokens": 12},
        "reward": {"functions": [{"name": f"{folder / 'own.py'}:even"}]},
        "learner": {"optimizer": {"lr": 1e-3}},
        "eval": {"every": 2, "questions": 8, "answers": 2},
        "journal": {"samples": 1},
    }
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = values[name] | value if both else value
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def tandem(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "tandem", *map(str, arguments)]
    options = {"env": environment(), **options}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a command whose output can be read while it runs."""
    command = [sys.executable, "-m", "tandem", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def environment() -> dict[str, str]:
    """This process's own, with the package where this process found it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
