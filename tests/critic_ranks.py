"""What the processes of a critic's parallel test run: two updates in many layouts, and the scores of a reward model;
one launch for all of them."""

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

import expert_ranks
import pipeline_ranks
from parallel_ranks import CPU
from tandem.algorithms import assess
from tandem.checkpoint.sharded import read_sharded, write_sharded
from tandem.config import Run
from tandem.config.critic import Critic as CriticConfig
from tandem.config.layout import Layout
from tandem.config.reward import Reward
from tandem.config.sections import Model
from tandem.errors import ConfigError
from tandem.learner import Actor, Critic
from tandem.model import load
from tandem.model.new import new_tokenizer
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.load import load_sharded
from tandem.placement.inline import critic_of
from tandem.placement.ranks import actor_of, build_critic, build_reward_model
from tandem.types import Batch, Experience, take
from tiny_models import FAMILIES as SHALLOW
from tiny_models import randomized, spoiled
from tiny_step import batch, run

GAE = {"advantage": "gae", "gae_lambda": 0.9, "scale": "none", "kl": {"coef": 0.0}, "entropy": 0.0}
BIG = {"lr": 0.2, "eps": 1.0, "clip_grad": None}
"""AdamW that shows the gradient in the weights."""
FAMILIES = {
    "small": SHALLOW["qwen2_grouped"],
    "deep": pipeline_ranks.FAMILIES["qwen2_tied"],
    "experts": expert_ranks.FAMILIES["qwen3_moe"],
    "shared expert": expert_ranks.FAMILIES["qwen2_moe"],
    "experts by other names": expert_ranks.FAMILIES["mixtral"],
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A critic's layout, and where it starts."""

    layout: dict[str, Any]
    start: str = "given"
    """`given`: from a folder; `policy`: as the policy's layers."""
    family: str = "small"
    policy: dict[str, Any] = field(default_factory=dict)
    """The layout of the policy."""


def deep(layout: dict[str, Any], start: str = "given", policy: dict[str, Any] | None = None) -> Case:
    return Case(layout={"pipeline": 2, **layout}, start=start, family="deep", policy=policy or {})


STARTS = ("policy", "given")
LAYOUTS = {
    "shard": {},
    "replicate": {"replicate": 2},
    "tensor": {"tensor": 2, "sequence": False},
    "sequence": {"tensor": 2},
    "context": {"context": 2},
}
UNEVEN = {"pipeline": 2, "pipeline_layers": [1, 4]}
CASES = {
    4: {
        "four stages": deep({"pipeline": 4}, "policy", {"tensor": 2}),
        "stages x sequence": deep({"tensor": 2, "pipeline_chunks": 2}, "policy", UNEVEN),
        "stages x experts": Case(layout={"pipeline": 2, "expert": 2}, family="experts"),
        "stages x shard": deep({"pipeline_schedule": "gpipe"}),
    },
    2: {
        **{f"{s} {n}": Case(layout=sizes, start=s) for s in STARTS for n, sizes in LAYOUTS.items()},
        "stages": deep({}),
        "interleaved stages": deep(
            {"pipeline_chunks": 2, "pipeline_layers": [2, 1, 1, 1], "pipeline_schedule": "gpipe"},
            "policy",
            UNEVEN,
        ),
        "experts": Case(layout={"expert": 2}, family="experts"),
        "experts of the policy": Case(layout={"expert": 2}, start="policy", family="experts"),
        "shared expert": Case(layout={"expert": 2}, start="policy", family="shared expert"),
        "experts by other names": Case(layout={"expert": 2}, family="experts by other names"),
    },
}
SCORED = {**{name: Case(layout=sizes) for name, sizes in LAYOUTS.items()}, "stages": deep({})}
"""Of a reward model on 2 processes."""
SAVED = "stages x shard"
"""Saved by 4 processes, goes on in these layouts of 2."""
RESUMED = {"uneven stages": UNEVEN, "tensor": {"tensor": 2}}


def make(folder: Path) -> None:
    """Policies, and reward models of another shape."""
    for family, new in FAMILIES.items():
        randomized(new()).save_pretrained(folder / family / "policy")
        config = new().config
        config.intermediate_size, config.num_labels = 64, 1
        if family in ("experts", "shared expert"):
            config.moe_intermediate_size = 40
        network = AutoModelForSequenceClassification.from_config(config)
        randomized(network, seed=4).save_pretrained(folder / family / "critic")
        for name in ("policy", "critic"):
            new_tokenizer().save_pretrained(folder / family / name)
    spoiled(folder / "small" / "critic", folder / "odd", "bias")


def settings(folder: Path, start: str, **critic: object) -> Run:
    """A run around the tiny policy in `folder`, with a critic made of it or the one in `folder`."""
    made = run(GAE, tokens_per_forward=64)
    path = str(folder / "critic") if start == "given" else None
    return made.model_copy(
        update={
            "model": Model(path=str(folder / "policy")),
            "reward": Reward.model_validate({"model": {"path": str(folder / "critic")}}),
            "critic": CriticConfig.model_validate({"path": path, "optimizer": BIG, **critic}),
        }
    )


def single(folder: Path, start: str) -> Critic:
    made = settings(folder, start)
    return critic_of(made, load(made.model, new_tokenizer(), CPU))


def spread(case: Case, folder: Path) -> Critic:
    """The critic in its layout."""
    made = settings(folder / case.family, case.start)
    actor = policy(folder / case.family, json.dumps(case.policy))
    return build_critic(made, Layout.model_validate(case.layout), actor)


@cache
def policy(folder: Path, layout: str) -> Actor:
    made = settings(folder, "policy")
    grid = Grid(Layout.model_validate_json(layout), CPU, "learner.layout")
    return actor_of(made, load_sharded(made.model, new_tokenizer(), grid))


@cache
def learned(folder: Path, start: str) -> Experience:
    """What every layout is given."""
    return prediction(single(folder, start))[1]


def prediction(critic: Critic) -> tuple[torch.Tensor, Experience]:
    """The critic's values of a step, and the step as it is learned from."""
    raw: Batch = batch()
    value_BT = critic.values(raw)
    noise_BT = 0.5 * torch.randn(value_BT.shape, generator=torch.Generator().manual_seed(3)) * raw.mask_BT
    made, _ = assess(raw, critic.run.algorithm, 16, 0.0, value_BT=value_BT)
    # As in a later update of a step: the values have moved, and the clip binds somewhere.
    return value_BT, replace(made, value_BT=value_BT + noise_BT)


def updates(part: Experience) -> list[Experience]:
    """Two, of which the second has other rows and lengths."""
    return [part, take(part, torch.tensor([10, 2, 7, 3, 5]))]


def weights_of(critic: Critic) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in critic.model.weights()}


