"""What the processes of a critic's parallel test run: the same two updates in several layouts, and the scores of a
reward model."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from parallel_ranks import CPU
from tandem.algorithms import assess
from tandem.checkpoint.sharded import read_sharded, write_sharded
from tandem.config import Run
from tandem.config.critic import Critic as CriticConfig
from tandem.config.layout import Layout
from tandem.config.reward import Reward
from tandem.config.sections import Model
from tandem.learner import Critic
from tandem.model import load
from tandem.model.new import new_tokenizer
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.load import load_sharded
from tandem.placement.inline import critic_of
from tandem.placement.ranks import actor_of, build_critic, build_reward_model
from tandem.types import Batch, Experience
from tiny_step import batch, run

GAE = {"advantage": "gae", "gae_lambda": 0.9, "scale": "none", "kl": {"coef": 0.0}, "entropy": 0.0}
BIG = {"lr": 0.5, "eps": 1.0, "clip_grad": None}
"""AdamW that shows the gradient in the weights."""
LAYOUTS = {
    "shard": {},
    "replicate": {"replicate": 2},
    "tensor": {"tensor": 2, "sequence": False},
    "sequence": {"tensor": 2},
    "context": {"context": 2},
}
STARTS = ("policy", "given")


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


def prediction(critic: Critic) -> tuple[torch.Tensor, Experience]:
    """The critic's values of a step, and the step as it is learned from."""
    raw: Batch = batch()
    value_BT = critic.values(raw)
    noise_BT = 0.5 * torch.randn(value_BT.shape, generator=torch.Generator().manual_seed(3)) * raw.mask_BT
    made, _ = assess(raw, critic.run.algorithm, 16, 0.0, value_BT=value_BT)
    # As in a later update of a step: the values have moved, and the clip binds somewhere.
    return value_BT, replace(made, value_BT=value_BT + noise_BT)


def weights_of(critic: Critic) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in critic.model.weights()}


def everything(rank: int, world: int, address: str, place: str) -> None:
    torch.set_num_threads(1)
    connect(rank, world, address, CPU, timeout_s=120)
    folder = Path(place)
    for start in STARTS:
        made = settings(folder, start)
        grid = Grid(Layout(), CPU, "learner.layout")
        actor = actor_of(made, load_sharded(made.model, new_tokenizer(), grid))
        _, part = prediction(single(folder, start))
        for name, sizes in LAYOUTS.items():
            critic = build_critic(made, Layout.model_validate(sizes), actor)
            value_BT = critic.values(part)
            figures = critic.update([part, part])
            weights = weights_of(critic)
            if rank == 0:
                out = folder / f"{start} {name}"
                save_file({"value_BT": value_BT, **weights}, f"{out}.safetensors")
                Path(f"{out}.json").write_text(json.dumps(figures))
    for name, sizes in LAYOUTS.items():
        score_B = build_reward_model(made, Layout.model_validate(sizes), actor).scores(part)
        if rank == 0:
            save_file({"score_B": score_B}, folder / f"scores {name}.safetensors")
    write_sharded(folder / "saved", critic.model, critic.optimizer)
    other = build_critic(made, Layout(tensor=2), actor)
    read_sharded(folder / "saved", other.model, other.optimizer)
    for name, weight in weights_of(other).items():
        assert torch.equal(weight, weights[name]), name
    critic.model.save(folder / "exported")
