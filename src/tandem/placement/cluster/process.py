"""What every worker process does first: its log, its threads, and stacks in the log when it crashes."""

import faulthandler
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch

from tandem.config.run import Run
from tandem.device import set_threads
from tandem.placement.cluster import port


class Process:
    """A worker of the run. `log` takes what it prints."""

    def __init__(self, log: str, run: Run) -> None:
        self.run = run
        self.log, self._moved = keep_log(Path(log))
        logging.getLogger("tandem.worker").info("%s: %s", self.log.stem, self.place())
        set_threads(run.placement.cpus)
        torch.manual_seed(run.seed)

    def place(self) -> str:
        return port.whereabouts() + (f", log {self.log}" if self._moved else "")

    def gpus(self) -> list[str]:
        """Those that this process has, by the names that they have on its node."""
        return port.own_gpus()

    def meeting_point(self) -> str:
        """host:port at which other processes can find this one; the port was free just now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{port.own_address()}:{probe.getsockname()[1]}"


def keep_log(path: Path) -> tuple[Path, bool]:
    """Everything this process and its children print goes to a file of its own; returns its path, and whether that is
    another one, for there is no such folder on this node and none can be made."""
    moved = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        path, moved = Path(tempfile.mkdtemp(prefix="tandem-logs-")) / path.name, True
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    return path, moved
