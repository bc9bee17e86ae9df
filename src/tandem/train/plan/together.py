"""What processes of this machine reach that work at the same time, and what they take to exchange something."""

import json
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes

from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.device import cores
from tandem.model.parallel.collectives import exchanged, gathered, scattered, summed
from tandem.model.parallel.grid import Axis, Grid, connect
from tandem.train.plan.device import Cost, Exchanges, Rates, Sending
from tandem.train.plan.measure import measured
from tandem.train.plan.work import Lengths

SMALL, LARGE = 2**14, 2**22
"""Bytes that are exchanged."""
SECONDS = ("step_s", "layer_s", "start_s")
"""Rates of which more is worse."""
ROUNDS, TURNS = 5, 8
"""Times that each is measured, and exchanges in each of them."""


def processes_here(run: Run, count: int) -> int:
    """Of so many, those that find cores on this machine."""
    return min(count, max(1, cores() // run.placement.cpus))


def measured_together(run: Run, lengths: Lengths, count: int) -> Rates:
    """Rates of each of `count` processes of the run's learners on this machine; takes half a minute."""
    with TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        start_processes(_measure, (count, address, folder, run, lengths), nprocs=count, start_method="spawn")
        found = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(count)]
    first = found[0]
    # All wait for the slowest.
    slowest = {
        name: (max if name in SECONDS else min)(each[name] for each in found)
        for name, value in first.items()
        if isinstance(value, float)
    }
    costs = {
        name: Cost(
            **{part: mean(each["exchanges"][name][part] for each in found) for part in ("message_s", "rate")}
        )
        for name in first["exchanges"]
    }
    sendings = [Sending(**each["sending"]) for each in found if each["sending"]]
    sending = max(sendings, key=lambda one: one.byte_s, default=None)
    origin = f"{first['origin']}, in {count} processes at a time, and their exchanges"
    more = {"exchanges": Exchanges(**costs), "sending": sending, "origin": origin}
    rates = Rates(**(first | slowest | more))
    return replace(rates, usable=rates.usable / count)


def _measure(rank: int, world: int, address: str, folder: str, run: Run, lengths: Lengths) -> None:
    warnings.filterwarnings("ignore")
    connect(rank, world, address, torch.device("cpu"))
    grid = Grid(Layout(replicate=world), torch.device("cpu"), "layout")
    rates = measured(run, lengths, run.placement.cpus, grid)
    found = replace(rates, exchanges=exchanges(world, rank))
    (Path(folder) / str(rank)).write_text(json.dumps(asdict(found)))
    dist.barrier()
    dist.destroy_process_group()


def exchanges(world: int, rank: int) -> Exchanges:
    """Collective."""
    axis = Axis(size=world, rank=rank, group=dist.group.WORLD)
    part = (world - 1) / world
    return Exchanges(
        gather=_cost(lambda x: gathered(x[: len(x) // world], axis), part, world - 1),
        scatter=_cost(lambda x: scattered(x, axis), part, world - 1),
        reduce=_cost(lambda x: summed(x, axis), 2 * part, world - 1),
        turn=_cost(lambda x: exchanged(x.view(world, -1), axis), part, world - 1),
        send=_cost(lambda x: _passed_on(x, axis), 1.0, 1),
    )


def _passed_on(x: Tensor, axis: Axis) -> None:
    """Everyone sends to the next, and receives from the one before."""
    pairs = [(dist.isend, x, axis.rank + 1), (dist.irecv, torch.empty_like(x), axis.rank - 1)]
    operations = [
        dist.P2POp(what, y, group=axis.group, group_peer=peer % axis.size) for what, y, peer in pairs
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _cost(act: Callable[[Tensor], Any], sent: float, steps: int) -> Cost:
    """`sent`: of the size, the part that each process sends."""
    small, large = (_seconds(act, size) for size in (SMALL, LARGE))
    rate = sent * (LARGE - SMALL) / max(1e-9, large - small)
    return Cost(message_s=max(0.0, small - sent * SMALL / rate) / steps, rate=rate)


def _seconds(act: Callable[[Tensor], Any], size: int) -> float:
    """Of one exchange, among products, as in a pass: they never take equally long on two processes, and the one that
    is ready waits."""
    x, a, b = torch.ones(size // 4), torch.randn(512, 512), torch.randn(512, 1024)
    rounds = []
    for _ in range(ROUNDS + 1):
        spent = 0.0
        for _ in range(TURNS):
            a @ b
            began = time.perf_counter()
            act(x)
            spent += time.perf_counter() - began
        rounds.append(spent / TURNS)
    return median(rounds[1:])
