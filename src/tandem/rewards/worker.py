"""The process that runs reward functions: tasks in, outcomes out, one at a time.

It starts fresh, imports neither torch nor the trainer, and is killed with its process group when an answer
takes too long. A failed score is an outcome of its own here, never a number.
"""

import asyncio
import importlib
import math
import numbers
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from tandem.errors import ConfigError
from tandem.rewards import limits
from tandem.rewards.channel import Inbox, frame
from tandem.rewards.function import Function, load
from tandem.rewards.range import fits
from tandem.rewards.verifiers import SYMBOLIC

Outcome = dict[str, Any]
MAX_DETAIL = 500


class Caught(AbstractContextManager["Caught"]):
    """Holds what a user's function raises, `sys.exit` included, so that it becomes the answer's outcome."""

    error: BaseException | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return isinstance(error, (Exception, SystemExit))

    @property
    def detail(self) -> str:
        """Type and text of the error, and the line that raised it."""
        assert self.error is not None
        text = traceback.format_exception_only(self.error)[-1].strip()
        frames = traceback.extract_tb(self.error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if len(frames) > 1 else ""
        return printable(text)[:MAX_DETAIL] + place


def printable(text: str) -> str:
    """Control characters written out: the text may hold parts of an answer."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def failed(kind: str, name: str, detail: str) -> Outcome:
    return {"failure": kind, "detail": f"{name}: {detail}"}


def judged(name: str, value: Any) -> Outcome:
    """A number of at most 32 bits, or the failure `invalid`."""
    if not isinstance(value, numbers.Real):
        return failed("invalid", name, f"returned {type(value).__name__}, not a number")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    return {"parts": {name: score}} if fits(score) else failed("invalid", name, f"returned {score}")


def _fill(function: Function, answer: dict[str, Any]) -> Any:
    return function.call(**{field: answer[field] for field in function.fields}, **function.args)


def score_one(function: Function, answer: dict[str, Any]) -> Outcome:
    with Caught() as caught:
        return judged(function.name, _fill(function, answer))
    return failed("error", function.name, caught.detail)


def score_answer(functions: Sequence[Function], answer: dict[str, Any]) -> Outcome:
    """All functions on one answer; the first failure ends it."""
    parts: dict[str, float] = {}
    for function in functions:
        outcome = score_one(function, answer)
        if "failure" in outcome:
            return outcome
        parts |= outcome["parts"]
    return {"parts": parts}


async def _awaited(function: Function, answer: dict[str, Any], seconds: float) -> Outcome:
    clock = asyncio.timeout(seconds)
    with Caught() as caught:
        async with clock:
            return judged(function.name, await _fill(function, answer))
    if clock.expired():
        return failed("timeout", function.name, f"no result within {seconds:g} s")
    return failed("error", function.name, caught.detail)


async def score_together(
    function: Function, answers: Sequence[dict[str, Any]], seconds: float
) -> list[Outcome]:
    return await asyncio.gather(*(_awaited(function, answer, seconds) for answer in answers))


def _plural(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a group function: lists where the answers of one prompt differ."""
    first = answers[0]
    shared = {field: first[field] for field in ("truth", "question", "row")}
    lists = {field: [a[field] for a in answers] for field in ("tokens", "finish")}
    return {"answers": [a["answer"] for a in answers], **shared, **lists}


def _shared_out(function: Function, values: Any, size: int) -> list[Outcome]:
    """One outcome for each answer of the group; what is no list of the right length fails them all."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, dict)):
        return [failed("invalid", function.name, f"returned {type(values).__name__}, not a list")] * size
    scores = list(values)
    if len(scores) != size:
        return [failed("invalid", function.name, f"returned {len(scores)} scores for {size} answers")] * size
    return [judged(function.name, score) for score in scores]


def score_group(function: Function, answers: Sequence[dict[str, Any]]) -> list[Outcome]:
    """A group function called once, and awaited where it is asynchronous."""
    with Caught() as caught:
        values = _fill(function, _plural(answers))
        if asyncio.iscoroutine(values):
            values = asyncio.run(values)
        return _shared_out(function, values, len(answers))
    return [failed("error", function.name, caught.detail)] * len(answers)


def outcomes(
    functions: Sequence[Function], answers: Sequence[dict[str, Any]], seconds: float
) -> list[Outcome]:
    """Outcomes of one task: one answer under all its functions, or a group under one."""
    first = functions[0]
    if first.kind == "group":
        return score_group(first, answers)
    if first.kind == "async":
        return asyncio.run(score_together(first, answers, seconds))
    return [score_answer(functions, answer) for answer in answers]


def _load_all(setup: dict[str, Any]) -> list[Function]:
    if any(f["located"] in SYMBOLIC for f in setup["functions"]):
        importlib.import_module("tandem.rewards.symbolic")
    return [load(f["name"], f["located"], f["args"]) for f in setup["functions"]]


def _reap() -> None:
    """Collect children of user code that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _set_up(setup: dict[str, Any], wire: socket.socket) -> list[Function] | None:
    """Import the functions under the limits, and report: ready, or refused and why."""
    limits.confine(setup["memory_mb"])
    with Caught() as caught:
        functions = _load_all(setup)
        wire.sendall(frame({"ready": [f.kind for f in functions]}))
        return functions
    own = isinstance(caught.error, ConfigError)
    names = ", ".join(f["name"] for f in setup["functions"])
    why = str(caught.error) if own else f"reward functions {names} cannot be imported: {caught.detail}"
    wire.sendall(frame({"refused": why}))
    return None


def serve(wire: socket.socket) -> None:
    """Take the setup, then tasks, until the parent closes the wire."""
    inbox = Inbox()
    setup: dict[str, Any] | None = None
    functions: list[Function] | None = None
    while data := wire.recv(1 << 16):
        for message in inbox.feed(data):
            if setup is None:
                setup, functions = message, _set_up(message, wire)
            elif functions is not None:
                chosen = [functions[i] for i in message["functions"]]
                result = outcomes(chosen, message["answers"], setup["timeout_s"])
                wire.sendall(frame({"task": message["task"], "outcomes": result}))
                _reap()


def main() -> None:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    limits.die_with_parent()
    if os.getppid() != parent:
        return
    wire = socket.socket(fileno=descriptor)
    wire.set_inheritable(False)
    # A forked child of user code must not answer in this process's place, nor live on without it.
    os.register_at_fork(after_in_child=wire.close)
    os.register_at_fork(after_in_child=limits.die_with_parent)
    serve(wire)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
