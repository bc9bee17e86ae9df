"""KL, baselines, advantages and rewards to go: numbers worked out by hand, and laws over random batches."""

import math
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from small_batch import algorithm, noise, random_batch, reordered, small_batch
from tandem.algorithms import (
    KL_ESTIMATORS,
    KlController,
    assess,
    group_baseline,
    importance_correction,
    kl_estimate,
    last_token,
    rewards_to_go,
    whiten,
)
from tandem.config.sections import Algorithm, Kl
from tandem.types import Batch, Experience

NAN = float("nan")


def advantages(batch: Batch, keys: Algorithm, **given: Tensor) -> Tensor:
    return assessed(batch, keys, **given).advantage_BT


def assessed(batch: Batch, keys: Algorithm, kl_coef: float = 0.0, **given: Tensor) -> Experience:
    return assess(batch, keys, max_answer_tokens=8, kl_coef=kl_coef, **given)[0]


def per_answer(advantage_BT: Tensor, batch: Batch) -> list[float]:
    """One number per row, after checking that its tokens agree and that the rest is 0."""
    assert bool((advantage_BT[~batch.mask_BT] == 0).all())
    for row, mask in zip(advantage_BT, batch.mask_BT):
        assert len(set(row[mask].tolist())) <= 1
    return [row[mask][0].item() for row, mask in zip(advantage_BT, batch.mask_BT)]


# KL


def test_each_kl_estimator_on_two_numbers():
    logp, ref = (
        torch.tensor([-1.0, -1.0], dtype=torch.float64),
        torch.tensor([-1.5, 0.0], dtype=torch.float64),
    )
    by_hand = {
        "k1": [0.5, -1.0],
        "k2": [0.125, 0.5],
        "k3": [math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1],
        "abs": [0.5, 1.0],
    }
    assert by_hand.keys() == KL_ESTIMATORS.keys()
    for name, expected in by_hand.items():
        assert kl_estimate(logp, ref, name).tolist() == pytest.approx(expected, rel=1e-12)


