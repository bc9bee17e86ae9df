"""Sampling beside training: one thread does everything that engines are asked for, in the order it was asked.

So the answers of step s + lag come from exactly the weights of step s, as in one process: a run with lag is the same
run wherever it is placed, only that its stages overlap. With weights in flight they begin with those of step s or newer
ones, and go on with what is published meanwhile; then steps are sampled side by side.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from tandem.data.cursor import Cursor
from tandem.engine import SamplingParams
from tandem.rollout import TRAIN, Drawn, Sampler, Stream, ahead_of, due, lag_figures
from tandem.types import Group, Prompt

T = TypeVar("T")


class Line:
    """What is asked of it first is begun first, and done first where it has one thread. After an error it does nothing
    but repeat it."""

    def __init__(self, threads: int = 1) -> None:
        self._thread = ThreadPoolExecutor(threads, thread_name_prefix="sampling")
        self._last: Future[Any] | None = None

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        self._last = future = self._thread.submit(self._run, self._last, work)
        return future

    def _run(self, before: "Future[Any] | None", work: Callable[[], T]) -> T:
        if before is not None and before.done():
            before.result()
        return work()

    @property
    def failed(self) -> bool:
        """It does nothing any more."""
        last = self._last
        return last is not None and last.done() and not last.cancelled() and last.exception() is not None

    def close(self) -> None:
        """What was not begun is dropped; what was begun must come to its end soon."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class SamplerInLine:
    """The sampler for whoever is not in the line: what is asked of it waits its turn."""

    def __init__(self, sampler: Sampler, line: Line) -> None:
        self._sampler, self._line = sampler, line
        self.params, self.run = sampler.params, sampler.run
        self.version = sampler.version
        """Of the weights that the next answers come from."""

    @property
    def poll(self) -> Callable[[int, int, int], None]:
        return self._sampler.poll

    @poll.setter
    def poll(self, poll: Callable[[int, int, int], None]) -> None:
        self._sampler.poll = poll

    def sample(
        self,
        prompts: Sequence[Prompt],
        serials: Sequence[int],
        *,
        answers: int,
        params: SamplingParams | None = None,
        domain: int = TRAIN,
    ) -> list[Group]:
        """As `Sampler.sample`."""
        work = self._sampler.sample
        return self._line.submit(
            lambda: work(prompts, serials, answers=answers, params=params, domain=domain)
        ).result()

    def take_seconds(self) -> dict[str, float]:
        return self._sampler.take_seconds()


@dataclass(frozen=True, slots=True)
class Ahead:
    """One step's groups, and the place in the data after them."""

    drawn: Drawn
    cursor: Mapping[str, int]


class AheadStream:
    """As `Stream`, but groups of later steps are sampled while those of this one are trained on."""

    def __init__(self, stream: Stream, line: Line) -> None:
        self._stream, self._line = stream, line
        self.prompts, self.watch = stream.prompts, stream.watch
        self.cursor = Cursor(stream.cursor.size, stream.cursor.seed, stream.cursor.shuffle)
        """Behind the groups that were handed out."""
        self.last: dict[str, float] = {}
        """Figures of the groups handed out last."""
        self._ahead: deque[Future[Ahead]] = deque()
        self._latest: Future[Ahead] | None = None

    @property
    def newest(self) -> list[Group]:
        """As of `Stream`; waits for them."""
        return [] if self._latest is None else self._latest.result().drawn.groups

    def take(self, version: int) -> list[Group]:
        """The groups of the next step; `version` counts the steps whose weights were published."""
        run = self._stream.sampler.run
        while len(self._ahead) < due(run, version):
            self._latest = self._draw()
            self._ahead.append(self._latest)
        began = time.monotonic()
        ahead = self._ahead.popleft().result()
        waited = time.monotonic() - began
        self.cursor.restore(ahead.cursor)
        self.watch.observe(ahead.drawn.scores)
        lags = lag_figures(ahead.drawn.groups, version, run.sampling)
        self.last = {**ahead.drawn.figures, **lags, "timing/non_overlap_rollout": waited}
        return ahead.drawn.groups

    def mark(self) -> Callable[[], dict[str, Any]]:
        """What a checkpoint of this moment needs. The call waits for groups that are being sampled; those that come
        to nothing, because the run was stopped, are drawn anew when it goes on."""
        cursor, pending = self.cursor.state(), list(self._ahead)

        def state() -> dict[str, Any]:
            place, ready = cursor, []
            for future in pending:
                wait([future])
                if future.cancelled() or future.exception() is not None:
                    break
                place = future.result().cursor
                ready.append(future.result().drawn.record())
            return {"cursor": dict(place), "ahead": ready}

        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Groups sampled ahead come from the checkpoint; the place in the data is behind them."""
        self.cursor.restore(state["cursor"])
        self._stream.cursor.restore(state["cursor"])
        self._ahead.clear()
        for drawn in ahead_of(state, self.prompts, self._stream.sampler.run):
            future: Future[Ahead] = Future()
            future.set_result(Ahead(drawn, state["cursor"]))
            self._ahead.append(future)

    def _draw(self) -> "Future[Ahead]":
        stream = self._stream
        if stream.sampler.run.algorithm.keep != "all":
            return self._line.submit(lambda: Ahead(stream.draw(), stream.cursor.state()))
        # Which prompts it takes does not depend on their answers, so the next draw may begin before this one is done.
        asked, place = stream.ask(), stream.cursor.state()
        return self._line.submit(lambda: Ahead(stream.draw(asked), place))
