"""Sampling answers: Tandem's engine, Transformers' `generate` and vLLM in turns on the same machine.

    python benchmarks/rollout.py                         # hidden 256, 4 layers, 8 prompts x 8 answers x 128 tokens
    python benchmarks/rollout.py --hidden 512 --layers 8
    python benchmarks/rollout.py --device cuda --shape qwen2.5-0.5b --prompts 32

Writes benchmarks/results/rollout-<shape>.json and ends with one line of JSON. docs/benchmarks.md says what is measured
and how the other contenders are installed.
"""

import argparse
import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import bound
import gate
import lengths
import machine
import options
import results
from contenders import tandem_engine, transformers_generate, vllm_engine
from contest import Entry, Row, best, check, race, ratio
from job import Job, answers_from
from shape import FIRST_WORD, Shape

CASES = ["equal", "mixed"]
LONGEST = 4
"""Of `mixed`: the limit on an answer, as a multiple of the mean length."""


def entries(device: str) -> list[Entry]:
    place = "cpu" if device == "cpu" else "accelerator"
    return [
        *(Entry(contender="tandem_engine", setting=s) for s in tandem_engine.SETTINGS),
        *(Entry(contender="transformers_generate", setting=s) for s in transformers_generate.ON[place]),
        *(Entry(contender="vllm_engine", setting=s) for s in vllm_engine.SETTINGS),
    ]


def job_of(args: argparse.Namespace, shape: Shape, folder: Path, case: str) -> Job:
    """`equal`: all answers have `tokens` tokens. `mixed`: one id in `tokens` ends an answer, so that lengths differ as
    they do in training (geometrically, `tokens` in the mean, cut at four times that)."""
    rng = random.Random(args.seed)
    counts = lengths.drawn(args.prompts, rng)
    equal = Job(
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
    )
    if case == "equal":
        return equal
    ends = rng.sample(range(1, shape.vocab), max(1, shape.vocab // args.tokens))
    return replace(equal, max_tokens=LONGEST * args.tokens, end_tokens=sorted(ends))


def verify(rows: list[Row], job: Job) -> dict[str, Any]:
    """The gate on each row's last answers; a row that fails it is void."""
    verdicts = {}
    for row in rows:
        if not row.seconds:
            continue
        agreement = gate.sampled(job, answers_from(row.reports[-1]["answers"]))
        verdicts[f"{row.entry.contender}, {row.entry.setting}"] = agreement.public()
        if not agreement.passed:
            row.void(f"its answers are not samples of the model ({agreement.public()})")
    return verdicts


def comparable(rows: list[Row]) -> list[Row]:
    """Rows that returned log-probabilities: without them a trainer would have to compute them again."""
    return [row for row in rows if row.entry.setting != "tokens only"]


def case_of(args: argparse.Namespace, shape: Shape, folder: Path, case: str) -> dict[str, Any]:
    job = job_of(args, shape, folder, case)
    print(f"rollout, {shape.name}, {case}", file=sys.stderr)
    rows = race(entries(args.device), job, args.rounds, folder, options.pythons(args))
    check(rows, job)
    verdicts = verify(rows, job)
    full = comparable(rows)
    ours = best(full, "tandem_engine")
    record = {
        "prompts": [len(p) for p in job.prompts],
        "answers": job.answers,
        "max_tokens": job.max_tokens,
        "end_tokens": len(job.end_tokens),
        "rows": [row.public() for row in rows],
        "gate": verdicts,
        "ratio_vs_transformers": ratio(ours, best(full, "transformers_generate")),
        "ratio_vs_vllm": ratio(ours, best(full, "vllm_engine")),
    }
    peak = bound.peaks(machine.accelerator(args.device))
    if peak is not None and case == "equal":
        floor = bound.rollout_seconds(shape, record["prompts"], job.answers, job.max_tokens, peak)
        record["bound"] = {"formula": bound.__doc__, "seconds": floor}
        for row in record["rows"]:
            if "median_seconds" in row:
                row["percent_of_bound"] = round(100 * floor / row["median_seconds"], 1)
    return record


def last_line(record: dict[str, Any]) -> dict[str, Any]:
    """Medians and ratios; those at the top are of the first case."""
    first = next(iter(record.values()))
    return {
        "benchmark": "rollout",
        "tokens_per_second": {
            case: {f"{r['contender']}, {r['setting']}": r.get("tokens_per_second") for r in c["rows"]}
            for case, c in record.items()
        },
        "ratio_vs_transformers": first["ratio_vs_transformers"],
        "ratio_vs_vllm": first["ratio_vs_vllm"],
        "ratio_vs_trl": None,
        "memory_ratio_vs_trl": None,
        "cases": {
            case: {k: c[k] for k in ("ratio_vs_transformers", "ratio_vs_vllm")} for case, c in record.items()
        },
    }


def main() -> None:
    args = options.parser("Tokens per second of sampling").parse_args()
    shape = options.shape(args)
    with tempfile.TemporaryDirectory() as folder:
        shape.write(Path(folder))
        record = {case: case_of(args, shape, Path(folder), case) for case in options.chosen(args, CASES)}
    print(results.write("rollout", args, shape, record), file=sys.stderr)
    print(json.dumps(last_line(record)))


if __name__ == "__main__":
    main()
