"""Each preset, end to end on one batch, against its paper's formula written out in plain Python.

The references know nothing of masks, padding or weights: they loop over answers and let autograd differentiate.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

from config_file import SMALL, write
from small_batch import noise, small_batch
from tandem.algorithms import assess, policy_loss
from tandem.config import load, preset_names
from tandem.types import Batch

LIMIT = 8
REWARDS = [[0.0, 1.0, 1.0, 0.5], [2.0, -1.0, 0.0, 2.0]]
LENGTHS = [[2, 5, 1, 3], [4, 4, 6, 2]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One sampled answer: log-probabilities of its tokens under policy, old policy and reference."""

    logp: Tensor
    old: Tensor
    ref: Tensor
    reward: float
    others: list[float]
    """Rewards of the other answers to the same prompt."""
    values: Tensor
    """What a critic expected before each token."""

    @property
    def standardized(self) -> float:
        group = [self.reward, *self.others]
        return (self.reward - fmean(group)) / stdev(group)

    @property
    def centred(self) -> float:
        return self.reward - fmean([self.reward, *self.others])

    @property
    def kl3(self) -> Tensor:
        """The unbiased estimator of GRPO's equation 4, per token."""
        return torch.exp(self.ref - self.logp) - (self.ref - self.logp) - 1


def clipped(ratio: Tensor, advantage: Tensor | float, low: float, high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A)"""
    return torch.min(ratio * advantage, torch.clip(ratio, 1 - low, 1 + high) * advantage)


def tokens_of(answers: list[Answer]) -> int:
    return sum(len(a.logp) for a in answers)


def grpo(answers: list[Answer]) -> Tensor:
    terms = [
        (clipped(torch.exp(a.logp - a.old), a.standardized, 0.2, 0.2) - 0.04 * a.kl3).sum() / len(a.logp)
        for a in answers
    ]
    return -sum(terms) / len(answers)


def dr_grpo(answers: list[Answer]) -> Tensor:
    """Without the two normalizations; the constant divisor is the length limit, as in the authors' code."""
    terms = [clipped(torch.exp(a.logp - a.old), a.centred, 0.2, 0.2).sum() for a in answers]
    return -sum(terms) / len(answers) / LIMIT


def dapo(answers: list[Answer]) -> Tensor:
    terms = [clipped(torch.exp(a.logp - a.old), a.standardized, 0.2, 0.28).sum() for a in answers]
    return -sum(terms) / tokens_of(answers)


def gspo(answers: list[Answer]) -> Tensor:
    """Equations 5 and 7: one ratio per sequence, differentiated as it stands."""
    terms = []
    for a in answers:
        ratio = torch.exp((a.logp - a.old).sum() / len(a.logp))
        terms.append(clipped(ratio, a.standardized, 3e-4, 4e-4))
    return -sum(terms) / len(answers)


def cispo(answers: list[Answer]) -> Tensor:
    terms = []
    for a in answers:
        weight = torch.clip(torch.exp(a.logp - a.old), max=5.0).detach()
        terms.append((weight * a.standardized * a.logp).sum())
    return -sum(terms) / tokens_of(answers)


def sequence_reward(answer: Answer) -> float:
    """RLOO's R(y, x) = r(x, y) - beta log(pi(y|x) / pi_ref(y|x))."""
    return answer.reward - 0.03 * (answer.old - answer.ref).sum().item()


def rloo(answers: list[Answer]) -> Tensor:
    """With the token ratios that Tandem adds for several updates per step; they are 1 in the first."""
    total = torch.zeros((), dtype=torch.float64)
    for start in (0, 4):
        group = answers[start : start + 4]
        rewards = [sequence_reward(a) for a in group]
        for i, a in enumerate(group):
            advantage = rewards[i] - fmean(rewards[:i] + rewards[i + 1 :])
            total = total + (torch.exp(a.logp - a.old) * advantage).sum()
    return -total / len(answers)


def normalized(advantages: list[Tensor]) -> list[Tensor]:
    """Over all tokens of the batch."""
    every = torch.cat(advantages).tolist()
    return [(a - fmean(every)) / stdev(every) for a in advantages]


