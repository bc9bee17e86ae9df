"""Seconds per step with one learner and two, by axis of the layout, and how well two stages overlap.

    python benchmarks/scaling.py

Needs Ray (`tandem-rl[ray]`). The first table is of whole runs of the quickstart's model, as in placement.py: an engine
of one thread, and learners of one thread each, which take turns with it; beside them one process with one thread and
with two. The second is of the loop's stream with stages that sleep, so it shows what waiting the stream itself adds.
Writes benchmarks/results/scaling-quickstart.json and ends with one line of JSON.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import machine
import results
from placement import APART, KEEP, RECIPE, REWARD, SHAPE, SKIPPED, STEPS, steps_of

from tandem.config import load
from tandem.config.run import Run
from tandem.data.prompts import load_prompts
from tandem.device import pick
from tandem.engine import Completion, Request
from tandem.model import load as load_model
from tandem.model import tokenizer_of
from tandem.placement import inline
from tandem.placement.cluster.ahead import AheadStream, Line
from tandem.rewards.scorer import Scorer

TWO = [*APART, "placement.learners=2"]
LAYOUTS = {
    "one process, 1 thread": ["threads=1"],
    "one process, 2 threads": ["threads=2"],
    "1 learner": [*APART],
    "2 learners, shard": [*TWO, "learner.layout={shard: 2}"],
    "2 learners, replicate": [*TWO, "learner.layout={replicate: 2}"],
    "2 learners, tensor": [*TWO, "learner.layout={tensor: 2}"],
    "2 learners, context": [*TWO, "learner.layout={context: 2}"],
    "2 learners, pipeline": [*TWO, "learner.layout={pipeline: 2}"],
}
STAGES = ((0.3, 0.3), (0.3, 0.15), (0.15, 0.3))
"""Seconds of sampling and of training."""


@dataclass
class SleepingEngine:
    """Answers of one token each, after so many seconds."""

    seconds: float

    def generate(
        self,
        requests: Sequence[Request],
        params: object,
        *,
        poll: object,
        on_done: Callable[[int, Completion], None],
    ) -> list[Completion]:
        time.sleep(self.seconds)
        done = [
            Completion(tokens=(5,), logp=(-1.0,), policy_logp=(-1.0,), versions=(r.version,), finish="length")
            for r in requests
        ]
        for index, completion in enumerate(done):
            on_done(index, completion)
        return done


def layout_rows(rounds: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of whole runs, in turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    load_of: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            print(f"  round {turn + 1}: {name}", file=sys.stderr)
            load_of[name].append(machine.load())
            with tempfile.TemporaryDirectory() as folder:
                found[name] += steps_of(LAYOUTS[name], Path(folder) / "run")
    return [
        {
            "contender": "tandem",
            "setting": name,
            "median_seconds": round(median(s["timing/all"] for s in steps), 4),
            "seconds": [round(s["timing/all"], 4) for s in steps],
            "phases": {k: round(median(s.get(k, 0.0) for s in steps), 4) for k in KEEP},
            "load": load_of[name],
        }
        for name, steps in found.items()
    ]


def overlap_rows(steps: int) -> list[dict[str, Any]]:
    """Of stages that sleep."""
    rows = []
    for sampling, training in STAGES:
        for lag in (0, 1):
            load_before = machine.load()
            seconds = sleeping(sampling, training, lag, steps)
            rows.append({
                "contender": "tandem",
                "setting": f"lag {lag}",
                "sampling": sampling,
                "training": training,
                "median_seconds": round(median(seconds), 4),
                "seconds": [round(s, 4) for s in seconds],
                "over_slower_stage": round(median(seconds) / max(sampling, training), 3),
                "load": [load_before],
            })  # fmt: skip
    return rows


def sleeping(sampling: float, training: float, lag: int, steps: int) -> list[float]:
    """Seconds of each step of a loop whose two stages take so long."""
    sizes = ["sampling.prompts_per_step=4", "sampling.answers_per_prompt=2", f"sampling.max_lag={lag}"]
    run: Run = load(RECIPE, [*sizes, "data.limit=64", "threads=1", "warmup=null", REWARD])
    tokenizer = tokenizer_of(run.model)
    prompts = load_prompts(run.data, run.data.train, tokenizer, limit=run.data.limit)
    line, taken = Line(), []
    with Scorer(run.reward, run.sampling.max_answer_tokens) as scorer:
        scorer.ready()
        roles = inline.build(run, load_model(run.model, tokenizer, pick("cpu"), seed=0), prompts, scorer)
        roles.sampler.engine = SleepingEngine(sampling)
        stream = AheadStream(roles.stream, line)
        stream.take(0)
        for version in range(1, steps + 1):
            began = time.monotonic()
            time.sleep(training)
            line.submit(lambda version=version: setattr(roles.sampler, "version", version))
            stream.take(version)
            taken.append(time.monotonic() - began)
        line.close()
        roles.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seconds per step, by axis of the layout; overlap of two stages"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each layout, alternating")
    parser.add_argument(
        "--only", nargs="*", default=list(LAYOUTS), help="rows of the first table; all unless given"
    )
    parser.add_argument("--out", help="folder of the results; benchmarks/results unless given")
    args = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        raise SystemExit("not run: Ray cannot be imported; install tandem-rl[ray]")
    if unknown := [name for name in args.only if name not in LAYOUTS]:
        raise SystemExit(f"--only {unknown[0]!r} is none of the rows: {list(LAYOUTS)}")
    args.device, args.threads, args.repeats = "cpu", 2, STEPS - SKIPPED
    sizes = {"prompts": [24] * 32, "answers": 8, "max_tokens": 40, "end_tokens": 1}
    cases = {
        "layouts": {**sizes, "rows": layout_rows(args.rounds, args.only)},
        "overlap": {**sizes, "prompts": [24] * 4, "answers": 2, "max_tokens": 1, "rows": overlap_rows(STEPS)},
    }
    path = results.write("scaling", args, SHAPE, cases)
    rows = [row for case in cases.values() for row in case["rows"]]
    for row in rows:
        print(f"  {row['setting']:24} {row['median_seconds']:8.3f} s", file=sys.stderr)
    print(path, file=sys.stderr)
    figures = {row["setting"]: row["median_seconds"] for row in cases["layouts"]["rows"]}
    overlap = max(row["over_slower_stage"] for row in cases["overlap"]["rows"] if row["setting"] == "lag 1")
    print(json.dumps({"benchmark": "scaling", "seconds": figures, "overlap_lag_1": overlap}))


if __name__ == "__main__":
    main()
