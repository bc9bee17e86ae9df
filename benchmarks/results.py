"""The raw results: one JSON file for each benchmark and shape, from which docs/benchmarks.md is made.

Those of another kind of CPU stand beside them under another name, such as `grpo_step-256-avx2.json`.
"""

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
from shape import Shape

FOLDER = Path(__file__).parent / "results"


def write(benchmark: str, args: argparse.Namespace, shape: Shape, cases: dict[str, Any]) -> Path:
    folder = Path(args.out) if args.out else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}-{shape.name}.json"
    record = {
        "benchmark": benchmark,
        "command": shlex.join(["python", f"benchmarks/{benchmark}.py", *measured(sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": machine.hardware(args.device, args.threads),
        "versions": machine.versions(),
        "shape": {
            "name": shape.name,
            "hidden": shape.hidden,
            "layers": shape.layers,
            "vocab": shape.vocab,
            "dtype": shape.dtype,
            "parameters": shape.matmul_parameters,
        },
        "rounds": args.rounds,
        "repeats": args.repeats,
        "cases": cases,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def measured(arguments: list[str]) -> list[str]:
    """Without where the results go, which changes nothing in them."""
    if "--out" not in arguments:
        return arguments
    place = arguments.index("--out")
    return arguments[:place] + arguments[place + 2 :]


def read(benchmark: str, shape: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """None where the benchmark was not run."""
    path = folder / f"{benchmark}-{shape}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def quiet(rows: list[dict[str, Any]], cores: int) -> bool:
    """No more processes wanted a core, at the start of any round, than there are cores."""
    return all(load <= cores + 0.2 for row in rows for load in row.get("load", []))
