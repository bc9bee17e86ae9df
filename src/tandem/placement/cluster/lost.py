"""What can happen to a process of the run."""

from tandem.errors import RunError, SamplingError


class WorkerLost(RunError):
    """A worker died, broke, or did not answer in time. An engine can be replaced, a learner cannot."""


class EnginesLost(SamplingError):
    """No engine can be brought to the present weights. The learners are whole, so what they have can still be saved."""


def learner_lost(said: object, run_dir: str) -> RunError:
    """What ends a run that has lost a learner, or to which a learner is lost that hangs."""
    return RunError(
        f"{said}\nA lost learner ends the run. The same command goes on from its last checkpoint in "
        f"{run_dir}/checkpoints, if it has one"
    )
