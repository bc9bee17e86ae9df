"""One GRPO step: Tandem's loop and TRL's GRPOTrainer in turns on the same machine.

    python benchmarks/grpo_step.py                         # hidden 256, 4 layers, 8 prompts x 8 answers x 128 tokens
    python benchmarks/grpo_step.py --cases beta_0,long_prompts
    python benchmarks/grpo_step.py --device cuda --shape qwen2.5-0.5b --prompts 32

Sampling, rewards, loss, gradient, one AdamW update. Writes benchmarks/results/grpo_step-<shape>.json and ends with one
line of JSON. docs/benchmarks.md says what is measured and how TRL is installed.
"""

import argparse
import json
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import bound
import gate
import lengths
import machine
import options
import results
from contenders import trl_step
from contest import Entry, Row, best, check, race, ratio, run
from job import Job
from shape import FIRST_WORD, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    beta: float = 0.0
    prompt_tokens: int | None = None
    """Length of every prompt; None for GSM8K's lengths."""
    fewer: int = 1
    """How many times fewer prompts than asked for."""


CASES = {
    "beta_0": Case(),
    "beta_0.04": Case(beta=0.04),
    "long_prompts": Case(prompt_tokens=1024, fewer=4),
}
DEFAULTS = {"tandem_step": "default", "trl_step": "1 micro-batch"}
"""The setting of each when nothing is said."""
ENTRIES = [
    *(Entry(contender="tandem_step", setting=s) for s in (DEFAULTS["tandem_step"], "keep_mb=512")),
    *(Entry(contender="trl_step", setting=s) for s in trl_step.SETTINGS),
]


