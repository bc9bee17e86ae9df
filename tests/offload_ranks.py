"""What a process with an accelerator is asked in a test: updates with something waiting in host memory."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from parallel_ranks import Case, single
from tandem.config.layout import Layout
from tandem.learner import Actor
from tandem.model.new import new_tokenizer
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.load import load_sharded
from tandem.model.parallel.mesh import local
from tandem.placement.ranks import actor_of
from tandem.types import Experience

OFFLOADED = {
    "weights": (Case(layout={"offload_parameters": True}), ("cpu", "cpu", "cpu", "cpu")),
    "gradients": (Case(layout={"offload_gradients": True}), ("cuda", "cpu", "cuda", "cuda")),
    "optimizer": (Case(layout={}, optimizer={"offload": True}), ("cuda", "cuda", "cpu", "cpu")),
}
"""By what is switched: where weights, gradients, masters and moments are then."""


def offloaded(rank: int, world: int, address: str, place: str) -> None:
    """Each switch alone: what it names waits in host memory, and all is computed on the accelerator."""
    device, folder = torch.device("cuda"), Path(place)
    connect(rank, world, address, device, timeout_s=120)
    for name, (case, homes) in OFFLOADED.items():
        _, part = single(case, folder)
        grid = Grid(Layout.model_validate(case.layout), device, "learner.layout")
        actor = actor_of(case.run(folder), load_sharded(case.model(folder), new_tokenizer(), grid))
        figures = actor.update([part, part], 0.05)
        weights = {key: weight.cpu() for key, weight in actor.model.weights()}
        found = homes_of(actor, part)
        assert found == dict(zip(found, homes, strict=True)), (name, found)
        save_file(weights, folder / f"offloaded {name}.safetensors")
        (folder / f"offloaded {name}.json").write_text(json.dumps(figures))


def homes_of(actor: Actor, part: Experience) -> dict[str, str]:
    """The kind of device on which each lies, of an actor that has moments; leaves it with the gradient of `part`."""
    optimizer = actor.optimizer
    actor._accumulate(part, 0.05)
    held = {
        "weights": [local(weight) for weight in actor.model.trainable().values()],
        "gradients": list(optimizer._gradients().values()),
        "masters": list(optimizer.masters.values()),
        "moments": [s[name] for s in optimizer.adamw.state.values() for name in ("exp_avg", "exp_avg_sq")],
    }
    assert all(held.values())
    return {name: " and ".join(sorted({t.device.type for t in tensors})) for name, tensors in held.items()}
