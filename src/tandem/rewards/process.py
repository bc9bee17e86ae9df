"""One worker process as the parent sees it: its wire, its clock, what it still owes."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.rewards.channel import MAX_REPLY, Inbox, frame

START_S = 120.0
"""Seconds in which a worker must have imported its functions."""
TAIL = 2000
"""Characters of a worker's output that are kept for the message about its end."""
_READ = 1 << 18


@dataclass(slots=True, kw_only=True, eq=False)
class Task:
    """Answers that are scored in one go, and what became of them."""

    number: int
    message: bytes
    size: int
    """Answers in it."""
    names: str
    """Its functions, for messages."""
    seconds: float
    """Wall time it may take."""
    lives: int = 2
    """Workers it may still take down before it is given up."""
    outcomes: Sequence[Mapping[str, Any]] | None = None

    def accept(self, reply: Mapping[str, Any]) -> bool:
        """Take the outcomes from a worker's reply; False if it is no reply to this task."""
        outcomes = reply.get("outcomes")
        if reply.get("task") != self.number or not isinstance(outcomes, list) or len(outcomes) != self.size:
            return False
        self.outcomes = outcomes
        return True

    def fail(self, kind: str, detail: str) -> None:
        self.outcomes = [{"failure": kind, "detail": f"{self.names}: {detail}"}] * self.size


def environment() -> dict[str, str]:
    """A worker finds what this process finds, then the current folder; its libraries use one thread."""
    paths = [p for p in sys.path if p]
    env = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
    }
    return {**env, "PYTHONPATH": os.pathsep.join([*paths, str(Path.cwd())])}


class WorkerProcess:
    """Started in its own session, so that a kill takes its children along."""

    def __init__(self, setup: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self.wire, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-P",
            "-m",
            "tandem.rewards.worker",
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=env,
        )
        theirs.close()
        self.wire.setblocking(False)
        assert self.process.stdout is not None
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.ready = False
        self.owed: deque[Task] = deque()
        self.deadline: float | None = None
        self.answered = 0
        self._inbox = Inbox(MAX_REPLY)
        self._outgoing = bytearray(frame(setup))
        self._tail = b""
        self.flush()

    def expect(self, seconds: float | None) -> None:
        """Start the clock for the next thing owed, or stop it."""
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def post(self, task: Task) -> None:
        if not self.owed:
            self.expect(task.seconds)
        self.owed.append(task)
        self._outgoing += task.message
        self.flush()

    @property
    def wants_to_write(self) -> bool:
        return bool(self._outgoing)

    def flush(self) -> None:
        """Send what the wire takes now. A broken wire shows when it is read."""
        while self._outgoing:
            try:
                sent = self.wire.send(self._outgoing)
            except BlockingIOError:
                return
            except OSError:
                self._outgoing.clear()
                return
            del self._outgoing[:sent]

    def receive(self) -> list[Any] | None:
        """Messages that have come; None when the worker is gone or talks nonsense."""
        try:
            data = self.wire.recv(_READ)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        with suppress(ValueError):
            return list(self._inbox.feed(data))
        return None

    def drain(self) -> bool:
        """Keep the end of what the worker printed; False when it closed its output."""
        try:
            data = os.read(self.output.fileno(), _READ)
        except BlockingIOError:
            return True
        self._tail = (self._tail + data)[-TAIL:]
        return bool(data)

    def end(self) -> str:
        """Kill the process group, and say how the process ended (by itself, if it had) and its last words."""
        # A wire that just closed is a process about to end: its own exit status tells more than our kill.
        if select.select([self.wire], [], [], 0)[0]:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        while select.select([self.output], [], [], 0)[0] and self.drain():
            pass
        self.wire.close()
        self.output.close()
        how = f"signal {-status}, {signal.strsignal(-status)}" if status < 0 else f"exit status {status}"
        words = self._tail.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return f"{how}; last output: {words[:300]!r}" if words else how
