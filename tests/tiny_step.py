"""A step's experience around a tiny model, and updates of it that are large enough to compare."""

from dataclasses import replace

import pytest
import torch

from tandem.algorithms import assess
from tandem.config import Run
from tandem.learner import Actor
from tandem.model import LanguageModel
from tandem.types import Batch, Experience
from tiny_models import language_model

TEMPERATURE = 0.8
NEARLY_LINEAR = {"lr": 0.5, "eps": 1.0, "clip_grad": None}
"""AdamW moves a weight by lr g / (|g| + eps): with a large eps the weights show the gradient itself."""
NO_PULL = {"kl": {"coef": 0.0}, "entropy": 0.0}
"""Algorithm keys that leave only the advantages to push."""


def run(algorithm=None, optimizer=None, **learner) -> Run:
    return Run.model_validate(
        {
            "run_dir": "unused",
            "model": {"new": {}},
            "data": {"train": "tandem:addition"},
            "reward": {"functions": [{"name": "answer_number"}]},
            "sampling": {"temperature": TEMPERATURE, "max_answer_tokens": 16},
            "algorithm": {"kl": {"coef": 0.05}, "entropy": 0.01, **(algorithm or {})},
            "learner": {"optimizer": NEARLY_LINEAR if optimizer is None else optimizer, **learner},
        }
    )


def batch(seed: int = 0, groups: int = 4, answers: int = 3) -> Batch:
    """Prompts of different lengths, answers of different lengths, rewards of 0 and 1; group 1 is all equal."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * answers
    group_B = torch.arange(groups).repeat_interleave(answers)
    prompt_B = torch.randint(1, 9, (groups,), generator=generator)[group_B]
    length_B = prompt_B + torch.randint(1, 17, (rows,), generator=generator)
    column_T = torch.arange(int(length_B.max()))
    mask_BT = (column_T >= prompt_B[:, None]) & (column_T < length_B[:, None])
    tokens_BT = torch.randint(250, mask_BT.shape, generator=generator)
    prompt_GT = tokens_BT[::answers].repeat_interleave(answers, 0)
    tokens_BT = torch.where(column_T < prompt_B[:, None], prompt_GT, tokens_BT)
    first_B = torch.arange(rows) - torch.arange(rows) % answers
    tokens_BT = torch.where(column_T < prompt_B[:, None], tokens_BT[first_B], tokens_BT)
    tokens_BT[column_T >= length_B[:, None]] = 0
    reward_B = torch.randint(2, (rows,), generator=generator).double()
    reward_B[0], reward_B[1], reward_B[group_B == 1] = 0.0, 1.0, 1.0
    nothing_BT = torch.zeros(mask_BT.shape)
    return Batch(
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        rollout_logp_BT=nothing_BT,
        policy_logp_BT=nothing_BT,
        reward_B=reward_B,
        group_B=group_B,
        length_B=length_B,
        prompt_length_B=prompt_B,
        truncated_B=torch.zeros(rows, dtype=torch.bool),
        version_B=torch.zeros(rows, dtype=torch.long),
    )


def experience(actor: Actor, *, off_policy: float = 0.0, seed: int = 0) -> Experience:
    """A step's experience as the loop makes it. `off_policy` moves the old log-probabilities away from the policy's,
    so that ratios differ from 1 and the clip binds."""
    raw = batch(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    policy_BT = actor.logprobs(raw)
    shift_BT = off_policy * torch.randn(policy_BT.shape, generator=generator) * raw.mask_BT
    raw = replace(raw, policy_logp_BT=policy_BT + shift_BT, rollout_logp_BT=policy_BT + shift_BT)
    algorithm = actor.run.algorithm
    ref_BT = (policy_BT + 0.3 * torch.randn(policy_BT.shape, generator=generator)) * raw.mask_BT
    made, _ = assess(
        raw,
        algorithm,
        max_answer_tokens=16,
        kl_coef=algorithm.kl.coef,
        old_logp_BT=raw.policy_logp_BT if off_policy else None,
        ref_logp_BT=ref_BT if algorithm.kl.coef else None,
    )
    return made


def weights_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.module.named_parameters()}


def updated(settings: Run, *, off_policy: float = 0.4, family: str = "qwen2_grouped", change=None):
    """Weights and metrics after one update of a fresh actor; `change` alters the experience first."""
    actor = Actor(language_model(family), settings)
    part = experience(actor, off_policy=off_policy)
    part = change(part) if change else part
    figures = actor.update([part], settings.algorithm.kl.coef)
    return weights_of(actor.model), figures


def assert_same(result, expected, atol=2e-5):
    (weights, figures), (other_weights, other_figures) = result, expected
    start = weights_of(language_model())
    moved = max(float((weight - start[name]).abs().max()) for name, weight in weights.items())
    assert moved > 1e-2, "the update must be large against the tolerance"
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], atol=atol, rtol=1e-4, msg=name)
    for name in other_figures:
        assert figures[name] == pytest.approx(other_figures[name], rel=1e-4, abs=1e-5), name
