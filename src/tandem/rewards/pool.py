"""Worker processes that are watched: tasks are spread over them, a late one is killed, a dead one replaced.

Each worker holds several tasks at a time, so that it never waits for the parent; the clock is restarted at
every result, so that a deadline still speaks of one task. After a kill only what had no result is given out
again.
"""

import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tandem.errors import ConfigError, SamplingError
from tandem.rewards.process import START_S, Task, WorkerProcess, environment

AHEAD = 16
"""Tasks a worker holds at most."""
RECYCLE = 10_000
"""Tasks after which a worker is replaced, so that what leaks in it is bounded."""


class Pool:
    """`size` workers that are already starting when the constructor returns."""

    def __init__(self, setup: Mapping[str, Any], size: int) -> None:
        self._setup = setup
        self._env = environment()
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._lock = threading.RLock()
        self._kinds: list[str] | None = None
        self._waiting: deque[Task] = deque()
        self.workers: list[WorkerProcess] = []
        for _ in range(size):
            self.workers.append(self._start())

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(self._setup, self._env)
        self._selector.register(worker.wire, selectors.EVENT_READ, worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)
        return worker

    def _end(self, worker: WorkerProcess) -> str:
        for stream in (worker.wire, worker.output):
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
        return worker.end()

    def _replace(self, worker: WorkerProcess) -> str:
        """A new worker in its place; what it still owed is given out again, in order."""
        how = self._end(worker)
        self._waiting.extendleft(t for t in reversed(worker.owed) if t.outcomes is None)
        self.workers[self.workers.index(worker)] = self._start()
        return how

    def kinds(self) -> list[str]:
        """How each function is called; waits for a worker. ConfigError if a function cannot be loaded."""
        with self._lock:
            self._begin()
            while self._kinds is None:
                self._turn()
            return self._kinds

    def run(self, more: Callable[[], Sequence[Task] | None]) -> float:
        """Score the tasks that `more` brings until it says None; each has its outcomes when this returns. `more` is
        asked again whenever something happens, and after `ring`; it may raise to drop all that is under way. Returns
        the seconds in which there was something to score."""
        with self._lock:
            done, busy_s = False, 0.0
            try:
                self._begin()
                while (tasks := more()) is not None or self._busy():
                    self._waiting.extend(tasks or ())
                    busy, began = self._busy(), time.monotonic()
                    self._turn()
                    busy_s += busy * (time.monotonic() - began)
                done = True
            finally:
                if not done:
                    self._restart()
            return busy_s

    def ring(self) -> None:
        """Whoever runs, in another thread, asks for more tasks now."""
        with suppress(OSError):  # more rings wait to be heard than fit, or nobody is there any more
            self._bell.send(b"!")

    def check_open(self) -> None:
        if not self.workers:
            raise SamplingError("the scorer is closed")

    def _busy(self) -> bool:
        return bool(self._waiting) or any(t.outcomes is None for t in self._owed())

    def _owed(self) -> list[Task]:
        return [t for w in self.workers for t in w.owed]

    def _begin(self) -> None:
        """Replace workers that died while idle."""
        self.check_open()
        for worker in list(self.workers):
            status = worker.process.poll()
            if status is not None and (worker.ready or status == -signal.SIGKILL):
                self._replace(worker)

    def _restart(self) -> None:
        """After an interruption nothing of the old work may reach the next call."""
        self._waiting.clear()
        for worker in list(self.workers):
            worker.owed.clear()
            self._replace(worker)

    def _turn(self) -> None:
        """Give out, wait, take in, and end what is late."""
        for worker in self.workers:
            if not worker.ready and worker.deadline is None:
                worker.expect(START_S)  # It is waited for only now.
        for worker in list(self.workers):
            if worker.answered >= RECYCLE and not worker.owed:
                self._replace(worker)
        for worker in self.workers:
            self._give(worker)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.wants_to_write else 0)
            self._selector.modify(worker.wire, events, worker)
        now = time.monotonic()
        deadlines = [w.deadline for w in self.workers if w.deadline is not None]
        for key, mask in self._selector.select(max(0.0, min(deadlines, default=now + 1.0) - now)):
            worker = key.data
            if key.fileobj is self._ear:
                self._ear.recv(1 << 12)
                continue
            if worker not in self.workers:
                continue
            if key.fileobj is worker.output:
                if not worker.drain():
                    self._selector.unregister(worker.output)
                continue
            if mask & selectors.EVENT_WRITE:
                worker.flush()
            if mask & selectors.EVENT_READ:
                self._take(worker)
        now = time.monotonic()
        for worker in list(self.workers):
            if worker.deadline is not None and worker.deadline <= now:
                self._expire(worker)

    def _give(self, worker: WorkerProcess) -> None:
        share = -(-len(self._waiting) // (2 * len(self.workers)))
        ahead = min(AHEAD, max(1, share))
        while worker.ready and self._waiting and len(worker.owed) < ahead and worker.answered < RECYCLE:
            worker.post(self._waiting.popleft())
            worker.answered += 1

    def _take(self, worker: WorkerProcess) -> None:
        messages = worker.receive()
        if messages is None:
            self._bury(worker)
            return
        for message in messages:
            if "refused" in message:
                self.close()
                raise ConfigError(message["refused"])
            if "ready" in message:
                self._kinds = message["ready"]
                worker.ready = True
            else:
                if not worker.owed or not worker.owed[0].accept(message):
                    self._bury(worker)
                    return
                worker.owed.popleft()
            worker.expect(worker.owed[0].seconds if worker.owed else None)

    def _expire(self, worker: WorkerProcess) -> None:
        if not worker.ready:
            how = self._dismiss(worker)
            raise SamplingError(f"a reward worker did not import its functions within {START_S:g} s ({how})")
        late = worker.owed[0]
        late.fail("timeout", f"no result within {late.seconds:g} s")
        self._replace(worker)

    def _bury(self, worker: WorkerProcess) -> None:
        """A worker is gone: what it was at is tried once more, elsewhere, then given up."""
        if not worker.ready:
            how = self._dismiss(worker)
            raise SamplingError(
                f"a reward worker died while it imported its functions ({how}); "
                "if memory was short, raise reward.memory_mb"
            )
        task = worker.owed[0] if worker.owed else None
        how = self._replace(worker)
        if task is None:
            return
        task.lives -= 1
        if task.lives == 0:
            self._waiting.remove(task)
            task.fail("died", f"the worker process ended twice ({how})")

    def _dismiss(self, worker: WorkerProcess) -> str:
        """End a worker that never got ready, and the others with it; say how it ended."""
        self.workers.remove(worker)
        how = self._end(worker)
        self.close()
        return how

    def close(self) -> None:
        """Kill the workers and their children, and wait until they are gone."""
        with self._lock:
            for worker in self.workers:
                self._end(worker)
            self.workers.clear()
            self._selector.close()
            self._bell.close()
            self._ear.close()