def two_distributions() -> tuple[Tensor, Tensor]:
    """Log-probabilities of a policy with gradient and of a reference, over five tokens."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1].log_softmax(0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_the_kl_divergence_in_expectation(estimator):
    logits, ref = two_distributions()
    logp = logits.log_softmax(0)
    exact = (logp.exp() * (logp - ref)).sum()
    assert (logp.exp() * kl_estimate(logp, ref, estimator)).sum().item() == pytest.approx(
        exact.item(), rel=1e-12
    )


def loss_gradient(estimator: str) -> Tensor:
    """Gradient of the estimator as a loss, in expectation over tokens that the policy sampled."""
    logits, ref = two_distributions()
    logp = logits.log_softmax(0)
    (logp.detach().exp() * kl_estimate(logp, ref, estimator)).sum().backward()
    return logits.grad


def test_as_a_loss_k2_follows_the_kl_k3_its_other_direction_and_k1_nothing():
    logits, ref = two_distributions()
    logp = logits.log_softmax(0)
    (kl,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    (other,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)
    torch.testing.assert_close(loss_gradient("k2"), kl)
    torch.testing.assert_close(loss_gradient("k3"), other)
    torch.testing.assert_close(loss_gradient("k1"), torch.zeros(5, dtype=torch.float64))
    assert kl.abs().max() > 0.1 and (kl - other).abs().max() > 0.1


def test_k1_is_refused_as_a_loss_and_allowed_in_the_reward():
    with pytest.raises(ValidationError, match="zero expected gradient"):
        Kl(coef=0.1, place="loss", estimator="k1")
    assert Kl(coef=0.1, place="reward", estimator="k1").coef == 0.1


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_the_other_estimators_are_never_negative_and_finite_at_any_gap(estimator):
    gaps = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([-1e4, 1e4])])
    kl = kl_estimate(gaps, torch.zeros_like(gaps), estimator)
    assert bool(kl.isfinite().all()) and bool((kl >= 0).all())


@pytest.mark.parametrize(
    ("kl", "answers", "coef"),
    [
        (12.0, 256, 0.1 * (1 + 0.2 * 256 / 10000)),
        (6.6, 256, 0.1 * (1 + 0.1 * 256 / 10000)),
        (5.4, 256, 0.1 * (1 - 0.1 * 256 / 10000)),
        (-3.0, 256, 0.1 * (1 - 0.2 * 256 / 10000)),
        (6.0, 256, 0.1),
        (0.0, 10**6, 0.1 * 0.8),
    ],
)
def test_the_adaptive_coefficient_moves_towards_its_target_by_at_most_a_fifth(kl, answers, coef):
    controller = KlController(0.1, target=6.0, horizon=10000)
    controller.observe(kl, answers)
    assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_a_coefficient_without_target_stays():
    controller = KlController(0.1, target=None, horizon=10)
    controller.observe(50.0, 1000)
    assert controller.coef == 0.1


# Baselines and advantages


def test_group_statistics_leave_out_failed_scores():
    batch = small_batch([[1.0, NAN, 3.0], [NAN, NAN], [5.0]])
    mean, std, count = group_baseline(batch.reward_B, batch.group_B)
    assert mean.tolist() == [2.0] * 3 + [0.0] * 2 + [5.0]
    assert std.tolist() == pytest.approx([math.sqrt(2)] * 3 + [0.0] * 3)
    assert count.tolist() == [2.0] * 3 + [0.0] * 2 + [1.0]


def test_group_advantages_by_hand():
    batch = small_batch([[0.0, 0.0, 1.0, 3.0], [2.0, 4.0, 2.0, 4.0]], [[1, 4, 2, 3], [3, 1, 5, 2]])
    plain = [-1.0, -1.0, 0.0, 2.0, -1.0, 1.0, -1.0, 1.0]
    assert per_answer(advantages(batch, algorithm(scale="none")), batch) == plain
    deviations = [math.sqrt(2)] * 4 + [math.sqrt(4 / 3)] * 4
    scaled = per_answer(advantages(batch, algorithm(scale="group_std")), batch)
    assert scaled == pytest.approx([a / s for a, s in zip(plain, deviations)], rel=1e-5)


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    rewards = [0.0, 0.5, 1.0, 3.0]
    batch = small_batch([rewards])
    keys = algorithm(advantage="leave_one_out", scale="none")
    expected = [r - fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    assert per_answer(advantages(batch, keys), batch) == pytest.approx(expected, rel=1e-6)
    scaled = per_answer(advantages(batch, algorithm(advantage="leave_one_out", scale="group_std")), batch)
    assert scaled == pytest.approx([a / stdev(rewards) for a in expected], rel=1e-5)


def test_batch_std_whitens_over_the_tokens_of_the_step():
    batch = small_batch([[0.0, 1.0], [0.0, 3.0]], [[1, 3], [2, 2]])
    advantage_BT = advantages(batch, algorithm(scale="batch_std"))
    tokens = [-0.5] + [0.5] * 3 + [-1.5] * 2 + [1.5] * 2
    expected = [(x - fmean(tokens)) / stdev(tokens) for x in tokens]
    assert advantage_BT[batch.mask_BT].tolist() == pytest.approx(expected, rel=1e-5)
    assert bool((advantage_BT[~batch.mask_BT] == 0).all())


def test_whitening_has_mean_0_and_deviation_1_and_leaves_equal_values_at_0():
    batch = random_batch(2)
    white = whiten(noise(batch, 3.0).double() + 5, batch.mask_BT)
    assert white[batch.mask_BT].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[batch.mask_BT].std().item() == pytest.approx(1, abs=1e-5)
    equal = torch.full(batch.mask_BT.shape, 0.1, dtype=torch.float64)
    assert bool((whiten(equal, batch.mask_BT) == 0).all())


def test_the_last_sampled_token_is_found_behind_gaps():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert last_token(mask).int().tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0] * 6]


def test_rewards_to_go_in_closed_form_with_gaps():
    """The answer's tokens are columns 1, 2 and 4; column 3 is a turn of somebody else."""
    mask = torch.tensor([[False, True, True, False, True]])
    reward = torch.tensor([[9.0, 1.0, 2.0, 9.0, 4.0]], dtype=torch.float64)
    half = rewards_to_go(reward, mask, 0.5)
    assert half[mask].tolist() == [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4.0]
    assert rewards_to_go(reward, mask, 1.0)[mask].tolist() == [7.0, 6.0, 4.0]