def reinforce_pp(answers: list[Answer]) -> Tensor:
    """A_t = r - beta (sum of the KL from token t on), normalized over the batch; k1 as the KL."""
    advantages = []
    for a in answers:
        kl = (a.old - a.ref).double()
        advantages.append(torch.stack([a.reward - 0.01 * kl[t:].sum() for t in range(len(kl))]))
    pairs = zip(answers, normalized(advantages))
    terms = [clipped(torch.exp(a.logp - a.old), advantage, 0.2, 0.2).sum() for a, advantage in pairs]
    return -sum(terms) / tokens_of(answers)


def reinforce_pp_baseline(answers: list[Answer]) -> Tensor:
    """The group's mean is subtracted, the batch normalized; k2 is a term of the loss."""
    advantages = normalized([torch.full((len(a.logp),), a.centred, dtype=torch.float64) for a in answers])
    terms = [
        (clipped(torch.exp(a.logp - a.old), advantage, 0.2, 0.2) - 0.001 * (a.logp - a.ref) ** 2 / 2).sum()
        for a, advantage in zip(answers, advantages)
    ]
    return -sum(terms) / tokens_of(answers)


def ppo(answers: list[Answer]) -> Tensor:
    """Equation 11 of PPO's paper: A_t = sum over l of (gamma lambda)^l d_(t+l), here with gamma 1 and lambda 0.95; the
    reward of a token is -beta log(pi / pi_ref), that of the last one has the score on top. Normalized over the
    batch."""
    advantages = []
    for a in answers:
        kl = (a.old - a.ref).double()
        rewards = [-0.02 * kl[t].item() + (a.reward if t == len(kl) - 1 else 0.0) for t in range(len(kl))]
        values = [*a.values.tolist(), 0.0]
        deltas = [rewards[t] + values[t + 1] - values[t] for t in range(len(kl))]
        sums = [sum(0.95**n * delta for n, delta in enumerate(deltas[t:])) for t in range(len(kl))]
        advantages.append(torch.tensor(sums, dtype=torch.float64))
    pairs = zip(answers, normalized(advantages))
    terms = [clipped(torch.exp(a.logp - a.old), advantage, 0.2, 0.2).sum() for a, advantage in pairs]
    return -sum(terms) / tokens_of(answers)


