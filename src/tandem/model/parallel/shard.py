"""Fully sharded weights: FSDP2 around every layer, and around a root that everything is computed inside of."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard

from tandem.model.parallel.adapter import holders_in
from tandem.model.parallel.grid import Grid
from tandem.model.parallel.tensor import Part, whole_shape


class Root(nn.Module):
    """Computes whatever is asked while the weights outside the layers are gathered."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        return compute(*inputs)


def fully_shard_all(root: Root, layers: Iterable[nn.Module], grid: Grid) -> None:
    """Shard weights over the grid. Gradients come out summed, in float32 on the wire, since the loss's weights were
    made for the whole update. Between forward and backward nothing stays gathered."""
    if not grid.fully_sharded:
        return
    offload = grid.layout.offload_parameters and grid.device.type != "cpu"
    options = {
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for layer in layers:
        for experts in holders_in(layer) if grid.expert.size > 1 else ():
            fully_shard(experts, mesh=grid.experts_sharding, **options)
        fully_shard(layer, mesh=grid.sharding, **options)
    fully_shard(root, mesh=grid.sharding, **options)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sum_copies(root: Root, now: bool) -> None:
    """Whether the backward passes from here on sum gradients between the copies of a sharded model. Those before have
    added theirs up on each copy, as parts, and they are in the next sum."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(now, recurse=False)


def on_grid(values: Tensor, weight: Tensor, part: Part, grid: Grid, *, host: bool = False) -> DTensor:
    """This process's `values` for a weight (the weight, its gradient or its moments) as a piece of the whole; on the
    host a copy, unless they are there. Rows over `shard` come after the cut over `tensor` or `expert`."""
    if part.expert:
        mesh, axis = grid.experts_host if host else grid.experts, grid.expert
    else:
        mesh, axis = grid.host if host else grid.weights, grid.tensor
    sharded = isinstance(weight, DTensor)
    shape = whole_shape(weight, part, axis.size)
    return DTensor.from_local(
        values.detach().to(mesh.device_type),
        mesh,
        [
            Replicate() if part.dim is None else Shard(part.dim),
            Replicate(),
            Shard(0) if sharded else Replicate(),
        ],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
