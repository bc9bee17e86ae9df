"""Which stage of a pipeline works on which micro-batch, and when."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gpipe", "1f1b"]


@dataclass(frozen=True, slots=True)
class Action:
    """One stage's pass over one micro-batch."""

    backward: bool
    stage: int
    part: int


Tick = list[Action | None]
"""What each process does meanwhile; None where it waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A pipeline over `ranks` processes with `chunks` stages on each: stage s is on process s % ranks."""

    kind: Kind
    ranks: int
    chunks: int

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def ticks(self, parts: int, *, train: bool) -> list[Tick]:
        """All passes over `parts` micro-batches, backward ones too if `train`.

        The processes are played through as if every pass took equally long, each process doing the first of its
        passes that has what it needs; so the order that comes out can never wait for itself. `gpipe` goes forward
        through all micro-batches before it goes back; `1f1b` goes back as soon as it can and bounds how many
        micro-batches a process holds on to (Megatron-LM, arXiv 2104.04473).
        """
        waiting = [self._order(rank, parts, backward=False) for rank in range(self.ranks)]
        back = [self._order(rank, parts, backward=True) if train else [] for rank in range(self.ranks)]
        held, done, out = [0] * self.ranks, set[Action](), list[Tick]()
        while any(waiting) or any(back):
            tick: Tick = []
            for rank in range(self.ranks):
                action = self._choose(rank, waiting[rank], back[rank], held[rank], done, train)
                if action is not None:
                    (back if action.backward else waiting)[rank].remove(action)
                    held[rank] += -1 if action.backward else 1
                tick.append(action)
            assert any(tick), "a pipeline's order waits for itself"
            done.update(action for action in tick if action is not None)
            out.append(tick)
        return out

    def _order(self, rank: int, parts: int, *, backward: bool) -> list[Action]:
        """A process's passes in one direction: as many micro-batches as there are processes go through one of its
        stages, then through the next."""
        stages = range(rank, self.stages, self.ranks)
        rounds = (range(start, min(start + self.ranks, parts)) for start in range(0, parts, self.ranks))
        return [
            Action(backward, stage, part)
            for some in rounds
            for stage in (reversed(stages) if backward else stages)
            for part in some
        ]

    def _choose(
        self, rank: int, waiting: list[Action], back: list[Action], held: int, done: set[Action], train: bool
    ) -> Action | None:
        bound = len(waiting) + held
        if train and self.kind == "1f1b":
            after = self.ranks - rank - 1
            bound = after + 1 if self.chunks == 1 else 2 * after + (self.chunks - 1) * self.ranks + 1
        if waiting and held < bound and self._ready(waiting[0], done):
            return waiting[0]
        if back and self._ready(back[0], done) and (self.kind == "1f1b" or not waiting):
            return back[0]
        return None

    def _ready(self, action: Action, done: set[Action]) -> bool:
        return all(needed in done for needed in self.needs(action))

    def needs(self, action: Action) -> list[Action]:
        """The passes that must have been made before."""
        stage, part = action.stage, action.part
        if not action.backward:
            return [Action(False, stage - 1, part)] if stage else []
        needed = [Action(False, stage, part)]
        return needed if stage == self.stages - 1 else [*needed, Action(True, stage + 1, part)]

    def next_stage(self, action: Action) -> int | None:
        """The stage that what a pass has made goes to; None where it goes nowhere."""
        stage = action.stage - 1 if action.backward else action.stage + 1
        return stage if 0 <= stage < self.stages else None
