"""The mathematics of a critic against loops over answers, and the laws it has to keep."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from small_batch import algorithm, noise, random_batch, small_batch
from tandem.algorithms import assess, last_token, weights
from tandem.config.sections import Algorithm
from tandem.types import Batch, Experience
from tandem.value import gae, prediction_figures, value_loss

LIMIT = 8
KEYS = {"advantage": "gae", "scale": "none", "weight": "token_mean"}


def assessed(batch: Batch, value_BT: Tensor, **keys: object) -> tuple[Experience, dict[str, float]]:
    return assess(batch, algorithm(**KEYS | keys), max_answer_tokens=LIMIT, kl_coef=0.0, value_BT=value_BT)


def by_hand(rewards: list[float], values: list[float], discount: float, decay: float) -> list[float]:
    """Equations 11 and 16 of arXiv 1506.02438, each advantage a sum of its own."""
    values = [*values, 0.0]
    deltas = [r + discount * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((discount * decay) ** (later - t) * deltas[later] for later in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def test_three_tokens_in_closed_form():
    reward_BT, value_BT = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.4, 0.5]])
    out_BT = gae(reward_BT, value_BT, torch.ones(1, 3, dtype=torch.bool), 0.9, 0.5)
    last = 1 - 0.5
    middle = 0.9 * 0.5 - 0.4 + 0.45 * last
    first = 0.9 * 0.4 - 0.2 + 0.45 * middle
    torch.testing.assert_close(out_BT, torch.tensor([[first, middle, last]]))


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.0), (0.7, 0.4)])
@pytest.mark.parametrize("holes", [False, True])
def test_advantages_are_those_of_a_loop_over_answers(discount, decay, holes):
    """Tokens between the sampled ones, somebody else's, are as if they were not there."""
    batch = random_batch(seed=4, padding=3)
    mask_BT = batch.mask_BT.clone()
    if holes:
        mask_BT[:, 4::3] = False
    reward_BT, value_BT = noise(batch, 1.0, seed=2).double(), noise(batch, 1.0, seed=3)
    reward_BT[~mask_BT] = 100.0
    out_BT = gae(reward_BT, value_BT, mask_BT, discount, decay)
    for row, span in enumerate(mask_BT):
        rewards, values = reward_BT[row, span].tolist(), value_BT[row, span].double().tolist()
        expected = torch.tensor(by_hand(rewards, values, discount, decay), dtype=torch.float64)
        torch.testing.assert_close(out_BT[row, span], expected)
        assert not out_BT[row, ~span].any()


@pytest.mark.parametrize("scale", ["none", "batch_std"])
def test_without_values_and_decay_it_is_reinforce_without_a_baseline(scale):
    batch = random_batch(seed=6)
    ours, _ = assessed(batch, torch.zeros(batch.mask_BT.shape), scale=scale)
    plain = algorithm(advantage="discounted", scale=scale, weight="token_mean")
    theirs, _ = assess(batch, plain, max_answer_tokens=LIMIT, kl_coef=0.0)
    assert torch.equal(ours.advantage_BT, theirs.advantage_BT) and ours.advantage_BT.any()
    assert torch.equal(ours.weight_BT, theirs.weight_BT)


@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
def test_a_critic_that_knows_the_reward_leaves_no_advantage(decay):
    batch = small_batch([[1.0, 0.0], [0.5, 2.0]], [[3, 1], [4, 2]])
    value_BT = (batch.reward_B[:, None] * batch.mask_BT).float()
    made, figures = assessed(batch, value_BT, gae_lambda=decay)
    assert made.advantage_BT.abs().max() < 1e-6
    torch.testing.assert_close(made.return_BT, value_BT)
    assert figures["critic/explained_variance"] == pytest.approx(1.0)


def test_a_cut_answer_is_judged_by_its_reward_and_nothing_beyond():
    whole = small_batch([[1.0, 0.0]])
    cut = small_batch([[1.0, 0.0]], truncated=[0, 1])
    value_BT = noise(whole, 0.5)
    assert torch.equal(assessed(whole, value_BT)[0].return_BT, assessed(cut, value_BT)[0].return_BT)


def test_returns_are_those_before_the_advantages_are_whitened():
    batch = random_batch(seed=8)
    value_BT = noise(batch, 0.5)
    plain, _ = assessed(batch, value_BT, gae_lambda=0.9)
    white, _ = assessed(batch, value_BT, gae_lambda=0.9, scale="batch_std")
    trained_BT = plain.mask_BT
    assert torch.equal(plain.return_BT, white.return_BT)
    torch.testing.assert_close(plain.return_BT, (plain.advantage_BT + value_BT) * trained_BT)
    assert white.advantage_BT[trained_BT].mean().abs() < 1e-6
    assert white.advantage_BT[trained_BT].std() == pytest.approx(1, abs=1e-4)


