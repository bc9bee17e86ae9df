"""The first SIGTERM or Ctrl-C ends a run in order, the second at once; so does the end of its terminal, in order."""

import os
import signal
import stat
from contextlib import suppress
from types import FrameType
from typing import Any

OUTPUTS = (1, 2)


class Interrupted(Exception):
    """The run was asked to stop; raised between tokens and between steps, where nothing is half done."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interruption:
    """While inside, notes the first signal; `check` then raises. The second one has its default effect, but for SIGHUP:
    a session that ends may send that more than once, and SIGTERM with it. It stays ignored where it is (nohup)."""

    ASKED = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
        self._before = {number: signal.signal(number, self._note) for number in (*self.ASKED, *hangup)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            say(
                f"{signal.Signals(number).name}: the run stops after the tokens or the update that it is at, and saves "
                "a checkpoint if it has come to its first step; a second signal ends it at once"
            )
        if number == signal.SIGHUP:
            let_go_of_terminal()
            return
        for each in self.ASKED:
            signal.signal(each, signal.SIG_DFL)

    def check(self) -> None:
        if self.number is not None:
            raise Interrupted(self.number)


def say(line: str) -> None:
    """Past Python's buffers, for one of them may be in use where the signal came."""
    with suppress(OSError):
        os.write(1, f"{line}\n".encode())


def let_go_of_terminal() -> None:
    """What is written to a terminal that is gone, or to a pipe whose reader goes with it, would be an error and keep
    the checkpoint from being saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in OUTPUTS:
        with suppress(OSError):  # One of them may be closed.
            kind = os.fstat(output).st_mode
            if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):
                os.dup2(nowhere, output)
    os.close(nowhere)
