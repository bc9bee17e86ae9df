"""What of a model each process of a pipeline has."""

from dataclasses import dataclass
from functools import lru_cache

from tandem.train.plan.axes import ALONE, Axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Those of one process of a pipeline, and of all that share them with it; without a pipeline, all there is."""

    axes: Axes = ALONE
    rank: int = 0
    """In the pipeline."""
    layers: int

    @property
    def first(self) -> bool:
        """The embedding is here."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Norm and output head are here."""
        return self.rank == self.axes.pipeline - 1

    def kept(self, schedule: str, parts: int) -> float:
        """Layers whose activations are kept at most, while `parts` micro-batches go through: those of one stage for
        each pass that the process has not gone back through."""
        ranks, chunks = self.axes.pipeline, self.axes.pipeline_chunks
        if ranks == 1:
            return self.layers
        passes = parts * chunks
        if schedule == "1f1b":
            after = ranks - 1 - self.rank
            passes = min(passes, after + 1 if chunks == 1 else 2 * after + (chunks - 1) * ranks + 1)
        return passes * self.layers / chunks


@lru_cache(maxsize=64)
def stages_of(axes: Axes, layers: int) -> tuple[Stages, ...]:
    """Of each process of the pipeline, for a model with so many layers."""
    count = axes.pipeline * axes.pipeline_chunks
    counts = axes.pipeline_layers or [layers // count + (s < layers % count) for s in range(count)]
    return tuple(
        Stages(axes=axes, rank=rank, layers=sum(counts[rank :: axes.pipeline]))
        for rank in range(axes.pipeline)
    )


@lru_cache(maxsize=64)
def fullest_of(axes: Axes, layers: int) -> tuple[Stages, ...]:
    """Of these, the ones that can take most: both ends, and of those between with equally many layers the foremost,
    which keeps the most activations."""
    every = stages_of(axes, layers)
    between = {stages.layers: stages for stages in reversed(every[1:-1])}
    return tuple({stages.rank: stages for stages in (every[0], *between.values(), every[-1])}.values())
