"""The quickstart over several seeds, and its control with rewards dealt out at random.

    python benchmarks/quickstart.py --seeds 5

Writes benchmarks/results/quickstart.json (every summary, with versions and hardware) and prints a table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "quickstart.json"
RECIPE = "recipes/runs/quickstart.yaml"


def run(seed: int, control: bool, folder: Path) -> dict[str, object]:
    """One whole run through the command line; its summary, wall time and the time of its warm-up."""
    target = folder / f"{'control' if control else 'seed'}-{seed}"
    settings = [f"seed={seed}", f"run_dir={target}", f"reward.permute={str(control).lower()}"]
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "tandem", "train", RECIPE, *settings], check=True, stdout=subprocess.DEVNULL
    )
    wall = time.monotonic() - began
    rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"], round(row["eval/accuracy"], 4)) for row in rows if "eval/accuracy" in row]
    summary = json.loads((target / "summary.json").read_text())
    return {"seed": seed, "control": control, "wall_s": round(wall, 1), "accuracy": curve, **summary}


def main() -> None:
    parser = argparse.ArgumentParser(description="The quickstart over several seeds")
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, control, Path(folder)) for control in (False, True) for seed in range(seeds)]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n")
    print("| run | seed | accuracy before | after | greedy before | after | warm-up, s | whole run, s |")
    print("|---|---|---|---|---|---|---|---|")
    for r in runs:
        sampled, greedy = (
            [r[end][f"eval/{name}"] for end in ("start", "end")] for name in ("accuracy", "greedy_accuracy")
        )
        cells = [
            *(f"{value:.3f}" for value in (*sampled, *greedy)),
            f"{r['warmup_seconds']:.0f}",
            f"{r['wall_s']:.0f}",
        ]
        print(f"| {'control' if r['control'] else 'GRPO'} | {r['seed']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
