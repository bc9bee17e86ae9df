"""The processes of a model as a grid: its axes, their groups, and the sums over them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tandem.config.layout import Layout
from tandem.errors import ConfigError, RunError
from tandem.model.parallel.meeting import meet
from tandem.model.parallel.mesh import Mesh
from tandem.model.parallel.share import shares
from tandem.types import Batch

TOKEN_AXES = ("pipeline", "data", "context", "tensor")
WEIGHT_AXES = ("tensor", "replicate", "shard")
"""How a weight is cut: first by `tensor`, then each part over `shard` times `context`; `replicate` copies it."""
EXPERT_AXES = ("expert", "replicate", "shard")
"""How the experts of a mixture are cut: first over neighbours, then each part over the other processes."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Processes that share one task."""

    size: int
    rank: int
    group: dist.ProcessGroup


class Grid(Mesh):
    """Many processes, rank = (((pipeline * replicates + replicate) * shards + shard) * contexts + context) * tensors
    + tensor, where the letters with s are the sizes.

    Neighbouring ranks talk most, so the tensor axis is the innermost and the pipeline the outermost. Collective: every
    rank makes it at once.
    """

    def __init__(self, layout: Layout, device: torch.device, where: str) -> None:
        self.layout, self.device = layout, device
        world = dist.get_world_size()
        try:
            replicate, shard, context, tensor = layout.sizes(world)
        except ValueError as cause:
            raise ConfigError(f"{where}: {cause}") from None
        rank_PRSCT = torch.arange(world).view(layout.pipeline, replicate, shard, context, tensor)
        tokens = mesh_of(device.type, rank_PRSCT.flatten(1, 2), TOKEN_AXES)
        self.pipeline, self._data, self.context, self.tensor = (axis(tokens, name) for name in TOKEN_AXES)
        self.data_rank = self._data.rank
        rank_PTRF = rank_PRSCT.permute(0, 4, 1, 2, 3).flatten(3)
        self.weights, self.host, self.sharding = self._cuts(rank_PTRF, WEIGHT_AXES)
        self.expert = Axis(size=1, rank=0, group=self.tensor.group)
        if layout.expert > 1:
            rank_PERF = rank_PTRF.unflatten(3, (-1, layout.expert)).movedim(-1, 1).flatten(2, 3)
            self.experts, self.experts_host, self.experts_sharding = self._cuts(rank_PERF, EXPERT_AXES)
            self.expert = axis(self.experts, "expert")
        self.fully_sharded = replicate * shard * context > 1 or layout.offload_parameters
        self.replicate, self.world = replicate, world

    def _cuts(self, rank_PCRF: Tensor, axes: tuple[str, ...]) -> tuple[DeviceMesh, DeviceMesh, DeviceMesh]:
        """How weights are cut over this process's part of the pipeline: there, in host memory, through which files
        are read and written, and without the first axis, for FSDP2."""
        names = ("pipeline", *axes)
        whole = mesh_of(self.device.type, rank_PCRF, names)
        host = whole if self.device.type == "cpu" else mesh_of("cpu", rank_PCRF, names)
        replicated = rank_PCRF.shape[2] > 1
        return whole[axes], host[axes], whole[axes[1:] if replicated else axes[2]]

    def shares(self, batch: Batch) -> list[Tensor]:
        return shares(batch.length_B, batch.prompt_length_B, batch.group_B, self._data.size)

    def sum(self, values: Tensor) -> Tensor:
        placed = values.to(self.device)
        for axis in (self._data, self.pipeline):
            if axis.size > 1:
                dist.all_reduce(placed, group=axis.group)
        return placed.to(values.device)

    def combine(self, sums: Mapping[str, float]) -> dict[str, float]:
        if self.pipeline.size == 1:
            return self._over_data(sums)
        # Only the last of a pipeline has figures.
        last = self.pipeline.rank == self.pipeline.size - 1
        said = [self._over_data(sums) if last else {}]
        dist.broadcast_object_list(said, group_src=self.pipeline.size - 1, group=self.pipeline.group)
        return said[0]

    def first(self, found: Tensor, name: Callable[[], str | None]) -> str | None:
        anywhere = found.to(self.device, torch.float32)
        dist.all_reduce(anywhere)
        if not anywhere:
            return None
        said: list[str | None] = [None] * self.world
        dist.all_gather_object(said, name())
        return next((each for each in said if each is not None), None)

    def over_stages(self, figures: Mapping[str, float]) -> dict[str, float]:
        """What all processes of a pipeline know, together. Collective."""
        said: list[Mapping[str, float]] = [{}] * self.pipeline.size
        dist.all_gather_object(said, dict(figures), group=self.pipeline.group)
        return {name: value for mapping in said for name, value in mapping.items()}

    def _over_data(self, sums: Mapping[str, float]) -> dict[str, float]:
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


def mesh_of(device: str, ranks: Tensor, names: tuple[str, ...]) -> DeviceMesh:
    """A mesh whose groups wait as long as that of all processes, and not, as PyTorch has it, 10 or 30 minutes."""
    mesh = DeviceMesh(device, ranks, mesh_dim_names=names)
    everyone = dist.distributed_c10d._get_default_group()
    timeout = everyone._get_backend(torch.device("cpu")).options._timeout
    for group in mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    return mesh


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
    timeout, (host, _, port) = timedelta(seconds=timeout_s), address.rpartition(":")
    try:
        store = meet(host, int(port), rank == 0, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except (OSError, RuntimeError, ValueError) as cause:
        raise RunError(f"process {rank} of {world} cannot join the others at {address}: {cause}") from cause
