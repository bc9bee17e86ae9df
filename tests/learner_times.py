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
from tandem.device import set_threads
from tandem.model.new import new_tokenizer
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.load import load_sharded
from tandem.placement.ranks import actor_of

TIMED: dict[str, dict[str, Any]] = {
    "replicate": {"replicate": 2},
    "shard": {"shard": 2},
    "tensor": {"tensor": 2},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
}
GROUPS, PROMPT, ANSWERS, ANSWER = 4, 48, 8, 64


def seconds_of_each(rank: int, world: int, address: str, place: str) -> None:
    """Writes `seconds.json`: for each layout those of the two phases."""
    connect(rank, world, address, torch.device("cpu"), timeout_s=120)
    folder, found = Path(place), {}
    run = load(folder / "small.yaml")
    set_threads(run.placement.cpus)
    part = full_step(GROUPS, PROMPT, ANSWERS, ANSWER)
    for name, sizes in TIMED.items():
        grid = Grid(Layout(**sizes), torch.device("cpu"), "learner.layout")
        actor = actor_of(run, load_sharded(run.model, new_tokenizer(), grid))
        found[name] = {
            "update": together(partial(actor.update, [part], 0.0)),
            "old log-probs": together(partial(actor.logprobs, part)),
        }
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(found))


def together(act: Callable[[], object]) -> float:
    """Seconds until all have done it, the median of a few after one that does not count."""
    rounds = []
    for _ in range(6):
        dist.barrier()
        began = time.perf_counter()
        act()
        dist.barrier()
        rounds.append(time.perf_counter() - began)
    return median(rounds[1:])
