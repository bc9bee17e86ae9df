"""Seconds by stage, on a clock that cannot jump."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timer:
    """Example: `with timer("rollout"): ...`, then `timer.take()` is {"timing/rollout": seconds}.

    `synchronize` waits for an accelerator's queued work, so that a stage is charged for what it started.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize or _nothing
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to a stage; a block that raises is not counted."""
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The metrics so far; the timer starts again from nothing."""
        taken = {f"timing/{stage}": seconds for stage, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


def _nothing() -> None:
    pass
