"""Reward rises where there is something to learn, and only there."""

from pathlib import Path
from statistics import fmean

import pytest

from tandem.journal import read_metrics
from tandem.train.run import train

REWARD = f"{Path(__file__).parent / 'data' / 'digit_share.py'}:digit_share"


def gain(run, quiet) -> float:
    """Mean reward of the last five steps over that of the first five."""
    train(run, quiet)
    rewards = [row["reward/mean"] for row in read_metrics(Path(run.run_dir) / "metrics.jsonl")]
    return fmean(rewards[-5:]) - fmean(rewards[:5])


def setup(make_run, folder, seed, **changes):
    return make_run(
        folder,
        steps=25,
        seed=seed,
        sampling={"prompts_per_step": 8, "answers_per_prompt": 8, "max_answer_tokens": 12},
        reward={"functions": [{"name": REWARD}], **changes},
        learner={"optimizer": {"lr": 3e-3}},
        algorithm={"kl": {"coef": 0.0}},
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_reward_rises(seed, random_folder, make_run, quiet):
    assert gain(setup(make_run, random_folder, seed), quiet) > 0.3


@pytest.mark.parametrize("seed", [0, 1])
def test_with_rewards_dealt_out_at_random_nothing_is_learned(seed, random_folder, make_run, quiet):
    assert gain(setup(make_run, random_folder, seed, permute=True), quiet) < 0.1