def everything(rank: int, world: int, address: str, place: str) -> None:
    torch.set_num_threads(1)
    connect(rank, world, address, CPU, timeout_s=120)
    folder = Path(place)
    for name, case in CASES[world].items():
        critic = spread(case, folder)
        part = learned(folder / case.family, case.start)
        value_BT = critic.values(part)
        figures = critic.update(updates(part))
        weights = weights_of(critic)
        if rank == 0:
            save_file({"value_BT": value_BT, **weights}, folder / f"{world} {name}.safetensors")
            (folder / f"{world} {name}.json").write_text(json.dumps(figures))
        if world == 4:
            critic.model.save(folder / f"{name} exported")
        if name == SAVED:
            write_sharded(folder / "saved", critic.model, critic.optimizer)
            critic.update([part])
            later = weights_of(critic)
            if rank == 0:
                save_file(later, folder / "later.safetensors")
    if world == 2:
        odd_head(folder)
        score(folder, rank)
    for name, sizes in RESUMED.items() if world == 2 else ():
        case = replace(CASES[4][SAVED], layout=sizes)
        part = learned(folder / case.family, case.start)
        critic = spread(case, folder)
        read_sharded(folder / "saved", critic.model, critic.optimizer)
        critic.update([part])
        later = weights_of(critic)
        if rank == 0:
            save_file(later, folder / f"later {name}.safetensors")


def score(folder: Path, rank: int) -> None:
    """A step, by the reward model in all its layouts."""
    for name, case in SCORED.items():
        actor = policy(folder / case.family, "{}")
        score_B = build_reward_model(actor.run, Layout.model_validate(case.layout), actor).scores(batch())
        if rank == 0:
            save_file({"score_B": score_B}, folder / f"scores {name}.safetensors")


def odd_head(folder: Path) -> None:
    """A head with a bias is refused, as on one process."""
    made = settings(folder / "small", "given")
    critic = made.critic.model_copy(update={"path": str(folder / "odd")})
    made = made.model_copy(update={"critic": critic})
    with pytest.raises(ConfigError, match=r"critic\.path=.*odd has a head with a bias"):
        build_critic(made, Layout(), policy(folder / "small", "{}"))
