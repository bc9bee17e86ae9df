"""What the processes of a plan's test do: they learn in some layouts and sample, and say how long it takes."""

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
from tandem.engine import EmbeddedEngine, Request, SamplingParams
from tandem.engine.probe import probe_of
from tandem.engine.receiver import ReceivingEngine
from tandem.engine.roads import FilesRoad
from tandem.learner import Actor
from tandem.model import load as load_model
from tandem.model import tokenizer_of
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.load import load_sharded
from tandem.placement.cluster.learner_worker import GatheredWeights
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
SENDING = ("replicate", "shard")
"""Layouts from which weights go to the engines as well."""
GROUPS, PROMPT, ANSWERS, ANSWER = 2, 48, 8, 64
ROUNDS = 3
CPU = torch.device("cpu")


def seconds_of_each(rank: int, world: int, address: str, place: str) -> None:
    """Writes `seconds.json`: median seconds of the learner's phases in each layout."""
    run = begun(rank, world, address, place)
    part = full_step(GROUPS, PROMPT, ANSWERS, ANSWER)
    phases: dict[str, Callable[[], object]] = {}
    for name, sizes in (MIXTURE if run.model.path else DENSE).items():
        pupil = actor(run, sizes)
        phases[f"{name}, update"] = partial(pupil.update, [part], 0.0)
        phases[f"{name}, old log-probs"] = partial(pupil.logprobs, part)
    take_time(phases, Path(place))


def seconds_of_engines(rank: int, world: int, address: str, place: str) -> None:
    """The same of an engine beside each learner: it samples its share, and takes weights from learners that lie in
    some layouts."""
    run = begun(rank, world, address, place)
    phases = {"rollout": sampling(run, rank, world)}
    for name in SENDING:
        phases[f"{name}, transfer"] = Sent(run, actor(run, DENSE[name]), rank, Path(place) / name).send
    take_time(phases, Path(place))


def begun(rank: int, world: int, address: str, place: str) -> Run:
    connect(rank, world, address, CPU, timeout_s=120)
    run = load(Path(place) / "small.yaml")
    set_threads(run.placement.cpus)
    return run


def take_time(phases: dict[str, Callable[[], object]], folder: Path) -> None:
    """They take turns, so that a slow minute of the machine hits all of them."""
    rounds = [{name: until_all_have(act) for name, act in phases.items()} for _ in range(ROUNDS)]
    if dist.get_rank() == 0:
        found = {name: median(each[name] for each in rounds) for name in phases}
        (folder / "seconds.json").write_text(json.dumps(found))


def actor(run: Run, sizes: dict[str, Any]) -> Actor:
    grid = Grid(Layout(**sizes), CPU, "learner.layout")
    return actor_of(run, load_sharded(run.model, tokenizer_of(run.model), grid))


def sampling(run: Run, rank: int, world: int) -> Callable[[], object]:
    """One engine of as many as there are processes samples its share of the groups."""
    model = load_model(run.model, tokenizer_of(run.model), CPU)
    engine = EmbeddedEngine(model, run.sampling.slots, run.learner.room())
    keys = range(rank * ANSWERS, GROUPS * ANSWERS, world * ANSWERS)
    requests = [Request(tokens=tuple(range(k, k + PROMPT)), key=k + i) for k in keys for i in range(ANSWERS)]
    params = SamplingParams(max_tokens=ANSWER, min_tokens=ANSWER)
    return partial(engine.generate, requests, params)


class Sent:
    """Weights of the learners on their way to an engine beside each, through files."""

    def __init__(self, run: Run, pupil: Actor, rank: int, folder: Path) -> None:
        self.model, self.rank, self.version = pupil.model, rank, 0
        self.weights, self.road = GatheredWeights(pupil.model, torch.float32), FilesRoad(folder)
        receiver = load_model(run.model, tokenizer_of(run.model), CPU)
        self.engine = ReceivingEngine(receiver, FilesRoad(), slots=1)

    def send(self) -> None:
        self.version += 1
        offers = [self.road.offer(self.version, self.weights) if self.rank == 0 else None]
        if self.rank:
            for _ in self.weights:
                """All gather what the first one sends."""
        probe = probe_of(self.model, torch.float32)
        dist.broadcast_object_list(offers)
        assert offers[0] is not None
        self.engine.update(offers[0])
        probe.check("the engine", self.version, self.engine.score([probe.tokens])[0])


def until_all_have(act: Callable[[], object]) -> float:
    """Seconds until all processes have done it, the second time: what was done last has filled caches and the
    allocator with other sizes."""
    act()
    dist.barrier()
    began = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - began
