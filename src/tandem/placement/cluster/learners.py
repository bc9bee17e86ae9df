"""The actor and the reference as the loop sees them, while the work is done by the learners."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tandem.config.run import Run
from tandem.errors import RunError
from tandem.placement.cluster import port
from tandem.placement.cluster.learner_worker import Facts
from tandem.placement.cluster.lost import WorkerLost
from tandem.types import Batch, Experience

ROOT_CAUSE_S = 3.0
"""When one learner fails the others lose their connection to it; so long the one that began it is looked for."""


class Learners:
    """The processes that train, called all at once. A lost one ends the run."""

    def __init__(self, workers: Sequence[port.Worker], run: Run, turn: Callable[[], None]) -> None:
        """`turn` is called before they compute: where engines share their devices it puts these to sleep."""
        self.workers, self.run, self._turn = workers, run, turn

    def compute(self, method: str, *arguments: Any) -> Any:
        """As `call`, for what takes the devices' memory."""
        self._turn()
        return self.call(method, *arguments)

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """The same call on every rank; the value of rank 0."""
        if len(self.workers) > 1:
            arguments = tuple(port.share(argument) for argument in arguments)
        calls = [worker.call(method, *arguments) for worker in self.workers]
        return self._results(calls, timeout_s or self.run.placement.learner_timeout_s)[0]

    def _results(self, calls: list[port.Call], timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        values: dict[port.Call, Any] = {}
        while len(values) < len(calls):
            waiting = [call for call in calls if call not in values]
            done = port.first_done(waiting, max(0.0, deadline - time.monotonic()))
            if not done:
                raise RunError(
                    f"{waiting[0].worker} did not finish `{waiting[0].method}` within {timeout_s:g} s; its log: "
                    f"{waiting[0].worker.log}"
                )
            for call in done:
                try:
                    values[call] = call.result(0)
                except RunError as error:
                    raise self._root_cause(error, [c for c in waiting if c is not call]) from None
        return [values[call] for call in calls]

    def _root_cause(self, error: RunError, others: Sequence[port.Call]) -> RunError:
        """A process that is gone explains the broken connections of the others, and not the reverse."""
        found = [error]
        deadline = time.monotonic() + (ROOT_CAUSE_S if isinstance(error, WorkerLost) else 0)
        while others and time.monotonic() < deadline:
            for call in port.first_done(others, deadline - time.monotonic()):
                others = [other for other in others if other is not call]
                try:
                    call.result(0)
                except RunError as another:
                    found.append(another)
        first = next((e for e in found if not isinstance(e, WorkerLost)), None)
        first = first or next((e for e in found if " died during " in str(e)), error)
        if not isinstance(first, WorkerLost):
            return first
        return RunError(
            f"{first}\nA lost learner ends the run. The same command goes on from its last checkpoint in "
            f"{self.run.run_dir}/checkpoints, if it has one"
        )


class RemoteActor:
    """The policy and its optimizer."""

    def __init__(self, learners: Learners, facts: Facts) -> None:
        self.learners, self.run, self.facts = learners, learners.run, facts
        self.dtype = facts.dtype
        self._counters = {"nonfinite_in_a_row": 0, "updates": 0}

    def logprobs(self, batch: Batch) -> Tensor:
        return self.learners.compute("logprobs", batch)

    def old_logprobs(self, batch: Batch) -> Tensor | None:
        match self.run.old_logp:
            case "none":
                return None
            case "rollout":
                return batch.policy_logp_BT
            case "recompute":
                return self.logprobs(batch)

    def update(self, parts: Sequence[Experience], kl_coef: float) -> dict[str, float]:
        figures, self._counters = self.learners.compute("update", parts, kl_coef)
        return figures

    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def restore_counters(self, saved: Mapping[str, int]) -> None:
        self.learners.call("restore_counters", dict(saved))
        self._counters = {name: saved[name] for name in self._counters}


class RemoteReference:
    """Where the KL term pulls to."""

    def __init__(self, learners: Learners) -> None:
        self.learners = learners

    def logprobs(self, batch: Batch) -> Tensor:
        return self.learners.compute("reference_logprobs", batch)

    def refresh(self, actor: RemoteActor) -> None:
        self.learners.call("refresh")
