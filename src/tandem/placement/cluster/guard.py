"""A process that outlives the driver by a moment, to end and remove what a killed driver could not.

Ray's own processes die with the driver that started them, but for helpers that call a dead server for half a minute
first. The guard reads their names from a pipe; when the pipe closes, the driver is gone.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

log = logging.getLogger("tandem.cluster")

CLOSE_S = 10.0
"""Longest wait for the guard to end; it has nothing to do then."""


class Guard:
    """The driver's end: what shall be done when it is gone. `close` takes it all back."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tandem.placement.cluster.guard"],
            stdin=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )

    def watch(self) -> None:
        """End these processes, those that are there now."""
        for process in psutil.Process().children(recursive=True):
            if process.pid != self._process.pid:
                self._say(f"process {process.pid} {created(process.pid)}")

    def remove(self, folder: Path) -> None:
        """Remove this folder."""
        self._say(f"folder {folder}")

    def close(self) -> None:
        self._say("forget")
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            log.warning(
                "the guard, process %d, did not end within %g s; it is killed", self._process.pid, CLOSE_S
            )
            self._process.kill()
            self._process.wait(CLOSE_S)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
        except BrokenPipeError:
            log.warning(
                "the guard, process %d, is gone; if this process is killed, others of the run may outlive it",
                self._process.pid,
            )


def created(pid: int) -> float:
    """When a process began, so that no other one with its number is taken for it; 0 where there is none."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def main() -> None:
    watched: dict[int, str] = {}
    folders: list[str] = []
    for line in sys.stdin:
        kind, _, rest = line.rstrip("\n").partition(" ")
        if kind == "forget":
            return
        if kind == "folder":
            folders.append(rest)
        else:
            pid, began = rest.split()
            watched[int(pid)] = began
    for pid, began in watched.items():
        if str(created(pid)) == began:
            os.kill(pid, signal.SIGKILL)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
