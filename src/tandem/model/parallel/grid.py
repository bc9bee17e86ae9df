"""The processes of a model as a grid: its axes, their groups, and the sums over them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tandem.config.layout import Layout
from tandem.errors import ConfigError, RunError
from tandem.model.parallel.mesh import Mesh
from tandem.model.parallel.share import shares
from tandem.types import Batch

WEIGHT_AXES = ("tensor", "replicate", "shard")
"""How a weight is cut: first by `tensor`, then each part over `shard` times `context`; `replicate` copies it."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Processes that share one task."""

    size: int
    rank: int
    group: dist.ProcessGroup


class Grid(Mesh):
    """Many processes, rank = ((replicate * shards + shard) * contexts + context) * tensors + tensor.

    Neighbouring ranks talk most, so the tensor axis is the innermost. Collective: every rank makes it at once.
    """

    def __init__(self, layout: Layout, device: torch.device, where: str) -> None:
        self.layout, self.device = layout, device
        world = dist.get_world_size()
        try:
            replicate, shard, context, tensor = layout.sizes(world)
        except ValueError as cause:
            raise ConfigError(f"{where}: {cause}") from None
        rank_RSCT = torch.arange(world).view(replicate, shard, context, tensor)
        tokens = DeviceMesh(
            device.type, rank_RSCT.flatten(0, 1), mesh_dim_names=("data", "context", "tensor")
        )
        self._data, self.context, self.tensor = (axis(tokens, name) for name in ("data", "context", "tensor"))
        self.data_rank = self._data.rank
        rank_TRF = rank_RSCT.permute(3, 0, 1, 2).flatten(2)
        self.weights = DeviceMesh(device.type, rank_TRF, mesh_dim_names=WEIGHT_AXES)
        # Files are read and written through host memory.
        self.host = (
            self.weights if device.type == "cpu" else DeviceMesh("cpu", rank_TRF, mesh_dim_names=WEIGHT_AXES)
        )
        self.fully_sharded = replicate * shard * context > 1 or layout.offload_parameters
        self.replicate, self.world = replicate, world

    def shares(self, batch: Batch) -> list[Tensor]:
        return shares(batch.length_B, batch.prompt_length_B, batch.group_B, self._data.size)

    def sum(self, values: Tensor) -> Tensor:
        if self._data.size == 1:
            return values
        placed = values.to(self.device)
        dist.all_reduce(placed, group=self._data.group)
        return placed.to(values.device)

    def combine(self, sums: Mapping[str, float]) -> dict[str, float]:
        if self._data.size == 1:
            return dict(sums)
        names = sorted(sums)
        maxima = [name for name in names if name.startswith("max/")]
        added = [name for name in names if not name.startswith("max/")]
        out = {}
        for chosen, op in ((added, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
            values = torch.tensor([sums[name] for name in chosen], dtype=torch.float64, device=self.device)
            dist.all_reduce(values, op=op, group=self._data.group)
            out |= dict(zip(chosen, values.tolist()))
        return out


def axis(mesh: DeviceMesh, name: str) -> Axis:
    group = mesh.get_group(name)
    return Axis(size=dist.get_world_size(group), rank=dist.get_rank(group), group=group)


def connect(rank: int, world: int, address: str, device: torch.device, timeout_s: float = 600) -> None:
    """Join the process group that listens at `address` (host:port of rank 0); RunError where it cannot be reached.

    Collectives fail after `timeout_s` without answer, so that a lost process ends the others.
    """
    backend = (
        "gloo"
        if device.type == "cpu"
        else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    )
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
    except (dist.DistError, RuntimeError, ValueError) as cause:
        raise RunError(f"process {rank} of {world} cannot join the others at {address}: {cause}") from cause
