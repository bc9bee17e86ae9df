"""What a checkpoint of the reinforcement loop holds, and how a run goes on from it, bit for bit."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

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
from tandem.checkpoint.sharded import read_model, read_sharded, read_whole, write_sharded
from tandem.config import dump
from tandem.config.run import Run
from tandem.errors import RunError
from tandem.learner import Actor, Pupil, Reference
from tandem.model.parallel.model import ShardedModel
from tandem.placement import inline
from tandem.placement.inline import Roles
from tandem.rewards.scorer import Scorer
from tandem.train.ahead import read_ahead, write_ahead

MODEL, REFERENCE, SHARDED, CRITIC = "model", "reference", "sharded", "critic"
OPTIMIZER, MASTERS, AHEAD = "optimizer.safetensors", "masters.safetensors", "ahead.safetensors"
CONFIGURED = ("betas", "eps", "weight_decay")
"""Of the optimizer, what is the configuration's, wherever it goes on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """A place between two steps, where nothing is half done."""

    step: int
    """Steps done."""
    roles: Mapping[str, Any]
    """`inline.state` at that place."""
    data: str
    """Fingerprint of the prompts."""
    rewards: Mapping[str, str | None]
    """`Scorer.digests`."""


def write(folder: Path, run: Run, roles: Roles, boundary: Boundary) -> None:
    """All files of a checkpoint but its manifest."""
    learned = roles.on_learners(write_learned, folder, keeps_reference(run))
    if run.needs_critic:
        learned["critic_optimizer"] = roles.on_critic(write_pupil, folder / CRITIC)
    stream = dict(boundary.roles["stream"]())
    if stream["ahead"]:
        write_ahead(folder / AHEAD, stream.pop("ahead"))
    small = {**boundary.roles, "stream": stream}
    state = {"step": boundary.step, "roles": small, "data": boundary.data, "rewards": boundary.rewards}
    write_json(folder / "state.json", {**state, **learned})
    (folder / "config.yaml").write_text(dump(run), encoding="utf-8")


def write_learned(
    actor: Actor, reference: Reference | None, folder: Path, with_reference: bool
) -> dict[str, Any]:
    """Weights, optimizer and random numbers; returns what of them goes into state.json."""
    if with_reference:
        assert reference is not None
        reference.model.save(folder / REFERENCE)
    figures = write_pupil(actor, folder)
    generators, words = rng_state()
    if not isinstance(actor.model, ShardedModel) or dist.get_rank() == 0:
        write_tensors(folder / "random.safetensors", generators)
    return {"optimizer": figures, "random": words}


def write_pupil(pupil: Pupil, folder: Path) -> dict[str, Any]:
    """Weights and optimizer of a model that learns; returns what of them goes into state.json."""
    optimizer = pupil.optimizer
    if isinstance(pupil.model, ShardedModel):
        write_sharded(folder / SHARDED, pupil.model, optimizer)
        return {}
    pupil.model.save(folder / MODEL)
    tensors, figures = optimizer_tensors(optimizer.adamw, optimizer.parameter_names)
    write_tensors(folder / OPTIMIZER, tensors)
    write_tensors(folder / MASTERS, optimizer.master_tensors)
    return figures


def restore(folder: Path, roles: Roles, data: str, scorer: Scorer) -> int:
    """Bring freshly built roles to the place of a checkpoint; returns the step."""
    state = read_json(folder / "state.json")
    if state["data"] != data:
        raise RunError(
            f"{folder}: the questions of data.train changed since this checkpoint, so its place in them means nothing; "
            "restore the file, or start anew with --fresh"
        )
    scorer.compare(state.get("rewards", {}))
    if roles.critic is not None:
        if "critic_optimizer" not in state:
            raise RunError(
                f"{folder} holds no critic, which algorithm.advantage=gae needs: begin anew from its policy, with "
                f"model.path={folder / MODEL} and another run_dir"
            )
        roles.on_critic(read_pupil, folder / CRITIC, state["critic_optimizer"])
    roles.on_learners(read_learned, folder, state["optimizer"], state["random"])
    if (folder / AHEAD).is_file():
        state["roles"]["stream"]["ahead"] = read_ahead(folder / AHEAD)
    inline.restore(roles, state["roles"], state["step"])
    return state["step"]


def read_learned(
    actor: Actor,
    reference: Reference | None,
    folder: Path,
    figures: Mapping[str, Any],
    words: Mapping[str, Any],
) -> None:
    """What `write_learned` wrote, in whichever layout that was, read into the one that is here."""
    read_pupil(actor, folder, figures)
    restore_rng(read_tensors(folder / "random.safetensors"), words)


def read_pupil(pupil: Pupil, folder: Path, figures: Mapping[str, Any]) -> None:
    """Weights and optimizer."""
    model, optimizer = pupil.model, pupil.optimizer
    if (folder / SHARDED).is_dir():
        read_sharded(folder / SHARDED, model, optimizer)
    else:
        read_model(folder / MODEL, model)
        if isinstance(model, ShardedModel):
            read_whole(folder / OPTIMIZER, model, optimizer)
        else:
            tensors = read_tensors(folder / OPTIMIZER)
            groups = optimizer.adamw.param_groups
            options = [{name: group[name] for name in CONFIGURED} for group in groups]
            restore_optimizer(optimizer.adamw, optimizer.parameter_names, tensors, figures)
            for group, asked in zip(groups, options):
                group.update(asked)
            optimizer.restore_masters(read_tensors(folder / MASTERS))


def keeps_reference(run: Run) -> bool:
    """The reference is not to be had from a folder of the user's: it moved, or was made by the run."""
    copied = run.needs_reference and run.reference.path is None and run.model.lora is None
    return copied and (run.reference.refresh_every is not None or run.model.new is not None)


def reference_in(checkpoint: Path | None, run: Run) -> Path | None:
    """The folder of the reference that a checkpoint keeps, where the run has one of this kind."""
    if checkpoint is None or not keeps_reference(run):
        return None
    folder = checkpoint / REFERENCE
    if not folder.is_dir():
        raise RunError(
            f"{checkpoint} holds no reference, which algorithm.kl.coef={run.algorithm.kl.coef:g} needs: give "
            f"reference.path, or begin anew from its policy, with model.path={checkpoint / MODEL} and another run_dir"
        )
    return folder


def config_hash(run: Run) -> str:
    return hashlib.sha256(dump(run).encode()).hexdigest()
