"""Several engines as one: answers are shared out, and what a lost engine was working on goes to another.

An engine that is started anew serves only after it has taken the weights of the present version.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tandem.config.placement import Placement
from tandem.engine import PAUSED, Completion, Request, SamplingParams
from tandem.engine.roads import RoadBroken
from tandem.errors import RunError
from tandem.placement.cluster import port
from tandem.placement.cluster.broadcast import Broadcasting, Reading
from tandem.placement.cluster.engine_worker import Progress
from tandem.placement.cluster.lost import WorkerLost
from tandem.placement.cluster.parcel import Parcel

log = logging.getLogger("tandem.engines")

ROOM_S = 5.0
"""An engine that is still being placed after so long may have no node that takes it."""
LOOK_S = 0.2
"""Longest wait before signals and restarts are looked after again."""
ASLEEP = -1
"""In the place of the version of an engine that sleeps."""
NEWS_S = 0.25
"""Seconds between two questions to an engine for how far it is."""


@dataclass(slots=True)
class Job:
    """What is asked for in one call, and what is there of it."""

    requests: list[Request]
    params: SamplingParams
    on_done: Callable[[int, Completion], None]
    waiting: deque[list[int]] = field(default_factory=deque)
    """Shares that no engine has."""
    done: dict[int, Completion] = field(default_factory=dict)
    tokens: int = 0
    """Of calls that ended."""

    def take(self, index: int, completion: Completion) -> None:
        """An answer, whole or paused, from the engine that had it last."""
        if index in self.done:
            return
        if completion.finish == PAUSED:
            self.requests[index] = replace(self.requests[index], begun=completion)
        else:
            self.done[index] = completion
            self.on_done(index, completion)

    def put_back(self, indices: Sequence[int]) -> None:
        """What of these is not done goes to whichever engine is free next."""
        left = [i for i in indices if i not in self.done]
        if left:
            self.waiting.append(left)


@dataclass(slots=True)
class Work:
    """Requests that one engine has."""

    number: int
    indices: list[int]
    call: port.Call
    news: port.Call | None = None
    asked: float = field(default_factory=time.monotonic)
    heard: int = 0
    """Answers that it told of while it works on others."""
    tokens: int = 0
    changed: float = field(default_factory=time.monotonic)
    """When its progress was last another one."""


@dataclass(slots=True)
class Seat:
    """The place of one engine, whichever process fills it."""

    number: int
    worker: port.Worker | None = None
    version: int | None = None
    taking: tuple[port.Call, Parcel | None] | None = None
    """Weights on their way to it; none while its engine is made."""
    work: Work | None = None
    losses: int = 0
    """In a row."""
    vacant_until: float = 0.0
    said: bool = False
    """That it waits for room."""

    def __str__(self) -> str:
        return f"engine {self.number}"


class Engines:
    """Tokens in, tokens out, from the weights of `version`. One thread at a time uses it."""

    def __init__(
        self,
        spawn: Callable[[int], port.Worker],
        has_room: Callable[[int], bool],
        placement: Placement,
        road: Reading | Broadcasting,
        turn: Callable[[], None],
    ) -> None:
        """`spawn` starts the engine of a number, which waits for room where its node was lost and no other has any;
        `turn` is called before they sample: where learners share their devices it may put these to sleep."""
        self._spawn, self._has_room, self._turn = spawn, has_room, turn
        self.placement, self._road = placement, road
        self.seats = [Seat(number) for number in range(placement.engines)]
        self.version = self._calls = 0
        self._parcel: Parcel | None = None
        self._offered: Parcel | None = None
        self._closing = self._awake = False

    def update(self, parcel: Parcel) -> None:
        """All engines take a version of the weights; those that are lost do so when they are back."""
        self._offered = parcel
        self.settle()

    def offer(self, parcel: Parcel) -> None:
        """From now on answers come from these weights, those in the making from their next token on. Any thread may
        call this."""
        self._offered = parcel
        for seat in self.seats:
            if (worker := seat.worker) is not None:
                worker.call("pause", parcel.offer.version)

    def settle(self) -> None:
        """Wait until the engines have what was offered last."""
        self._tend()
        while any(map(self._awaited, self.seats)) or not any(map(self._ready, self.seats)):
            self._wait([seat.taking[0] for seat in self.seats if seat.taking])
            self._tend()

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        poll: Callable[[int, int], None],
        on_done: Callable[[int, Completion], None],
    ) -> list[Completion]:
        """One completion per request, in order; `on_done(index, completion)` sees each within a second."""
        self._turn()
        if any(seat.version == ASLEEP for seat in self.seats):
            self.settle()
        self._awake = True
        job = Job(list(requests), params, on_done)
        job.waiting.extend(shares(requests, max(1, sum(map(self._ready, self.seats)))))
        try:
            while len(job.done) < len(requests):
                self._tend()
                for seat in filter(self._idle, self.seats):
                    if job.waiting:
                        self._hand_out(seat, job)
                working = [(seat, seat.work) for seat in self.seats if seat.work]
                calls = [call for _, work in working for call in (work.call, work.news) if call]
                self._wait([*calls, *(seat.taking[0] for seat in self.seats if seat.taking)])
                for seat, work in working:
                    self._look_after(seat, work, job)
                busy = sum(work.tokens for seat in self.seats if (work := seat.work))
                poll(len(job.done), job.tokens + busy)
        finally:
            self._abandon()
        return [job.done[i] for i in range(len(requests))]

    def sleep(self) -> None:
        """Give the devices' memory away, and with it the weights, until these are sent again or others come."""
        if not self._awake:
            return
        self._awake = False
        calls = [(s, s.worker.call("sleep")) for s in self.seats if s.worker and not s.taking and not s.work]
        for seat, call in calls:
            self._result(seat, call)
            if seat.worker is not None:
                seat.version = ASLEEP

    def end(self) -> None:
        """Give the devices' memory away for good, when nobody is to ask for answers any more."""
        for seat in self.seats:
            if seat.worker is not None:
                seat.worker.kill()

    def close(self) -> None:
        """Whoever still waits for answers gets an error."""
        self._closing = True

    def _awaited(self, seat: Seat) -> bool:
        """Weights are on their way to it, and it is not one that replaces another, which nobody waits for."""
        return seat.taking is not None and (seat.version is not None or not seat.losses)

    def _pauses(self, seat: Seat) -> bool:
        """It is at work with older weights, from which it will soon turn away."""
        return seat.work is not None and seat.version != self.version

    def _ready(self, seat: Seat) -> bool:
        return seat.worker is not None and not seat.taking and seat.version == self.version

    def _idle(self, seat: Seat) -> bool:
        return self._ready(seat) and seat.work is None

    def _tend(self) -> None:
        """Fill vacant seats whose time has come, and bring those behind to the weights offered last."""
        assert self._offered is not None, "engines get weights before they are asked for answers"
        self._parcel, self.version = self._offered, self._offered.offer.version
        for seat in self.seats:
            if seat.worker is None and time.monotonic() >= seat.vacant_until:
                seat.worker, seat.version = self._spawn(seat.number), None
                seat.taking = (seat.worker.call("build"), None)
            if seat.worker is not None and seat.taking and seat.work is None:
                self._finish_taking(seat)
        if self._road.waits(any(self._awaited(seat) or self._pauses(seat) for seat in self.seats)):
            return
        behind = [
            s for s in self.seats if s.worker and not s.work and not s.taking and s.version != self.version
        ]
        offers = self._road.offers(self._parcel, [seat.worker for seat in behind if seat.worker])
        for seat, offer in zip(behind, offers):
            assert seat.worker
            seat.taking = (seat.worker.call("update", offer, self._parcel.probe), self._parcel)

    def _finish_taking(self, seat: Seat) -> None:
        """Weights that have arrived are proved; those that take too long are lost with their engine."""
        assert seat.taking and seat.worker
        call, parcel = seat.taking
        limit = self.placement.start_timeout_s if parcel is None else self.placement.engine_timeout_s
        if not call.done() and (call.seconds < limit or self._waits_for_room(seat)):
            self._say_if_it_waits(seat)
            return
        seat.taking = None
        try:
            told = self._result(seat, call)
        except RoadBroken as cause:
            self._road.broke(cause)
            return
        if seat.worker is None:
            return
        if parcel is None:
            seat.worker.place = told
            return
        if scores := told:
            parcel.check(str(seat.worker), scores)
        seat.version = parcel.offer.version

    def _waits_for_room(self, seat: Seat) -> bool:
        """An engine of a lost node has no other yet, and is not needed while others serve."""
        if seat.version is not None or not seat.losses or self._has_room(seat.number):
            return False
        if not any(map(self._serves, self.seats)):
            raise RunError(
                f"no engine is left, and for {self.placement.start_timeout_s:g} s (placement.start_timeout_s) no node "
                "of the cluster had room for another. The same command goes on from the last checkpoint"
            )
        return True

    def _say_if_it_waits(self, seat: Seat) -> None:
        assert seat.taking
        replaces, serving = seat.version is None and seat.losses, sum(map(self._serves, self.seats))
        if seat.said or not (replaces and serving and seat.taking[0].seconds > ROOM_S):
            return
        if not self._has_room(seat.number):
            seat.said = True
            words = "%s waits for a node with room for it; the run goes on with %d of %d engines"
            log.warning(words, seat, serving, len(self.seats))

    def _serves(self, seat: Seat) -> bool:
        return seat.version is not None

    def _hand_out(self, seat: Seat, job: Job) -> None:
        assert seat.worker
        self._calls += 1
        indices = job.waiting.popleft()
        mine = [replace(job.requests[i], version=self.version) for i in indices]
        call = seat.worker.call("generate", self._calls, mine, job.params, self.version)
        seat.work = Work(self._calls, indices, call)

    def _look_after(self, seat: Seat, work: Work, job: Job) -> None:
        """Take the answers of an engine, or ask how far it is, or give up on it."""
        assert seat.worker
        silent = time.monotonic() - work.changed
        if work.call.done():
            seat.work = None
            answers = self._result(seat, work.call)
            if seat.worker is None:
                job.put_back(work.indices)
                return
            seat.losses, seat.said = 0, False
            for index, completion in zip(work.indices, answers):
                job.tokens += len(completion.tokens) - len(job.requests[index].begun.tokens)
                job.take(index, completion)
            job.put_back(work.indices)
        elif silent > self.placement.engine_timeout_s:
            seat.work = None
            job.put_back(work.indices)
            self._lose(seat, WorkerLost(
                f"{seat.worker} had no news of {len(work.indices)} answers for {silent:.0f} s "
                f"(placement.engine_timeout_s); its log: {seat.worker.log}"
            ))  # fmt: skip
        elif work.news is not None:
            self._hear(work, job)
        elif time.monotonic() - work.asked > NEWS_S:
            work.news, work.asked = seat.worker.call("progress", work.number, work.heard), time.monotonic()

    def _hear(self, work: Work, job: Job) -> None:
        assert work.news
        if not work.news.done():
            return
        news, work.news = work.news, None
        try:
            progress: Progress = news.result(0)
        except WorkerLost:
            return  # The work itself fails next, with the reason.
        if progress.answers or progress.tokens != work.tokens:
            work.tokens, work.changed = progress.tokens, time.monotonic()
        work.heard += len(progress.answers)
        for place, completion in progress.answers:
            job.take(work.indices[place], completion)

    def _result(self, seat: Seat, call: port.Call) -> Any:
        """The value of a call that is done or overdue; None, and a vacant seat, where the engine is lost."""
        try:
            return call.result(self.placement.engine_timeout_s if call.method == "sleep" else 0)
        except WorkerLost as lost:
            self._lose(seat, lost)
            return None

    def _lose(self, seat: Seat, lost: WorkerLost) -> None:
        """Vacate the seat for a while that doubles; too many losses in a row end the run."""
        assert seat.worker
        self._road.part(seat.worker)
        seat.worker.kill()
        seat.worker, seat.version, seat.work, seat.taking = None, None, None, None
        seat.losses += 1
        if seat.losses > self.placement.restarts:
            raise RunError(
                f"{seat} was lost {seat.losses} times in a row (placement.restarts={self.placement.restarts}). "
                f"The last time: {lost}"
            )
        pause = self.placement.backoff_s * 2 ** (seat.losses - 1)
        seat.vacant_until = time.monotonic() + pause
        log.warning("%s\nanother process takes its place in %g s; its answers go elsewhere", lost, pause)

    def _wait(self, calls: Sequence[port.Call]) -> None:
        if self._closing:
            raise RunError("the run is ending; no more answers")
        if calls:
            port.first_done(calls, LOOK_S)
        else:
            time.sleep(LOOK_S)

    def _abandon(self) -> None:
        """After an error or a signal: engines at work stop soon, and none of them is waited for."""
        for seat in self.seats:
            if seat.work and seat.worker:
                seat.worker.call("abandon")
                seat.work = None


def shares(requests: Sequence[Request], count: int) -> Iterator[list[int]]:
    """Indices of the requests in at most `count` shares of about equal size; those with one prompt, whose computation
    is shared, stay neighbours."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        places.setdefault(request.tokens, []).append(i)
    order = [i for indices in places.values() for i in indices]
    size = -(-len(order) // count)
    for start in range(0, len(order), size):
        yield order[start : start + size]
