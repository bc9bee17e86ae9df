"""Engines that take their time, in threads of this process: each token is the digit of the weights that chose it."""

import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.engine import PAUSED, Completion
from tandem.engine.weights import Offer
from tandem.placement.cluster.engine_worker import Progress
from tandem.placement.cluster.limit import Limit
from tandem.placement.cluster.lost import WorkerLost
from tandem.placement.cluster.parcel import Parcel

DIGITS = [15 + digit for digit in range(10)]
"""Tokens of the digits."""


def parcel(version: int) -> Parcel:
    offer = Offer(
        version=version, road="memory", specs=(), checksums=None, verify=False, adapter=False, place=None
    )
    return Parcel(offer, None)


class SlowEngine:
    """What an engine worker does, at `token_s` seconds per token of all its answers. An answer has a token less than
    the limit for each of `shorter` unless its key is among `long`."""

    def __init__(self, token_s: float, shorter: int = 0) -> None:
        self.token_s, self.shorter, self.version, self.wanted = token_s, shorter, -1, 0
        self.long: set[int] = set()
        self.begun: dict[int, float] = {}
        """When an answer was first worked on, by its key."""
        self.waits: list[float] = []
        """Seconds of each token: a machine may sleep longer than it was told to."""
        self.dead = threading.Event()
        self.made = time.monotonic()

    def build(self) -> str:
        return "this process"

    def update(self, offer: Offer, probe: tuple[int, ...] | None) -> None:
        self.version = offer.version

    def close(self) -> None:
        self.dead.set()

    def pause(self, version: int) -> None:
        self.wanted = version

    def abandon(self, number: int) -> None:
        self.dead.set()

    def progress(self, number: int, heard: int) -> Progress:
        return Progress(tokens=time.monotonic_ns(), answers=[])

    def generate(self, number, requests, params, version) -> list[Completion]:
        assert version == self.version
        answers = [list(r.begun.versions) for r in requests]
        limits = [params.max_tokens - self.shorter * (r.key not in self.long) for r in requests]
        for request in requests:
            self.begun.setdefault(request.key, time.monotonic())
        while any(len(a) < n for a, n in zip(answers, limits)) and version >= self.wanted:
            began = time.monotonic()
            if self.dead.wait(self.token_s):
                raise WorkerLost("it was killed")
            self.waits.append(time.monotonic() - began)
            for answer, limit in zip(answers, limits):
                if len(answer) < limit:
                    answer.append(version)
        return [completion(answer, limit) for answer, limit in zip(answers, limits)]


def completion(versions: list[int], limit: int) -> Completion:
    zeros = (0.0,) * len(versions)
    return Completion(
        tokens=tuple(DIGITS[version % 10] for version in versions),
        logp=zeros,
        policy_logp=zeros,
        versions=tuple(versions),
        finish="length" if len(versions) == limit else PAUSED,
    )


@dataclass(eq=False)
class ThreadCall:
    """As `port.Call`."""

    worker: "ThreadWorker"
    method: str
    future: Future[Any]
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def done(self) -> bool:
        return self.future.done()

    def result(self, limit: Limit) -> Any:
        return self.future.result(max(0.0, limit.seconds - self.seconds))

    def settle(self, timeout_s: float) -> None:
        wait([self.future], timeout_s)


class ThreadWorker:
    """As `port.Worker`."""

    def __init__(self, engine: SlowEngine, name: str) -> None:
        self.engine, self.name, self.log, self.place = engine, name, Path("no log"), ""
        self._threads = ThreadPoolExecutor(2)

    def __str__(self) -> str:
        return self.name

    def call(self, method: str, *arguments: Any) -> ThreadCall:
        return ThreadCall(self, method, self._threads.submit(getattr(self.engine, method), *arguments))

    def kill(self) -> None:
        self.engine.dead.set()


def first_done(calls: list[ThreadCall], timeout_s: float) -> list[ThreadCall]:
    done, _ = wait([call.future for call in calls], timeout_s, FIRST_COMPLETED)
    return [call for call in calls if call.future in done]
