"""Actor, reference, critic and reward model as others see them, while the work is done by the learners."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tandem.config.run import Run
from tandem.errors import RunError
from tandem.learner import Critic, Policy, in_units
from tandem.placement.cluster import port
from tandem.placement.cluster.carried import Carried, pack, unpack
from tandem.placement.cluster.learner_worker import Facts
from tandem.placement.cluster.limit import Limit, learner_limit
from tandem.placement.cluster.lost import WorkerLost, last_words, learner_lost
from tandem.rollout import Units
from tandem.types import Batch, Experience, Group, collate

ROOT_CAUSE_S = 3.0
"""When one learner fails or hangs the others lose their connection to it or wait; so long the one that began it is
looked for."""


@dataclass(slots=True)
class Begun:
    """A method under way on every rank."""

    calls: list[port.Call]
    before: "Begun | None"
    """What was begun before it, and is done before it; none where that is known to be done."""


class Learners:
    """The processes that train, called all at once. A lost one ends the run."""

    def __init__(self, workers: Sequence[port.Worker], run: Run, turn: Callable[[], None]) -> None:
        """`turn` is called before they compute: where engines share their devices it puts these to sleep."""
        self.workers, self.run, self._turn = workers, run, turn
        self.see_folders = True
        """Whether each of them sees the folders of this process."""
        self._asleep = False
        self._asking = threading.Lock()
        self._last: Begun | None = None
        self.turn_s = 0.0
        """Spent on taking turns with engines, for `take_turn_s`."""

    def sleep(self) -> None:
        """Give the devices' memory to the engines, until something is asked of the learners."""
        if not self._asleep:
            self.call("sleep")
            self._asleep = True

    def compute(self, method: str, *arguments: Any) -> Any:
        """As `call`, for what takes the devices' memory."""
        self.take_devices(self._turn)
        return self.call(method, *arguments)

    def apply(self, method: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """As `compute` of a method that does `work`; a path among the arguments is that of a folder of this process."""
        # They may have been started elsewhere than this process.
        arguments = tuple(given.absolute() if isinstance(given, Path) else given for given in arguments)
        folders = [given for given in arguments if isinstance(given, Path)]
        if self.see_folders or not folders:
            return self.compute(method, work, *arguments)
        (folder,) = folders
        self.take_devices(self._turn)
        made = self.finish_all(self.begin(method, Carried(work, pack(folder)), *arguments))
        for _, files in made:
            unpack(files, folder)
        return made[0][0]

    def take_devices(self, turn: Callable[[], None]) -> None:
        """`turn` puts engines that share them to sleep; then the learners wake."""
        began = time.monotonic()
        turn()
        self._wake()
        self.turn_s += time.monotonic() - began

    def call(self, method: str, *arguments: Any, limit: Limit | None = None) -> Any:
        """The same call on every rank; the value of rank 0."""
        return self.finish(self.begin(method, *arguments), limit)

    def begin(self, method: str, *arguments: Any) -> Begun:
        """Start the same call on every rank; what several threads ask for reaches all in the same order."""
        self._wake()
        if len(self.workers) > 1:
            arguments = tuple(port.share(argument) for argument in arguments)
        with self._asking:
            calls = [worker.call(method, *arguments) for worker in self.workers]
            self._last = begun = Begun(calls, self._last)
        return begun

    def finish(self, begun: Begun, limit: Limit | None = None) -> Any:
        """The value of rank 0, when all are done."""
        return self.finish_all(begun, limit)[0]

    def finish_all(self, begun: Begun, limit: Limit | None = None) -> list[Any]:
        """The values of all ranks. Each method has its time from the end of the one before, whichever thread asked for
        it."""
        limit = limit or learner_limit(self.run.placement)
        queue = [begun]
        while (before := queue[-1].before) is not None:
            queue.append(before)
        for earlier in reversed(queue[1:]):
            self._wait(earlier.calls, limit)
        begun.before = None
        return self._results(begun.calls, limit)

    def take_turn_s(self) -> float:
        """Seconds since the last call in which engines went to sleep and learners woke."""
        taken, self.turn_s = self.turn_s, 0.0
        return taken

    def _wake(self) -> None:
        if self._asleep:
            self._asleep = False
            self.call("wake")

    def _wait(self, calls: list[port.Call], limit: Limit) -> None:
        """Until all are done, whatever came of them."""
        deadline = time.monotonic() + limit.seconds
        while waiting := [call for call in calls if not call.done()]:
            self._first_done(waiting, limit, deadline)

    def _first_done(self, waiting: list[port.Call], limit: Limit, deadline: float) -> list[port.Call]:
        done = port.first_done(waiting, max(0.0, deadline - time.monotonic()))
        if not done:
            raise self._end(overdue(waiting, limit))
        return done

    def _results(self, calls: list[port.Call], limit: Limit) -> list[Any]:
        deadline = time.monotonic() + limit.seconds
        values: dict[port.Call, Any] = {}
        while len(values) < len(calls):
            waiting = [call for call in calls if call not in values]
            for call in self._first_done(waiting, limit, deadline):
                try:
                    values[call] = call.result(limit)
                except RunError as error:
                    others = [c for c in waiting if c is not call]
                    raise self._root_cause(error, others, limit) from None
        return [values[call] for call in calls]

    def _root_cause(self, error: RunError, others: Sequence[port.Call], limit: Limit) -> RunError:
        """A process that is gone explains the broken connections of the others, and not the reverse. So does one that
        hangs, which is still without an answer when theirs time out."""
        found = [error]
        deadline = time.monotonic() + (ROOT_CAUSE_S if isinstance(error, WorkerLost) else 0)
        while others and time.monotonic() < deadline:
            for call in port.first_done(others, deadline - time.monotonic()):
                others = [other for other in others if other is not call]
                try:
                    call.result(limit)
                except RunError as another:
                    found.append(another)
        first = next((e for e in found if not isinstance(e, WorkerLost)), None)
        first = first or next((e for e in found if " died during " in str(e)), error)
        if not isinstance(first, WorkerLost):
            return first
        return self._end(f"{first}\nstill without an answer: {names(others)}" if others else first)

    def _end(self, lost: object) -> RunError:
        return learner_lost(lost, self.run.run_dir)


def overdue(calls: Sequence[port.Call], limit: Limit) -> str:
    """Who did not finish in time. Where a process is stuck the others wait for it, and only it is to be blamed."""
    stuck = without_pulse(calls)
    late = stuck or calls
    said = f"{names(late)} did not finish `{late[0].method}` {limit}"
    if stuck:
        said += ", without a sign of life: stopped, or stuck"
        alive = [call for call in calls if call not in stuck]
        said += f"; still at work: {names(alive)}" if alive else ""
    return said + last_words(late[0].worker.log)


def without_pulse(calls: Sequence[port.Call]) -> list[port.Call]:
    """Those whose processes answer nothing."""
    asked = {call.worker.call("pulse"): call for call in calls}
    deadline = time.monotonic() + ROOT_CAUSE_S
    while asked and (left := deadline - time.monotonic()) > 0:
        for answered in port.first_done(list(asked), left):
            del asked[answered]
    return list(asked.values())


def names(calls: Sequence[port.Call]) -> str:
    """Of those that work on these calls."""
    return " and ".join(str(call.worker) for call in calls)


class RemoteActor(Policy):
    """The policy and its optimizer."""

    def __init__(self, learners: Learners, facts: Facts) -> None:
        self.learners, self.run, self.facts = learners, learners.run, facts
        self.dtype = facts.dtype
        self._counters = {"nonfinite_in_a_row": 0, "updates": 0}

    def logprobs(self, batch: Batch) -> Tensor:
        return self.learners.compute("logprobs", batch)

    def update(self, parts: Sequence[Experience], kl_coef: float) -> dict[str, float]:
        figures, self._counters = self.learners.compute("update", parts, kl_coef)
        return figures

    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def restore_counters(self, saved: Mapping[str, int]) -> None:
        self.learners.call("restore_counters", dict(saved))
        self._counters = {name: saved[name] for name in self._counters}


class InUnits:
    """What the learners compute of a step's answers, unit by unit (`Run.step_unit`). What was begun while others were
    still answered is not computed again."""

    def __init__(self, learners: Learners, method: str) -> None:
        self.learners, self.method = learners, method
        self._begun: dict[bytes, Begun] = {}
        self._seconds = 0.0

    def begin(self, unit: Batch) -> None:
        """Start on a unit whose answers are there."""
        self._begun[content(unit)] = self.learners.begin(self.method, unit)

    def of(self, batch: Batch) -> Tensor:
        """[B, T], of all units."""
        if not self._begun:
            return self._timed(self.learners.compute(self.method, batch))
        made_BT = in_units(batch, self.learners.run.step_unit, self._unit)
        self._begun.clear()
        return made_BT

    def take_seconds(self) -> float:
        """That the learners worked on what was asked for since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _unit(self, unit: Batch) -> Tensor:
        begun = self._begun.pop(content(unit), None) or self.learners.begin(self.method, unit)
        return self._timed(self.learners.finish(begun))

    def _timed(self, result: tuple[Tensor, float]) -> Tensor:
        made_BT, seconds = result
        self._seconds += seconds
        return made_BT


class RemoteCritic:
    """What predicts the reward to come, and its optimizer."""

    def __init__(self, learners: Learners) -> None:
        self.learners = learners
        self.work = InUnits(learners, "values")
        self._counters = {"nonfinite_in_a_row": 0, "updates": 0}

    def values(self, batch: Batch) -> Tensor:
        return self.work.of(batch)

    def update(self, parts: Sequence[Experience]) -> dict[str, float]:
        figures, self._counters = self.learners.compute("update_critic", parts)
        return figures

    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    def restore_counters(self, saved: Mapping[str, int]) -> None:
        self.learners.call("apply_critic", restore_counters, dict(saved))
        self._counters = dict(saved)


def restore_counters(critic: Critic, saved: Mapping[str, int]) -> None:
    critic.restore_counters(saved)


class RemoteReference:
    """Where the KL term pulls to."""

    def __init__(self, learners: Learners) -> None:
        self.learners = learners
        self.work = InUnits(learners, "reference_logprobs")

    def logprobs(self, batch: Batch) -> Tensor:
        return self.work.of(batch)

    def refresh(self, actor: RemoteActor) -> None:
        self.learners.call("refresh")


class RemoteRewardModel:
    """What scores answers. Used by the thread that samples: beside engines with devices of their own it works on groups
    while others are still answered, and between two updates; others give it their devices first, by `turn`."""

    def __init__(self, learners: Learners, turn: Callable[[], None] | None) -> None:
        self.learners, self._turn = learners, turn

    def begin(self, unit: Sequence[Group]) -> Callable[[], tuple[Tensor, float]]:
        """As `reward_model.RewardModel.begin`."""
        batch, turn = collate(unit), self._turn
        if turn is None:
            begun = self.learners.begin("reward_scores", batch)
            return lambda: self.learners.finish(begun)

        def scores() -> tuple[Tensor, float]:
            self.learners.take_devices(turn)
            return self.learners.call("reward_scores", batch)

        return scores


class Meanwhile:
    """Starts reference and critic on each unit of a step as soon as the answers of its groups are there, while learners
    have nothing else to do. Called as `Sampler.on_group`."""

    def __init__(self, run: Run, works: Sequence[InUnits]) -> None:
        self.works = works
        self._units = Units(run.step_unit, run.sampling.prompts_per_step)

    @staticmethod
    def helps(run: Run) -> bool:
        """Learners have devices of their own and wait for answers, and no group is refused afterwards, which would make
        its work useless."""
        return run.placement.kind == "apart" and run.sampling.max_lag == 0 and run.algorithm.keep == "all"

    def __call__(self, place: int, group: Group) -> None:
        if unit := self._units.add(place, group):
            batch = collate(unit)
            for work in self.works:
                work.begin(batch)


def content(batch: Batch) -> bytes:
    """What log-probabilities and values depend on, to tell two batches apart."""
    return b"".join(t.numpy().tobytes() for t in (batch.length_B, batch.prompt_length_B, batch.tokens_BT))
