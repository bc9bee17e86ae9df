"""The first SIGTERM or Ctrl-C ends a run in order, the second at once."""

import signal
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop; raised between tokens and between steps, where nothing is half done."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interruption:
    """While inside, notes the first signal; `check` then raises. The second signal has its default effect."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def check(self) -> None:
        if self.number is not None:
            raise Interrupted(self.number)
