"""Which process does what, as the learner sees it; the plain case is one process that does everything."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tandem.types import Batch


class Mesh:
    """One process: it sees all sequences and all tokens, and every sum is its own."""

    data_rank = 0
    """This process among those that sequences are shared out to."""

    def shares(self, batch: Batch) -> list[Tensor]:
        """Row indices for each data rank; all ranks find the same."""
        return [torch.arange(batch.size)]

    def sum(self, values: Tensor) -> Tensor:
        """Summed over the data ranks."""
        return values

    def combine(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Figures of all data ranks together: those named `max/*` by their maximum, the others by their sum."""
        return dict(sums)

    def first(self, found: Tensor, name: Callable[[], str | None]) -> str | None:
        """`name()` of the first process where it is one, asked only if any of them has `found` something; the same
        for all. Collective."""
        return name() if found else None


ALONE = Mesh()


def norm_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """2-norm over all gradients, in float32; 0 where there is none."""
    norms = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients.values()]
    return torch.stack(norms).norm() if norms else torch.zeros(())


def local(values: Tensor) -> Tensor:
    """What of a sharded tensor is here, in the same memory; a plain one is all here."""
    return values.detach().to_local() if isinstance(values, DTensor) else values
