"""What `learner.compile` gains in a GRPO step, and what it costs at first.

    python benchmarks/compiled.py                         # hidden 256, 4 layers, 8 prompts x 8 answers x 128 tokens
    python benchmarks/compiled.py --device cuda --shape qwen2.5-1.5b --prompts 32

The same step with and without, in turns; the first one, with the compilation in it, is told apart. Writes
benchmarks/results/compiled-<shape>.json and ends with one line of JSON.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpo_step
import options
import results
from contest import Entry, check, race, ratio


def compare(args: Any, folder: Path) -> dict[str, Any]:
    """Steps without and with compilation."""
    job = grpo_step.job_of(args, options.shape(args), folder, grpo_step.CASES["beta_0"])
    entries = [Entry(contender="tandem_step", setting=s) for s in ("default", "compiled")]
    rows = race(entries, job, args.rounds, folder, options.pythons(args))
    check(rows, job)
    public = [row.public() for row in rows]
    for row, shown in zip(rows, public, strict=True):
        shown["first_seconds"] = [round(report["first_seconds"], 4) for report in row.reports]
    plain, compiled = rows
    return {
        "prompts": [len(p) for p in job.prompts],
        "prompts_per_step": job.prompts_per_step,
        "answers": job.answers,
        "max_tokens": job.max_tokens,
        "rows": public,
        "ratio_vs_plain": ratio(compiled, plain),
    }


def main() -> None:
    args = options.parser("Seconds of one GRPO step with learner.compile and without").parse_args()
    shape = options.shape(args)
    with tempfile.TemporaryDirectory() as folder:
        shape.write(Path(folder))
        case = compare(args, Path(folder))
    print(results.write("compiled", args, shape, {"beta_0": case}), file=sys.stderr)
    seconds = {row["setting"]: row.get("median_seconds") for row in case["rows"]}
    first = {row["setting"]: row["first_seconds"] for row in case["rows"]}
    line = {"benchmark": "compiled", "seconds": seconds, "first_seconds": first}
    print(json.dumps(line | {"ratio_vs_plain": case["ratio_vs_plain"]}))


if __name__ == "__main__":
    main()
