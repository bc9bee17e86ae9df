"""What a checkpoint of the reinforcement loop holds, and how a run goes on from it, bit for bit."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.checkpoint import (
    optimizer_tensors,
    read_json,
    read_tensors,
    restore_optimizer,
    restore_rng,
    rng_state,
    write_json,
    write_tensors,
)
from tandem.config import dump
from tandem.config.run import Run
from tandem.errors import RunError
from tandem.placement import inline
from tandem.placement.inline import Roles

MODEL, REFERENCE = "model", "reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """A place between two steps, where nothing is half done."""

    step: int
    """Steps done."""
    roles: Mapping[str, Any]
    """`inline.state` at that place."""
    data: str
    """Fingerprint of the prompts."""


def write(folder: Path, run: Run, roles: Roles, boundary: Boundary) -> None:
    """All files of a checkpoint but its manifest."""
    roles.actor.model.save(folder / MODEL)
    if keeps_reference(run):
        assert roles.reference is not None
        roles.reference.model.save(folder / REFERENCE)
    optimizer = roles.actor.optimizer
    tensors, figures = optimizer_tensors(optimizer.adamw, optimizer.parameter_names)
    write_tensors(folder / "optimizer.safetensors", tensors)
    write_tensors(folder / "masters.safetensors", optimizer.master_tensors)
    generators, words = rng_state()
    write_tensors(folder / "random.safetensors", generators)
    state = {"step": boundary.step, "roles": boundary.roles, "data": boundary.data}
    write_json(folder / "state.json", {**state, "optimizer": figures, "random": words})
    (folder / "config.yaml").write_text(dump(run), encoding="utf-8")


def restore(folder: Path, roles: Roles, data: str) -> int:
    """Bring freshly built roles, whose model was loaded from this checkpoint, to its place; returns the step."""
    state = read_json(folder / "state.json")
    if state["data"] != data:
        raise RunError(
            f"{folder}: the questions of data.train changed since this checkpoint, so its place in them means nothing; "
            "restore the file, or start anew with --fresh"
        )
    optimizer = roles.actor.optimizer
    tensors = read_tensors(folder / "optimizer.safetensors")
    restore_optimizer(optimizer.adamw, optimizer.parameter_names, tensors, state["optimizer"])
    optimizer.restore_masters(read_tensors(folder / "masters.safetensors"))
    restore_rng(read_tensors(folder / "random.safetensors"), state["random"])
    inline.restore(roles, state["roles"], state["step"])
    return state["step"]


def keeps_reference(run: Run) -> bool:
    """The reference is not to be had from a folder of the user's: it moved, or was made by the run."""
    copied = run.needs_reference and run.reference.path is None and run.model.lora is None
    return copied and (run.reference.refresh_every is not None or run.model.new is not None)


def config_hash(run: Run) -> str:
    return hashlib.sha256(dump(run).encode()).hexdigest()
