"""Several engines as one: answers are shared out, and what a lost engine was working on goes to another.

An engine that is started anew serves only after it has taken the weights of the present version.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tandem.config.placement import Placement
from tandem.engine import Completion, Request, SamplingParams
from tandem.engine.roads import RoadBroken
from tandem.errors import RunError
from tandem.placement.cluster import port
from tandem.placement.cluster.broadcast import Broadcasting, Reading
from tandem.placement.cluster.engine_worker import Progress
from tandem.placement.cluster.job import Job, Work, shares
from tandem.placement.cluster.limit import Limit, engine_limit, start_limit
from tandem.placement.cluster.lost import EnginesLost, WorkerLost
from tandem.placement.cluster.parcel import Parcel

log = logging.getLogger("tandem.engines")

ROOM_S = 5.0
"""An engine that is still being placed after so long may have no node that takes it."""
END_S = 5.0
"""Longest wait for an engine that ends."""
LOOK_S = 0.2
"""Longest wait before signals and restarts are looked after again."""
ASLEEP = -1
"""In the place of the version of an engine that sleeps."""
NEWS_S = 0.25
"""Seconds between two questions to an engine for how far it is."""


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
    """Tokens in, tokens out, from the weights of `version`."""

    def __init__(
        self,
        spawn: Callable[[int], port.Worker],
        lacks: Callable[[int], str],
        placement: Placement,
        road: Reading | Broadcasting,
        turn: Callable[[], None],
        made: Callable[[], None],
    ) -> None:
        """`spawn` starts the engine of a number, which waits for room where its node was lost and no other has any:
        `lacks` says what it needs of a node then, and nothing otherwise. `turn` is called before they sample: where
        learners share their devices it may put these to sleep. `made` is called when an engine and all its processes
        are there."""
        self._spawn, self._lacks, self._turn, self._made = spawn, lacks, turn, made
        self.placement, self._road = placement, road
        self.seats = [Seat(number) for number in range(placement.engines)]
        self.version = self._calls = 0
        self._parcel: Parcel | None = None
        self._offered: Parcel | None = None
        self._jobs: list[Job] = []
        self._turns = threading.Lock()
        """Of the threads that look after the engines."""
        self._closing = self._awake = False

    def fill(self) -> None:
        """Start an engine in each vacant seat whose time has come; it is being made when this returns."""
        for seat in self.seats:
            if seat.worker is None and time.monotonic() >= seat.vacant_until:
                seat.worker, seat.version = self._spawn(seat.number), None
                seat.taking = (seat.worker.call("build"), None)

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
        settled = False
        try:
            while not settled:
                with self._turns:
                    self._tend()
                    settled = not any(map(self._awaited, self.seats)) and any(map(self._ready, self.seats))
                    calls = [seat.taking[0] for seat in self.seats if seat.taking]
                if not settled:
                    self._wait(calls)
        finally:
            if not settled:
                with self._turns:
                    self._abandon(sys.exception())

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        poll: Callable[[int, int], None],
        on_done: Callable[[int, Completion], None],
    ) -> list[Completion]:
        """One completion per request, in order; `on_done(index, completion)` sees each within a second. While one
        thread waits for its answers others may ask too: what was asked for first is begun first."""
        self._turn()
        if any(seat.version == ASLEEP for seat in self.seats):
            self.settle()
        self._awake = True
        job = Job(list(requests), params, on_done)
        job.waiting.extend(shares(requests, max(1, sum(map(self._ready, self.seats)))))
        self._jobs.append(job)
        try:
            while not job.complete:
                self._advance()
                if job.error is not None:
                    raise job.error
                busy = sum(work.tokens for seat in self.seats if (work := seat.work))
                poll(len(job.done), job.tokens + busy)
        finally:
            with self._turns:
                self._jobs.remove(job)
                self._abandon(None if job.complete else sys.exception())
        return [job.done[i] for i in range(len(requests))]

    def _advance(self) -> None:
        """Hand out what waits, wait a moment, and look what has come, for all jobs."""
        with self._turns:
            self._tend()
            for seat in filter(self._idle, self.seats):
                self._hand_out(seat)
            working = [work for seat in self.seats if (work := seat.work)]
            calls = [call for work in working for call in (work.call, work.news) if call]
            calls += [seat.taking[0] for seat in self.seats if seat.taking]
        self._wait(calls)
        with self._turns:
            for seat in self.seats:
                if seat.work is not None:
                    self._look_after(seat, seat.work)

    def sleep(self) -> None:
        """Give the devices' memory away, and with it the weights, until these are sent again or others come."""
        if not self._awake:
            return
        self._awake = False
        calls = [(s, s.worker.call("sleep")) for s in self.seats if s.worker and not s.taking and not s.work]
        for seat, call in calls:
            self._result(seat, call, engine_limit(self.placement))
            if seat.worker is not None:
                seat.version = ASLEEP

    def end(self) -> None:
        """Give the devices' memory away for good, when nobody is to ask for answers any more."""
        for seat in self.seats:
            if seat.worker is not None:
                seat.worker.kill()

    def close(self) -> None:
        """Whoever still waits for answers gets an error; engines that are idle end with all their processes."""
        self._closing = True
        with self._turns:
            ends = time.monotonic() + END_S
            taking = [seat.taking[0] for seat in self.seats if seat.taking and seat.taking[1]]
            idle = [seat.worker for seat in self.seats if seat.worker and not seat.work]
            for call in [*taking, *(worker.call("close") for worker in idle)]:
                call.settle(max(0.0, ends - time.monotonic()))

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
        """Fill vacant seats, and bring those behind to the weights offered last."""
        assert self._offered is not None, "engines get weights before they are asked for answers"
        self._parcel, self.version = self._offered, self._offered.offer.version
        self.fill()
        for seat in self.seats:
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
            probe = self._parcel.probe
            tokens = None if probe is None else probe.tokens
            seat.taking = (seat.worker.call("update", offer, tokens), self._parcel)

    def _finish_taking(self, seat: Seat) -> None:
        """Weights that have arrived are proved; those that take too long are lost with their engine."""
        assert seat.taking and seat.worker
        call, parcel = seat.taking
        limit = (start_limit if parcel is None else engine_limit)(self.placement)
        if not call.done() and (call.seconds < limit.seconds or self._waits_for_room(seat)):
            self._say_if_it_waits(seat)
            return
        seat.taking = None
        try:
            told = self._result(seat, call, limit)
        except RoadBroken as cause:
            self._road.broke(cause)
            return
        if seat.worker is None:
            return
        if parcel is None:
            seat.worker.place = told
            self._made()
            # It takes its memory when it is made, before anybody asks for answers.
            self._awake = True
            return
        if parcel.probe is not None:
            parcel.probe.check(str(seat.worker), parcel.offer.version, told)
        seat.version = parcel.offer.version

    def _waits_for_room(self, seat: Seat) -> bool:
        """An engine of a lost node has no other yet, and is not needed while others serve or are being made."""
        if seat.version is not None or not seat.losses or not (need := self._lacks(seat.number)):
            return False
        if not any(self._serves(other) or not self._lacks(other.number) for other in self.seats):
            raise EnginesLost(
                f"no engine is left: for {self.placement.start_timeout_s:g} s (placement.start_timeout_s) no node of "
                f"the cluster had room for {seat}, which takes {need}. Add a node that has, and the same command goes "
                "on from the step that could not be sampled"
            )
        return True

    def _say_if_it_waits(self, seat: Seat) -> None:
        assert seat.taking
        replaces, serving = seat.version is None and seat.losses, sum(map(self._serves, self.seats))
        if (
            seat.said
            or not replaces
            or seat.taking[0].seconds < ROOM_S
            or not (need := self._lacks(seat.number))
        ):
            return
        seat.said = True
        until = f"no other is left, so the run ends after {self.placement.start_timeout_s:g} s"
        outlook = f"the run goes on with {serving} of {len(self.seats)} engines" if serving else until
        log.warning("%s waits for a node with room for it (%s); %s", seat, need, outlook)

    def _serves(self, seat: Seat) -> bool:
        return seat.version is not None

    def _hand_out(self, seat: Seat) -> None:
        """One share of each job that waits, so that the slots which the last answers of one leave free are filled with
        the next one's."""
        assert seat.worker
        answers: list[tuple[Job, int]] = []
        for job in self._jobs:
            if job.waiting and (not answers or job.params == answers[0][0].params):
                answers += [(job, index) for index in job.waiting.popleft()]
        if not answers:
            return
        self._calls += 1
        mine = [replace(job.requests[i], version=self.version) for job, i in answers]
        call = seat.worker.call("generate", self._calls, mine, answers[0][0].params, self.version)
        seat.work = Work(self._calls, answers, call)

    def _look_after(self, seat: Seat, work: Work) -> None:
        """Take the answers of an engine, or ask how far it is, or give up on it."""
        assert seat.worker
        silent = time.monotonic() - work.changed
        if work.call.done():
            seat.work = None
            completions = self._result(seat, work.call, engine_limit(self.placement))
            if seat.worker is not None:
                seat.losses, seat.said = 0, False
                for (job, index), completion in zip(work.answers, completions):
                    job.tokens += len(completion.tokens) - len(job.requests[index].begun.tokens)
                    job.take(index, completion)
            work.put_back()
        elif silent > self.placement.engine_timeout_s:
            seat.work = None
            work.put_back()
            self._lose(seat, WorkerLost(
                f"{seat.worker} had no news of {len(work.answers)} answers for {silent:.0f} s "
                f"(placement.engine_timeout_s); its log: {seat.worker.log}"
            ))  # fmt: skip
        elif work.news is not None:
            self._hear(work)
        elif time.monotonic() - work.asked > NEWS_S:
            work.news, work.asked = seat.worker.call("progress", work.number, work.heard), time.monotonic()

    def _hear(self, work: Work) -> None:
        assert work.news
        if not work.news.done():
            return
        news, work.news = work.news, None
        try:
            progress: Progress = news.result(engine_limit(self.placement))
        except WorkerLost:
            return  # The work itself fails next, with the reason.
        if progress.answers or progress.tokens != work.tokens:
            work.tokens, work.changed = progress.tokens, time.monotonic()
        work.heard += len(progress.answers)
        for place, completion in progress.answers:
            job, index = work.answers[place]
            job.take(index, completion)

    def _result(self, seat: Seat, call: port.Call, limit: Limit) -> Any:
        """The value of a call that is done or overdue; None, and a vacant seat, where the engine is lost."""
        try:
            return call.result(limit)
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
            raise EnginesLost(
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

    def _abandon(self, error: BaseException | None) -> None:
        """Engines whose work nobody wants stop soon, and none of them is waited for. After an error or a signal nobody
        wants any."""
        for job in self._jobs if error else ():
            job.error = job.error or error
        for seat in self.seats:
            if seat.work and seat.worker and (error or not seat.work.wanted):
                seat.worker.call("abandon", seat.work.number)
                seat.work = None
