"""Bytes of a process by what they are for, and sizes in words."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes by purpose. `lasting` is there all the time; of the two phases only one is."""

    lasting: dict[str, int]
    sampling: dict[str, int] = field(default_factory=dict)
    update: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    """What offloading of the optimizer and the layout put in the memory of the host."""

    @property
    def peak(self) -> int:
        """Most bytes at once on the device of a learner that an engine shares."""
        return sum(self.lasting.values()) + max(self.engine, sum(self.update.values()))

    @property
    def learner(self) -> int:
        """The same of a learner alone."""
        return sum(self.lasting.values()) + sum(self.update.values())

    @property
    def engine(self) -> int:
        """The same of an engine alone."""
        return sum(self.sampling.values())

    def keeping(self, name: str) -> "Memory":
        """Where a part of sampling stays between the phases."""
        phase = {other: size for other, size in self.sampling.items() if other != name}
        return replace(self, lasting=self.lasting | {name: self.sampling[name]}, sampling=phase)

    def beside(self, name: str, other: "Memory") -> "Memory":
        """With another model on the same processes. Models learn one after the other, so of their updates the larger
        counts."""
        larger = max(self.update, other.update, key=lambda parts: sum(parts.values()))
        lasting, host = (
            ours | {name if part == "weights" else f"{name}'s {part}": size for part, size in theirs.items()}
            for ours, theirs in ((self.lasting, other.lasting), (self.host, other.host))
        )
        return replace(self, lasting=lasting, update=larger, host=host)

    def sentence(self) -> str:
        larger = max(self.sampling, self.update, key=lambda phase: sum(phase.values()))
        parts = {name: size for name, size in (self.lasting | larger).items() if size}
        return ", ".join(f"{name} {readable(size)}" for name, size in parts.items())


def fullest(processes: Sequence[Memory]) -> Memory:
    """Of these learners, the one that takes most where it computes, with the most that any has on the host."""
    most = max(processes, key=lambda each: each.learner)
    host = max((each.host for each in processes), key=lambda parts: sum(parts.values()))
    return replace(most, host=host) if host else most


def several(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count > 1)}"


def readable(size: int) -> str:
    """1.5 GB, 20 MB: decimal units, as disks are sold and models are published."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1000:.0f} kB"
