"""What each learner takes of each model: equal ones together."""

from collections.abc import Iterator
from dataclasses import dataclass

from tandem.train.memory import Memory
from tandem.train.plan.plan import Offer, Place
from tandem.train.plan.stages import Stages, stages_of

ROWS = 8
"""Groups of a model at most, unless there are more that differ in their layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Neighbouring learners that take as much of a model as the first of them, or less."""

    role: str
    first: int
    last: int
    stages: Stages
    """Of the first."""
    memory: Memory
    """The same."""

    @property
    def learners(self) -> str:
        return f"{self.first}-{self.last}" if self.last > self.first else str(self.first)

    @property
    def holds(self) -> str:
        """Layers of each, and what is outside of them; nothing where each has a part of all."""
        if self.stages.first and self.stages.last:
            return ""
        ends = ["embedding"] * self.stages.first + ["head"] * self.stages.last
        return ", ".join([str(self.stages.layers), *ends])


def ranks_of(offer: Offer) -> Iterator[Ranks]:
    """Of all roles."""
    for role, place in offer.places.items():
        groups = grouped(place, exact=True)
        if len(groups) > ROWS:
            groups = grouped(place, exact=False)
        each = place.axes.world // place.axes.pipeline
        for stages, memory, count in groups:
            start = stages.rank * each
            yield Ranks(role=role, first=start, last=start + count * each - 1, stages=stages, memory=memory)


def grouped(place: Place, *, exact: bool) -> list[tuple[Stages, Memory, int]]:
    """Processes of the pipeline, neighbours together that take equally much, or unless `exact` that have equally many
    layers: of these the foremost keeps the most. Each group's first, and how many they are."""
    found: list[tuple[Stages, Memory, int]] = []
    for stages in stages_of(place.axes, place.layers):
        memory = place.at(stages)
        if found and alike(found[-1][:2], (stages, memory), exact):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((stages, memory, 1))
    return found


def alike(one: tuple[Stages, Memory], other: tuple[Stages, Memory], exact: bool) -> bool:
    ends = [(stages.layers, stages.first, stages.last) for stages, _ in (one, other)]
    return ends[0] == ends[1] and (not exact or one[1] == other[1])