FORMULAS: dict[str, Callable[[list[Answer]], Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "ppo": ppo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}


def answers_of(batch: Batch, logp_BT: Tensor, ref_BT: Tensor) -> list[Answer]:
    flat = [(reward, group[:i] + group[i + 1 :]) for group in REWARDS for i, reward in enumerate(group)]
    answers = []
    for row, (reward, others) in enumerate(flat):
        span = batch.mask_BT[row]
        old, ref = (column[row, span].double() for column in (batch.policy_logp_BT, ref_BT))
        values = values_of(batch)[row, span].double()
        answers.append(
            Answer(logp=logp_BT[row, span], old=old, ref=ref, reward=reward, others=others, values=values)
        )
    return answers


def values_of(batch: Batch) -> Tensor:
    """What a critic says."""
    return noise(batch, 0.7, seed=5)


def batch_and_policy(step: float) -> tuple[Batch, Tensor, Tensor]:
    """A batch, the log-probabilities of a policy that has moved by `step`, and those of a reference."""
    batch = small_batch(REWARDS, LENGTHS, padding=2)
    logp_BT = (batch.policy_logp_BT + noise(batch, step)).double().requires_grad_()
    return batch, logp_BT, batch.policy_logp_BT + noise(batch, 0.5, seed=8)


def trainer_loss(name: str, step: float, folder: Path) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What Tandem computes from the preset's file: loss, gradient, sums."""
    keys = load(write(folder, SMALL), [f"algorithm.preset={name}"]).algorithm
    batch, logp_BT, ref_BT = batch_and_policy(step)
    experience, _ = assess(
        batch,
        keys,
        max_answer_tokens=LIMIT,
        kl_coef=keys.kl.coef,
        old_logp_BT=batch.policy_logp_BT,
        ref_logp_BT=ref_BT if keys.kl.coef else None,
        value_BT=values_of(batch) if keys.advantage == "gae" else None,
    )
    loss, sums = policy_loss(logp_BT, torch.zeros_like(logp_BT), experience, keys, keys.kl.coef)
    loss.backward()
    return loss.detach(), logp_BT.grad, sums


def test_every_preset_has_a_formula_to_be_held_against():
    assert sorted(FORMULAS) == preset_names()


@pytest.mark.parametrize("step", [0.0, 1e-3, 0.3, 1.5])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_preset_is_its_papers_formula(name, step, tmp_path):
    loss, gradient, _ = trainer_loss(name, step, tmp_path)
    batch, logp_BT, ref_BT = batch_and_policy(step)
    expected = FORMULAS[name](answers_of(batch, logp_BT, ref_BT))
    expected.backward()
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(loss, expected.detach(), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(gradient, logp_BT.grad, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("grpo", 0.3),
        ("dr_grpo", 0.3),
        ("dapo", 0.3),
        ("gspo", 1e-3),
        ("cispo", 1.5),
        ("reinforce_pp", 0.3),
        ("ppo", 0.3),
    ],
)
def test_the_comparison_covers_clipped_and_unclipped_tokens(name, step, tmp_path):
    _, _, sums = trainer_loss(name, step, tmp_path)
    assert 0 < sums["clip_low"] + sums["clip_high"] < sums["tokens"]


def test_the_documented_preset_loads(tmp_path):
    document = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    (block,) = document.split("```yaml\n")[1:]
    write(tmp_path, block.split("```")[0], "mine.yaml")
    keys = load(write(tmp_path, SMALL + "algorithm: {preset: mine.yaml}\n")).algorithm
    assert (keys.advantage, keys.clip.dual, keys.kl.coef) == ("leave_one_out", 3.0, 0.001)
    for name in preset_names():
        assert f"| `{name}` |" in document


def test_rloo_on_policy_is_reinforce_over_whole_answers(tmp_path):
    """The paper's gradient: the mean over answers of the advantage times the gradient of log pi(y|x)."""
    _, gradient, _ = trainer_loss("rloo", 0.0, tmp_path)
    batch, logp_BT, ref_BT = batch_and_policy(0.0)
    answers = answers_of(batch, logp_BT, ref_BT)
    rewards = [sequence_reward(a) for a in answers]
    terms = []
    for i, a in enumerate(answers):
        group = range(4) if i < 4 else range(4, 8)
        terms.append(-(rewards[i] - fmean(rewards[j] for j in group if j != i)) * a.logp.sum() / 8)
    torch.stack(terms).sum().backward()
    torch.testing.assert_close(gradient, logp_BT.grad, rtol=1e-5, atol=1e-7)


def test_a_failed_answer_takes_part_in_no_preset(tmp_path):
    """Loss and gradient with one more answer, whose scoring failed, are those without it."""
    for name in preset_names():
        keys = load(write(tmp_path, SMALL), [f"algorithm.preset={name}"]).algorithm
        batch, _, ref_BT = batch_and_policy(0.0)
        rewards = batch.reward_B.clone()
        rewards[3] = torch.nan
        rest = torch.tensor([0, 1, 2, 4, 5, 6, 7])
        failed = replace(batch, reward_B=rewards)
        without = replace(
            batch, **{field: getattr(batch, field)[rest] for field in Batch.__dataclass_fields__}
        )
        gradients = []
        values_BT = values_of(batch)
        for case, ref, values in ((failed, ref_BT, values_BT), (without, ref_BT[rest], values_BT[rest])):
            experience, _ = assess(
                case,
                keys,
                max_answer_tokens=LIMIT,
                kl_coef=keys.kl.coef,
                ref_logp_BT=ref if keys.kl.coef else None,
                value_BT=values if keys.advantage == "gae" else None,
            )
            leaf = case.policy_logp_BT.clone().requires_grad_()
            policy_loss(leaf, torch.zeros_like(leaf), experience, keys, keys.kl.coef)[0].backward()
            gradients.append(leaf.grad)
        assert bool((gradients[0][3] == 0).all())
        torch.testing.assert_close(gradients[0][rest], gradients[1])
