"""The quickstart over several seeds, and its control with rewards dealt out at random.

    python benchmarks/quickstart.py --seeds 5 --controls 2

Writes benchmarks/results/quickstart.json (every summary, with versions and hardware) and prints a table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quickstart.json"
RECIPE = "recipes/runs/quickstart.yaml"


def run(seed: int, control: bool, folder: Path) -> dict[str, Any]:
    """One whole run through the command line, as a user starts it."""
    target = folder / f"{'control' if control else 'seed'}-{seed}"
    settings = [f"seed={seed}", f"run_dir={target}", f"reward.permute={str(control).lower()}"]
    command = [sys.executable, "-m", "tandem", "train", RECIPE, *settings]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = next((time.monotonic() - began for line in process.stdout if "step 1/" in line), None)
        process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return outcome(seed, control, target) | {"first_step_s": first}


def outcome(seed: int, control: bool, target: Path) -> dict[str, Any]:
    """The summary of a finished run and its accuracy by step."""
    rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"], round(row["eval/accuracy"], 4)) for row in rows if "eval/accuracy" in row]
    summary = json.loads((target / "summary.json").read_text())
    return summary | {"seed": seed, "control": control, "accuracy": curve, "recipe": RECIPE}


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| run | seed | accuracy before | after | greedy before | after | whole run, s | warm-up, s | to step 1, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        names = ("eval/accuracy", "eval/greedy_accuracy")
        cells = [f"{r[end][name]:.3f}" for name in names for end in ("start", "end")]
        cells += [f"{r['seconds']:.0f}", f"{r['warmup_seconds']:.1f}", f"{r['first_step_s']:.1f}"]
        lines.append(f"| {'control' if r['control'] else 'GRPO'} | {r['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The quickstart over several seeds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--controls", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, False, Path(folder)) for seed in range(args.seeds)]
        runs += [run(seed, True, Path(folder)) for seed in range(args.controls)]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
