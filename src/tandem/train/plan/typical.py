"""How long something takes."""

import time
from collections.abc import Callable
from statistics import median

import torch.distributed as dist

ROUNDS = 3


def typical(act: Callable[[], object]) -> float:
    """Seconds until all processes that measure together have done it, the median of a few after one that does not
    count."""
    wait = dist.barrier if dist.is_initialized() else nothing
    times = []
    for _ in range(ROUNDS + 1):
        wait()
        began = time.perf_counter()
        act()
        wait()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def nothing() -> None:
    """A process alone waits for nobody."""
