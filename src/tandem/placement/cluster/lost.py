"""What can happen to a process of the run."""

from pathlib import Path

from tandem.errors import RunError, SamplingError


class WorkerLost(RunError):
    """A worker died, broke, or did not answer in time. An engine can be replaced, a learner cannot."""


class EnginesLost(SamplingError):
    """No engine can be brought to the present weights. The learners are whole, so what they have can still be saved."""


def last_words(log: Path, lines: int = 15) -> str:
    """The end of a worker's log, where it is on this machine."""
    if not log.is_file():
        return f"\nits log is {log} on its node"
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return f"\nthe end of {log}:\n  " + "\n  ".join(tail) if tail else f"\nits log {log} is empty"


def learner_lost(said: object, run_dir: str) -> RunError:
    """What ends a run that has lost a learner, or to which a learner is lost that hangs."""
    return RunError(
        f"{said}\nA lost learner ends the run. The same command goes on from its last checkpoint in "
        f"{run_dir}/checkpoints, if it has one"
    )