def test_discounted_advantages_put_the_score_at_the_last_token():
    batch = small_batch([[1.0, 3.0]], [[3, 1]])
    keys = algorithm(advantage="discounted", scale="none", discount=0.5)
    assert advantages(batch, keys)[batch.mask_BT].tolist() == [0.25, 0.5, 1.0, 3.0]
    keys = algorithm(advantage="discounted", scale="none", discount=0.5, group_baseline=True)
    assert advantages(batch, keys)[batch.mask_BT].tolist() == [-0.25, -0.5, -1.0, 1.0]


def test_a_policy_above_the_reference_has_its_reward_lowered():
    batch = small_batch([[1.0, 1.0]])
    ref_BT = batch.policy_logp_BT - 0.25 * batch.mask_BT * torch.tensor([[1.0], [0.0]])
    kl = {"coef": 0.1, "place": "reward", "estimator": "k1"}
    experience = assessed(batch, algorithm(scale="none", kl=kl), kl_coef=0.1, ref_logp_BT=ref_BT)
    # Three tokens of KL 0.25 cost the first answer 0.075; the group's mean falls by half of that.
    assert per_answer(experience.advantage_BT, batch) == pytest.approx([-0.0375, 0.0375], rel=1e-5)


def test_rewards_to_go_of_the_kl_come_only_from_the_tokens_ahead():
    batch = small_batch([[1.0]])
    ref_BT = batch.policy_logp_BT - torch.tensor([[0.0, 0.0, 0.1, 0.2, 0.4]])
    keys = algorithm(
        advantage="discounted", scale="none", kl={"coef": 0.5, "place": "reward", "estimator": "k1"}
    )
    experience = assessed(batch, keys, kl_coef=0.5, ref_logp_BT=ref_BT)
    assert experience.advantage_BT[batch.mask_BT].tolist() == pytest.approx([0.65, 0.7, 0.8], rel=1e-5)


def test_truncated_importance_weights_by_hand():
    batch = small_batch([[0.0, 1.0]], [[2, 1]])
    gap_BT = torch.zeros(batch.mask_BT.shape)
    gap_BT[batch.mask_BT] = torch.tensor([math.log(0.5), math.log(1.5), math.log(8.0)])
    ratio_BT, figures = importance_correction(batch.policy_logp_BT + gap_BT, batch, 2.0)
    assert ratio_BT[batch.mask_BT].tolist() == pytest.approx([0.5, 1.5, 2.0], rel=1e-6)
    assert figures["correction/mean"] == pytest.approx(4.0 / 3)
    assert figures["correction/capped_share"] == pytest.approx(1 / 3)
    assert bool((ratio_BT[~batch.mask_BT] == 1).all())
    experience = assessed(batch, algorithm(correction=2.0), old_logp_BT=batch.policy_logp_BT + gap_BT)
    assert experience.weight_BT[batch.mask_BT].tolist() == pytest.approx(
        [0.5 / 4, 1.5 / 4, 2.0 / 2], rel=1e-6
    )
    none = assessed(batch, algorithm(correction=None), old_logp_BT=batch.policy_logp_BT + gap_BT)
    assert none.weight_BT[batch.mask_BT].tolist() == pytest.approx([0.25, 0.25, 0.5])


