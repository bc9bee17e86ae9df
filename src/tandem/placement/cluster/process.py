"""What every worker process does first: its log, its threads, and stacks in the log when it crashes."""

import faulthandler
import logging
import os
import socket
import sys
from pathlib import Path

import torch

from tandem.config.run import Run
from tandem.device import set_threads
from tandem.placement.cluster import port


class Process:
    """A worker of the run. `log` takes what it prints."""

    def __init__(self, log: str, run: Run) -> None:
        self.run = run
        keep_log(Path(log))
        logging.getLogger("tandem.worker").info("%s: %s", Path(log).stem, self.place())
        set_threads(run.placement.cpus)
        torch.manual_seed(run.seed)

    def place(self) -> str:
        return port.whereabouts()

    def meeting_point(self) -> str:
        """host:port at which other processes can find this one; the port was free just now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{port.own_address()}:{probe.getsockname()[1]}"


def keep_log(path: Path) -> None:
    """Everything this process and its children print goes to a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