def job_of(args: argparse.Namespace, shape: Shape, folder: Path, case: Case) -> Job:
    """Other prompts for every step."""
    rng = random.Random(args.seed)
    per_step = max(1, args.prompts // case.fewer)
    total = per_step * (1 + args.repeats)
    counts = lengths.drawn(total, rng) if case.prompt_tokens is None else [case.prompt_tokens] * total
    return Job(
        folder=str(folder),
        prompts=[[rng.randrange(FIRST_WORD, shape.vocab) for _ in range(count)] for count in counts],
        answers=args.answers,
        max_tokens=args.tokens,
        end_tokens=[],
        setting="",
        repeats=args.repeats,
        seed=args.seed,
        threads=args.threads,
        device=args.device,
        dtype=shape.dtype,
        prompts_per_step=per_step,
        beta=case.beta,
    )


def verify(job: Job, folder: Path, pythons: dict[str, str]) -> dict[str, Any]:
    """Loss and gradient of two prompts with answers of many lengths, in fp32, through either trainer."""
    small = replace(
        job,
        prompts_per_step=min(2, job.prompts_per_step),
        max_tokens=min(64, job.max_tokens),
        dtype="fp32",
    )
    for contender, setting in (("tandem_gradient", "keep_mb=512"), ("trl_gradient", "1 micro-batch")):
        report = run(contender, replace(small, setting=setting), folder, pythons)
        if "not_run" in report:
            return {"not_run": f"{contender}: {report['not_run']}", "passed": False}
    return gate.same_gradient(folder / "tandem.grad", folder / "trl.grad")


def memory(row: Row | None) -> float | None:
    """MiB that a step takes above the loaded model, children's processes with it; the median over rounds."""
    if row is None:
        return None
    reports = [report["memory"] for report in row.reports]
    on_device = "device_step_mb" in reports[0]
    return median(m["device_step_mb"] if on_device else m["step_mb"] + m["children_mb"] for m in reports)


def case_of(args: argparse.Namespace, shape: Shape, folder: Path, name: str) -> dict[str, Any]:
    job = job_of(args, shape, folder, CASES[name])
    pythons = options.pythons(args)
    print(f"grpo_step, {shape.name}, {name}", file=sys.stderr)
    verdict = verify(job, folder, pythons)
    rows = race(ENTRIES, job, args.rounds, folder, pythons)
    check(rows, job)
    if not verdict["passed"] and "not_run" not in verdict:
        for row in rows:
            row.void(f"loss or gradient differ ({verdict})")
    # Tandem's other settings are listed, and TRL's are raced against what a user of Tandem gets.
    ours, theirs = default(rows, "tandem_step"), best(rows, "trl_step")
    mine, other, plain = memory(ours), memory(theirs), default(rows, "trl_step")
    record = {
        "prompts": [len(p) for p in job.prompts],
        "prompts_per_step": job.prompts_per_step,
        "answers": job.answers,
        "max_tokens": job.max_tokens,
        "beta": job.beta,
        "rows": [row.public() for row in rows],
        "phases": {} if ours is None else phases(ours),
        "gate": verdict,
        "ratio_vs_trl": ratio(ours, theirs),
        "ratio_vs_default_trl": ratio(ours, plain),
        "memory_ratio_vs_trl": times(other, mine),
        "memory_ratio_vs_default_trl": times(memory(plain), mine),
        "leanest_memory_ratio_vs_trl": times(leanest(rows, "trl_step"), leanest(rows, "tandem_step")),
    }
    add_utilization(record, args.device, shape)
    return record


def default(rows: list[Row], contender: str) -> Row | None:
    """The row of what it does when nothing is said."""
    ran = [row for row in rows if row.seconds and row.entry.contender == contender]
    return next((row for row in ran if row.entry.setting == DEFAULTS[contender]), None)


def leanest(rows: list[Row], contender: str) -> float | None:
    """Least memory of any of its settings."""
    found = [memory(row) for row in rows if row.seconds and row.entry.contender == contender]
    return min((mib for mib in found if mib is not None), default=None)


def times(theirs: float | None, ours: float | None) -> float | None:
    return round(theirs / ours, 3) if theirs and ours else None


def phases(row: Row) -> dict[str, float]:
    """Median seconds of each phase of Tandem's step."""
    steps = [step for report in row.reports for step in report["phases"]]
    return {name: round(median(step[name] for step in steps), 4) for name in steps[0]}


def add_utilization(record: dict[str, Any], device: str, shape: Shape) -> None:
    """Share of the accelerator's peak operations, over the whole step; the count is the same for all rows."""
    peak = bound.peaks(machine.accelerator(device))
    if peak is None:
        return
    prompts = record["prompts"][: record["prompts_per_step"]]
    operations = bound.step_operations(shape, prompts, record["answers"], record["max_tokens"])
    record["bound"] = {"formula": bound.__doc__, "operations": operations}
    for row in record["rows"]:
        if "median_seconds" in row:
            row["percent_of_peak"] = round(100 * operations / peak[0] / row["median_seconds"], 1)


def last_line(record: dict[str, Any]) -> dict[str, Any]:
    """Medians and ratios; those at the top are of the first case."""
    ratios = [name for name in next(iter(record.values())) if "ratio_vs" in name]
    first = next(iter(record.values()))
    return {
        "benchmark": "grpo_step",
        "seconds": {
            case: {f"{r['contender']}, {r['setting']}": r.get("median_seconds") for r in c["rows"]}
            for case, c in record.items()
        },
        "ratio_vs_transformers": None,
        "ratio_vs_vllm": None,
        "ratio_vs_trl": first["ratio_vs_trl"],
        "memory_ratio_vs_trl": first["memory_ratio_vs_trl"],
        "cases": {case: {name: c[name] for name in ratios} for case, c in record.items()},
    }


def main() -> None:
    args = options.parser("Seconds and memory of one GRPO step").parse_args()
    shape = options.shape(args)
    with tempfile.TemporaryDirectory() as folder:
        shape.write(Path(folder))
        record = {
            case: case_of(args, shape, Path(folder), case) for case in options.chosen(args, list(CASES))
        }
    print(results.write("grpo_step", args, shape, record), file=sys.stderr)
    print(json.dumps(last_line(record)))


if __name__ == "__main__":
    main()