def test_without_old_logp_the_correction_is_between_the_samplers_own_two_figures():
    """Top-p sampling draws a token from a renormalized distribution: its log-probability there is higher."""
    batch = small_batch([[0.0, 1.0]])
    cut = replace(batch, rollout_logp_BT=batch.policy_logp_BT + math.log(1.25) * batch.mask_BT)
    assert assessed(cut, algorithm()).correction_BT[cut.mask_BT].tolist() == pytest.approx([0.8] * 6)


# Laws over random batches

KINDS = [
    {"advantage": "group", "scale": "group_std"},
    {"advantage": "group", "scale": "none"},
    {"advantage": "group", "scale": "batch_std"},
    {"advantage": "leave_one_out", "scale": "none"},
    {"advantage": "leave_one_out", "scale": "group_std"},
    {"advantage": "discounted", "scale": "batch_std", "discount": 0.9},
    {"advantage": "discounted", "scale": "none", "group_baseline": True},
]


@pytest.mark.parametrize("keys", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("seed", range(5))
def test_permuting_rows_and_groups_permutes_advantages_and_weights(keys, seed):
    batch = random_batch(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, names = torch.randperm(16, generator=generator), torch.randperm(4, generator=generator)
    first, figures = assess(batch, algorithm(**keys), max_answer_tokens=8, kl_coef=0.0)
    second, others = assess(
        reordered(batch, rows, names), algorithm(**keys), max_answer_tokens=8, kl_coef=0.0
    )
    torch.testing.assert_close(second.advantage_BT, first.advantage_BT[rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second.weight_BT, first.weight_BT[rows])
    assert others == pytest.approx(figures, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("keys", [*KINDS[:5], KINDS[6]], ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("seed", range(5))
def test_a_constant_added_to_the_rewards_of_a_group_changes_no_advantage(keys, seed):
    batch = random_batch(seed)
    shifted = replace(batch, reward_B=batch.reward_B + torch.tensor([0.0, 5.0, -2.0, 100.0])[batch.group_B])
    before, after = advantages(batch, algorithm(**keys)), advantages(shifted, algorithm(**keys))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_group_advantages_sum_to_zero_and_rescaled_rewards_leave_scaled_ones_alone(seed):
    batch = random_batch(seed)
    plain = torch.tensor(per_answer(advantages(batch, algorithm(scale="none")), batch))
    for group in range(4):
        assert plain[batch.group_B == group].sum().item() == pytest.approx(0, abs=1e-6)
    bigger = replace(batch, reward_B=batch.reward_B * 10)
    before, after = (advantages(b, algorithm(scale="group_std")) for b in (batch, bigger))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


# Degenerate steps: always finite, and as documented


@pytest.mark.parametrize("keys", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("value", [0.1, 1.0, -3.3, 1e12])
def test_all_equal_rewards_teach_exactly_nothing(keys, value):
    batch = small_batch([[value] * 7, [value] * 3], [[1, 2, 3, 4, 5, 6, 7], [2, 2, 2]])
    if keys.get("discount", 1.0) < 1:
        keys = {**keys, "discount": 1.0}
    experience, figures = assess(batch, algorithm(**keys), max_answer_tokens=8, kl_coef=0.0)
    assert bool((experience.advantage_BT == 0).all())
    assert (figures["frac_zero_std"], figures["advantage/zero_share"]) == (1.0, 1.0)


def test_the_share_of_silent_groups_and_tokens():
    batch = small_batch([[1.0, 1.0], [0.0, 1.0], [NAN, 1.0], [0.0, 3.0]], [[4, 4], [1, 1], [3, 3], [2, 2]])
    _, figures = assess(batch, algorithm(), max_answer_tokens=8, kl_coef=0.0)
    assert figures["frac_zero_std"] == 0.5
    assert figures["advantage/zero_share"] == pytest.approx(14 / 20)


@pytest.mark.parametrize("keys", KINDS[:5], ids=lambda k: "-".join(map(str, k.values())))
def test_a_group_of_one_has_no_advantage(keys):
    batch = small_batch([[1.0], [3.0]])
    assert bool((advantages(batch, algorithm(**keys)) == 0).all())


def test_a_group_of_one_still_learns_from_rewards_to_go():
    batch = small_batch([[1.0], [3.0]], [[2], [2]])
    keys = algorithm(advantage="discounted", scale="batch_std")
    expected = 1 / stdev([1.0, 1.0, 3.0, 3.0])
    assert per_answer(advantages(batch, keys), batch) == pytest.approx([-expected, expected], rel=1e-5)


@pytest.mark.parametrize("keys", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_a_failed_score_is_as_if_the_answer_had_not_been_sampled(keys):
    with_failure = small_batch([[0.0, 1.0, NAN, 3.0], [1.0, 2.0]], [[2, 3, 8, 4], [1, 5]])
    rest = torch.tensor([0, 1, 3, 4, 5])
    without = small_batch([[0.0, 1.0, 3.0], [1.0, 2.0]], [[2, 3, 4], [1, 5]], padding=3)
    first, second = (assessed(b, algorithm(**keys)) for b in (with_failure, without))
    torch.testing.assert_close(first.advantage_BT[rest], second.advantage_BT)
    torch.testing.assert_close(first.weight_BT[rest], second.weight_BT)
    assert not first.mask_BT[2].any()
    assert bool((first.advantage_BT[2] == 0).all()) and bool((first.weight_BT[2] == 0).all())


@pytest.mark.parametrize("keys", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@pytest.mark.parametrize("case", ["all failed", "all truncated", "one group failed"])
def test_steps_without_signal_are_finite_and_trained_on_nothing(keys, case):
    rewards = {"all failed": [[NAN] * 3] * 2, "all truncated": [[0.0, 1.0, 2.0]] * 2}
    batch = small_batch(
        rewards.get(case, [[NAN] * 3, [0.0, 1.0, 2.0]]), truncated=range(6) if case == "all truncated" else ()
    )
    experience, figures = assess(
        batch, algorithm(**keys, drop_truncated=True), max_answer_tokens=8, kl_coef=0.0
    )
    assert all(math.isfinite(value) for value in figures.values())
    assert bool(experience.advantage_BT.isfinite().all()) and bool(experience.weight_BT.isfinite().all())
    silent = slice(0, 3) if case == "one group failed" else slice(0, 6)
    assert not experience.mask_BT[silent].any()
    assert bool((experience.weight_BT[silent] == 0).all()) and bool(
        (experience.advantage_BT[silent] == 0).all()
    )


def test_dropped_truncated_answers_leave_the_loss_but_not_the_baseline():
    batch = small_batch([[0.0, 1.0, 5.0]], truncated=[2])
    dropped = assessed(batch, algorithm(scale="none", drop_truncated=True))
    assert per_answer(dropped.advantage_BT, batch) == [-2.0, -1.0, 0.0]
    assert dropped.weight_BT.sum(-1).tolist() == pytest.approx([0.5, 0.5, 0.0])
    kept = assessed(batch, algorithm(scale="none"))
    assert per_answer(kept.advantage_BT, batch) == [-2.0, -1.0, 3.0]
    assert kept.weight_BT.sum(-1).tolist() == pytest.approx([1 / 3] * 3)


def test_huge_gaps_to_sampler_and_reference_stay_finite():
    batch = random_batch(0)
    for gap in (-1e4, 1e4):
        far_BT = batch.policy_logp_BT + gap * batch.mask_BT
        for place, estimator in (("loss", "k3"), ("reward", "k1"), ("reward", "k3")):
            keys = algorithm(kl={"coef": 0.1, "place": place, "estimator": estimator})
            experience = assessed(
                batch, keys, kl_coef=0.1, old_logp_BT=far_BT, ref_logp_BT=batch.policy_logp_BT
            )
            for tensor in (experience.advantage_BT, experience.weight_BT, experience.correction_BT):
                assert bool(tensor.isfinite().all())
            assert experience.correction_BT.max() <= 2.0
