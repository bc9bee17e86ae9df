"""The same run in one process and on several: seconds per step of the quickstart's model, by placement.

    python benchmarks/placement.py

Needs Ray (`tandem-rl[ray]`). Each placement is a `tandem train` of its own, in turns; the first two steps of each are
left out. Writes benchmarks/results/placement-quickstart.json and ends with one line of JSON.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import machine
import results
from shape import Shape

RECIPE = Path(__file__).parents[1] / "recipes" / "runs" / "quickstart.yaml"
# Rewards that differ within every group, or a step would have nothing to train on.
REWARD = f"reward.functions=[{{name: {Path(__file__).with_name('reward.py')}:scrambled}}]"
SHAPE = Shape(name="quickstart", hidden=128, layers=2, heads=8, kv_heads=4, intermediate=384, vocab=264)
# Two threads in all: one process with both, or two with one each.
APART = ["placement.kind=apart", "threads=1"]
PLACEMENTS = {
    "inline": ["threads=2"],
    "inline, lag 1": ["threads=2", "sampling.max_lag=1"],
    "apart, lag 0": [*APART],
    "apart, lag 1": [*APART, "sampling.max_lag=1"],
    "apart, lag 1, in flight": [*APART, "sampling.max_lag=1", "sampling.in_flight=true"],
    "apart, lag 1, 2 learners": [*APART, "sampling.max_lag=1", "placement.learners=2"],
    "apart, lag 1, 2 engines": [*APART, "sampling.max_lag=1", "placement.engines=2"],
    "colocated": ["placement.kind=colocated", "threads=1"],
}
STEPS = 12
SKIPPED = 2
KEEP = ("timing/all", "timing/update", "timing/rollout", "timing/non_overlap_rollout")


def steps_of(overrides: list[str], folder: Path) -> list[dict[str, float]]:
    """The timings of each step of one run."""
    fixed = [
        f"steps={STEPS}",
        f"run_dir={folder}",
        "warmup.steps=20",
        "eval.every=null",
        "checkpoint.every=null",
    ]
    command = [
        sys.executable,
        "-m",
        "tandem",
        "train",
        str(RECIPE),
        "--fresh",
        *fixed,
        "journal.samples=0",
        REWARD,
    ]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(overrides)} failed: {done.stderr.strip()[-2000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "timing/all" in row][SKIPPED:]
    return [{name: row[name] for name in KEEP if name in row} for row in steps]


def rows_of(rounds: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PLACEMENTS}
    load: dict[str, list[float]] = {name: [] for name in PLACEMENTS}
    for turn in range(rounds):
        for name, overrides in PLACEMENTS.items():
            print(f"  round {turn + 1}: {name}", file=sys.stderr)
            load[name].append(machine.load())
            with tempfile.TemporaryDirectory() as folder:
                found[name] += steps_of(overrides, Path(folder) / "run")
    return [
        {
            "contender": "tandem",
            "setting": name,
            "median_seconds": round(median(s["timing/all"] for s in steps), 4),
            "seconds": [round(s["timing/all"], 4) for s in steps],
            "phases": {k: round(median(s.get(k, 0.0) for s in steps), 4) for k in KEEP},
            "load": load[name],
        }
        for name, steps in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per step, by placement")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each placement, alternating")
    parser.add_argument("--out", help="folder of the results; benchmarks/results unless given")
    args = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        raise SystemExit("not run: Ray cannot be imported; install tandem-rl[ray]")
    args.device, args.threads, args.repeats = "cpu", 2, STEPS - SKIPPED
    rows = rows_of(args.rounds)
    case = {"prompts": [24] * 32, "answers": 8, "max_tokens": 40, "end_tokens": 1, "rows": rows}
    print(results.write("placement", args, SHAPE, {"two threads in all": case}), file=sys.stderr)
    print(
        json.dumps({"benchmark": "placement", "seconds": {r["setting"]: r["median_seconds"] for r in rows}})
    )


if __name__ == "__main__":
    main()
