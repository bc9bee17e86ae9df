"""What the processes of a plan's test do: they learn in some layouts, and say how long it takes."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from plan_ranks import full_step
from tandem.config import load
from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.device import set_threads
from tandem.learner import Actor
from tandem.model import tokenizer_of
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.load import load_sharded
from tandem.placement.ranks import actor_of

DENSE: dict[str, dict[str, Any]] = {
    "replicate": {"replicate": 2},
    "shard": {"shard": 2},
    "tensor": {"tensor": 2},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
    "tensor without sequence": {"tensor": 2, "sequence": False},
    "interleaved pipeline": {"pipeline": 2, "pipeline_chunks": 2},
}
MIXTURE: dict[str, dict[str, Any]] = {"sharded": {"shard": 2}, "expert": {"shard": 2, "expert": 2}}
GROUPS, PROMPT, ANSWERS, ANSWER = 4, 48, 8, 64
ROUNDS = 4


def seconds_of_each(rank: int, world: int, address: str, place: str) -> None:
    """Writes `seconds.json`: median seconds of two phases in each layout. They take turns, so that a slow minute of
    the machine hits all of them."""
    connect(rank, world, address, torch.device("cpu"), timeout_s=120)
    folder = Path(place)
    run = load(folder / "small.yaml")
    layouts = MIXTURE if run.model.path else DENSE
    set_threads(run.placement.cpus)
    part = full_step(GROUPS, PROMPT, ANSWERS, ANSWER)
    phases: dict[str, Callable[[], object]] = {}
    for name, sizes in layouts.items():
        pupil = actor(run, sizes)
        phases[f"{name}, update"] = partial(pupil.update, [part], 0.0)
        phases[f"{name}, old log-probs"] = partial(pupil.logprobs, part)
    rounds = [{name: until_all_have(act) for name, act in phases.items()} for _ in range(ROUNDS)]
    if rank == 0:
        found = {name: median(each[name] for each in rounds) for name in phases}
        (folder / "seconds.json").write_text(json.dumps(found))


def actor(run: Run, sizes: dict[str, Any]) -> Actor:
    grid = Grid(Layout(**sizes), torch.device("cpu"), "learner.layout")
    return actor_of(run, load_sharded(run.model, tokenizer_of(run.model), grid))


def until_all_have(act: Callable[[], object]) -> float:
    """Seconds until all processes have done it, the second time: what was done last has filled caches and the
    allocator with other sizes."""
    act()
    dist.barrier()
    began = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - began