def test_a_failed_or_dropped_answer_is_in_no_return():
    batch = small_batch([[1.0, float("nan")], [0.0, 2.0]], truncated=[3])
    made, figures = assessed(batch, noise(batch, 0.5), drop_truncated=True)
    assert not made.mask_BT[[1, 3]].any() and not made.return_BT[[1, 3]].any()
    assert all(value == value for value in figures.values())
    nothing = replace(batch, reward_B=torch.full((4,), torch.nan, dtype=torch.float64))
    made, figures = assessed(nothing, noise(batch, 0.5))
    assert not made.return_BT.any() and figures["critic/explained_variance"] == 0


def test_the_kl_of_each_token_is_part_of_what_is_predicted():
    batch = small_batch([[1.0, 0.0]], [[3, 2]])
    keys = algorithm(**KEYS, kl={"coef": 0.5, "place": "reward", "estimator": "k1"})
    ref_BT = batch.policy_logp_BT - noise(batch, 0.3)
    zeros_BT = torch.zeros(batch.mask_BT.shape)
    made, _ = assess(batch, keys, max_answer_tokens=LIMIT, kl_coef=0.5, ref_logp_BT=ref_BT, value_BT=zeros_BT)
    kl_BT = (batch.policy_logp_BT - ref_BT) * batch.mask_BT
    first_BT = batch.mask_BT & (batch.mask_BT.cumsum(-1) == 1)
    expected_B = batch.reward_B.float() - 0.5 * kl_BT.sum(-1)
    torch.testing.assert_close(made.return_BT[first_BT], expected_B)


def experience(seed: int = 0) -> Experience:
    batch = random_batch(seed)
    return assessed(batch, noise(batch, 0.5))[0]


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_loss_is_that_of_a_loop_and_so_is_its_gradient(clip):
    part = experience()
    value_BT = (part.value_BT + noise(part, 0.4, seed=9)).double().requires_grad_()
    loss, sums = value_loss(value_BT, part, clip)
    loss.backward()
    mine = value_BT.detach().clone().requires_grad_()
    terms, bound = [], 0
    for row, column in part.mask_BT.nonzero().tolist():
        v, old, target = (x[row, column].double() for x in (mine, part.value_BT, part.return_BT))
        error = (v - target) ** 2
        if clip is not None:
            held = (old + torch.clip(v - old, -clip, clip) - target) ** 2
            bound += bool(held > error)
            error = torch.max(error, held)
        terms.append(0.5 * error)
    expected = sum(terms) / len(terms)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(value_BT.grad, mine.grad, rtol=1e-5, atol=1e-7)
    assert int(sums["clipped"]) == bound and (clip is None or 0 < bound < len(terms))


def test_where_the_clip_binds_there_is_no_gradient():
    part = assessed(small_batch([[1.0]], [[1]]), torch.zeros(1, 3))[0]
    last_BT = last_token(part.mask_BT)
    for value, clip, slope in ((0.5, 0.2, 0.0), (0.1, 0.2, -0.9), (0.5, None, -0.5), (-0.5, 0.2, -1.5)):
        value_BT = (last_BT * value).requires_grad_()
        value_loss(value_BT, part, clip)[0].backward()
        assert value_BT.grad[last_BT].item() == pytest.approx(slope), (value, clip)


def test_the_weight_is_the_algorithms():
    part = experience()
    for kind in ("sequence_mean", "token_mean", "sequence_sum", "constant"):
        weighed = replace(part, weight_BT=weights(part.mask_BT, kind, LIMIT))
        loss, _ = value_loss(part.value_BT, weighed, 0.2)
        expected = ((part.value_BT - part.return_BT).square() / 2 * weighed.weight_BT).sum()
        torch.testing.assert_close(loss, expected)


def test_explained_variance_of_a_constant_is_zero_and_of_equal_returns_too():
    ones_BT = torch.ones(2, 3, dtype=torch.bool)
    returns_BT = torch.arange(6.0).view(2, 3)
    constant = prediction_figures(torch.full((2, 3), 7.0), returns_BT, ones_BT)
    assert constant["critic/explained_variance"] == pytest.approx(0)
    assert constant["critic/values/mean"] == 7 and constant["critic/returns/max"] == 5
    assert prediction_figures(returns_BT, torch.ones(2, 3), ones_BT)["critic/explained_variance"] == 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"advantage": "gae"}, "knows no group_std"),
        ({"gae_lambda": 0.9}, "need advantage=gae"),
        ({"value_clip": None}, "need advantage=gae"),
        ({"discount": 0.9}, "needs advantage=discounted or gae"),
        ({"advantage": "gae", "scale": "none", "group_baseline": True}, "group_baseline needs"),
    ],
    ids=str,
)
def test_keys_that_would_change_nothing_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        Algorithm.model_validate(keys)
