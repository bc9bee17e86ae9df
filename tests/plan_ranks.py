"""What the processes of a plan's test do: they lay a model out, update it, and say how many bytes each holds."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from tandem.config.layout import Layout
from tandem.config.sections import Model
from tandem.learner import Actor
from tandem.model.new import new_tokenizer
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.load import load_sharded
from tandem.model.parallel.mesh import local
from tiny_step import run

LAYOUTS = {
    "shard": {"shard": 2},
    "replicate": {"replicate": 2},
    "tensor": {"tensor": 2},
    "context": {"context": 2},
}


def bytes_of_each(rank: int, world: int, address: str, place: str) -> None:
    """Writes `held.json`: for each layout, bytes by purpose of every process."""
    torch.set_num_threads(1)
    connect(rank, world, address, torch.device("cpu"), timeout_s=120)
    folder, found = Path(place), {}
    for name, sizes in LAYOUTS.items():
        grid = Grid(Layout(**sizes), torch.device("cpu"), "learner.layout")
        model = load_sharded(Model(path=str(folder / "model")), new_tokenizer(), grid)
        actor = Actor(model, run())
        mine = [local(weight) for weight in model.module.parameters()]
        for weight in model.module.parameters():
            weight.grad = torch.zeros_like(weight)
        gradients = [local(weight.grad) for weight in model.module.parameters()]
        actor.optimizer.step(actor.optimizer.gradient_norm())
        states = [local(t) for s in actor.optimizer.adamw.state.values() for t in s.values() if t.ndim]
        parts = {"weights": mine, "gradients": gradients, "optimizer": states}
        everyone: list[dict[str, int]] = [{}] * world
        dist.all_gather_object(everyone, {n: sum(t.nbytes for t in part) for n, part in parts.items()})
        found[name] = everyone
    if rank == 0:
        (folder / "held.json").write_text(json.dumps(found))
