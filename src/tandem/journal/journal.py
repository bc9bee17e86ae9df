"""The record of a run: metrics.jsonl always, and the sinks the run names; none of them can stop training."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tandem.config.run import Run
from tandem.config.secret import redact
from tandem.errors import RunError
from tandem.journal import rollouts
from tandem.journal.metrics import metric
from tandem.journal.sinks import SINKS, Sink, check_sinks, forget

if TYPE_CHECKING:
    from tandem.types import Group

logger = logging.getLogger("tandem.journal")


class Journal:
    """Example: with Journal(run, folder) as journal: journal.log(1, {"reward/mean": 0.5})

    Sinks open at the first line, so that `rewind` may come before. A sink that fails is reported once and
    dropped; lines of metrics.jsonl that could not be written wait for the next one.
    """

    def __init__(self, run: Run, folder: Path, console: Console | None = None) -> None:
        check_sinks(run)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"run_dir={folder}: cannot be made ({error.strerror}); name another one") from None
        self._run = run
        self._folder = folder
        self._console = console or Console()
        self._first_step = 0
        self._shown_at = time.monotonic()
        self._file = _Lines(folder / "metrics.jsonl")
        self._sinks: dict[str, Sink] | None = None
        self._record_rollouts = run.journal.rollouts != "none"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for a step; a value that is not finite is written as null and named under `nonfinite`."""
        unknown = [name for name in metrics if metric(name) is None]
        assert not unknown, f"not in tandem.journal.metrics.METRICS: {unknown}"
        self._file.write(_line(step, metrics))
        if self._sinks is None:
            self._sinks = self._open()
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for name, sink in list(self._sinks.items()):
            self._guarded(name, sink.failures, lambda sink=sink: sink.write(step, finite))

    def progress(self, doing: str) -> None:
        """What a long step is at; shown on the console, at most once a second, and written nowhere."""
        now = time.monotonic()
        if now - self._shown_at < 1.0:
            return
        self._shown_at = now
        if self._sinks is None:
            self._sinks = self._open()
        for name, sink in list(self._sinks.items()):
            self._guarded(name, sink.failures, lambda sink=sink: sink.progress(doing))

    def say(self, text: str) -> None:
        """A message on the console, beside the progress bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def record(
        self, step: int, groups: Sequence["Group"], advantages: Sequence[float] | None = None
    ) -> Path | None:
        """The step's answers under `rollouts/`, if this step is one to be recorded."""
        if not self._record_rollouts or step % self._run.journal.rollouts_every:
            return None
        try:
            return rollouts.write(
                self._folder / "rollouts", step, groups, self._run.journal.rollouts, advantages
            )
        except OSError as error:
            self._record_rollouts = False
            logger.warning("rollouts are no longer recorded: %s; training goes on", redact(str(error)))
            return None

    def rewind(self, step: int, *, keep_warmup: bool = False) -> None:
        """Forgets what came after a step, before a run goes on from there; -1 forgets everything, but for the warm-up
        where that is kept."""
        assert self._sinks is None, "rewind comes before the first line"
        self._file.rewind(step, keep_warmup)
        rollouts.rewind(self._folder / "rollouts", step)
        if step < 0 and not keep_warmup:
            forget(self._folder)
        self._first_step = step + 1

    def close(self) -> None:
        for name, sink in list((self._sinks or {}).items()):
            self._guarded(name, sink.failures, sink.close)
        self._sinks = {}
        self._file.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> dict[str, Sink]:
        sinks: dict[str, Sink] = {}
        for name in self._run.journal.sinks:
            if name in SINKS and name not in sinks:
                try:
                    sinks[name] = SINKS[name](self._run, self._folder, self._first_step, self._console)
                except OSError as error:
                    _warn(name, error)
        return sinks

    def _guarded(self, name: str, failures: tuple[type[Exception], ...], act: Callable[[], None]) -> None:
        try:
            act()
        except failures as error:
            assert self._sinks is not None
            self._sinks.pop(name, None)
            _warn(name, error)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line torn by a crash is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


class _Lines:
    """A file of whole lines. After a failed write it is cut back to its last whole line before the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = sum(map(len, _whole_lines(path)))
        self._waiting: list[bytes] = []
        self._warned = False

    def write(self, line: str) -> None:
        self._waiting.append(line.encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Writes what waits; a failure is reported once, and tried again with the next line."""
        block = b"".join(self._waiting)
        if not block:
            return
        try:
            with self._path.open("ab") as file:
                file.truncate(self._size)
                file.write(block)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("%s: %s; lines wait in memory, training goes on", self._path, error.strerror)
            return
        self._size += len(block)
        self._waiting = []

    def rewind(self, step: int, keep_warmup: bool) -> None:
        def keeps(line: bytes) -> bool:
            row = json.loads(line)
            return row["step"] <= step or (keep_warmup and "warmup/update" in row)

        kept = [line for line in _whole_lines(self._path) if keeps(line)]
        if self._path.exists():
            partial = self._path.with_suffix(".jsonl.tmp")
            partial.write_bytes(b"".join(kept))
            partial.replace(self._path)
        self._size = sum(map(len, kept))


def _whole_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [line for line in lines if line.endswith(b"\n")]


def _line(step: int, metrics: Mapping[str, float]) -> str:
    values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    nonfinite = [name for name, value in values.items() if value is None]
    return json.dumps(
        {"step": step, **values, **({"nonfinite": nonfinite} if nonfinite else {})}, allow_nan=False
    )


def _warn(name: str, error: Exception) -> None:
    logger.warning("the %s sink failed and is dropped: %s; training goes on", name, redact(str(error)))
