"""What can happen to a process of the run."""

from tandem.errors import RunError


class WorkerLost(RunError):
    """A worker died, broke, or did not answer in time. An engine can be replaced, a learner cannot."""


class EnginesLost(RunError):
    """An engine cannot be replaced. The learners are whole, so what they have can still be saved."""
