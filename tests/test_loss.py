"""The loss: weights that do not depend on the cut, ratios, surrogates and their gradients."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from small_batch import algorithm, noise, random_batch, reordered, small_batch
from tandem.algorithms import assess, policy_loss, sequence_log_ratio, split, surrogate, weights
from tandem.config.sections import Algorithm, Clip
from tandem.types import Batch, Experience, take

LIMIT = 8
KINDS = ["sequence_mean", "token_mean", "sequence_sum", "constant"]


def experience_of(batch: Batch, keys: Algorithm, **given: Tensor) -> Experience:
    return assess(batch, keys, max_answer_tokens=LIMIT, kl_coef=keys.kl.coef, **given)[0]


def loss_and_gradient(
    experience: Experience, keys: Algorithm, logp_BT: Tensor, entropy_BT: Tensor | None = None
) -> tuple[float, Tensor]:
    leaf_BT = logp_BT.double().requires_grad_()
    entropy_BT = torch.zeros_like(logp_BT) if entropy_BT is None else entropy_BT
    loss, _ = policy_loss(leaf_BT, entropy_BT, experience, keys, keys.kl.coef)
    loss.backward()
    return loss.item(), leaf_BT.grad


# Weights

MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "long", "short"),
    [
        ("sequence_mean", 1 / 6, 1 / 2),
        ("token_mean", 1 / 4, 1 / 4),
        ("sequence_sum", 1 / 2, 1 / 2),
        ("constant", 1 / 16, 1 / 16),
    ],
)
def test_weights_by_hand(kind, long, short):
    expected = MASK * torch.tensor([[long], [short], [0.0]])
    torch.testing.assert_close(weights(MASK, kind, LIMIT), expected)


@pytest.mark.parametrize("seed", range(5))
def test_weights_sum_to_what_their_name_says(seed):
    mask = random_batch(seed).mask_BT
    rows, tokens = mask.any(-1).sum().item(), mask.sum().item()
    totals = {
        "sequence_mean": 1,
        "token_mean": 1,
        "sequence_sum": tokens / rows,
        "constant": tokens / rows / LIMIT,
    }
    for kind in KINDS:
        weight = weights(mask, kind, LIMIT)
        assert weight.sum().item() == pytest.approx(totals[kind], rel=1e-5)
        assert bool((weight[~mask] == 0).all())
    rowwise = weights(mask, "sequence_mean", LIMIT).sum(-1)
    torch.testing.assert_close(rowwise, torch.full_like(rowwise, 1 / rows))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_mask_has_zero_weights(kind):
    assert bool((weights(torch.zeros(3, 4, dtype=torch.bool), kind, LIMIT) == 0).all())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_do_not_depend_on_the_cut_into_micro_batches(kind, ratio, seed):
    batch = random_batch(seed)
    logp_BT, old_BT = batch.policy_logp_BT + noise(batch, 0.3), batch.policy_logp_BT
    keys = algorithm(weight=kind, ratio=ratio, kl={"coef": 0.1}, entropy=0.01)
    experience = experience_of(
        batch, keys, old_logp_BT=old_BT, ref_logp_BT=old_BT + noise(batch, 0.2, seed=9)
    )
    entropy_BT = noise(batch, 1.0, seed=5).abs()
    whole, gradient = loss_and_gradient(experience, keys, logp_BT, entropy_BT)
    assert gradient.abs().max() > 1e-3
    for cuts in (2, 8):
        total, pieces = 0.0, torch.zeros_like(gradient)
        for rows in torch.randperm(16, generator=torch.Generator().manual_seed(cuts)).chunk(cuts):
            piece = take(experience, rows)
            width = piece.mask_BT.shape[1]
            loss, part = loss_and_gradient(piece, keys, logp_BT[rows, :width], entropy_BT[rows, :width])
            total += loss
            pieces[rows, :width] = part
        assert total == pytest.approx(whole, rel=1e-6, abs=1e-9)
        torch.testing.assert_close(pieces, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_do_not_depend_on_padding_or_on_the_order_of_rows_and_groups(kind, seed):
    batch, padded = random_batch(seed), random_batch(seed, padding=5)
    keys = algorithm(weight=kind, scale="batch_std")
    width = batch.mask_BT.shape[1]
    moved_BT = batch.policy_logp_BT + noise(batch, 0.3)
    loss, gradient = loss_and_gradient(
        experience_of(batch, keys, old_logp_BT=batch.policy_logp_BT), keys, moved_BT
    )
    wide_BT = padded.policy_logp_BT + noise(padded, 0.3)
    wide = loss_and_gradient(experience_of(padded, keys, old_logp_BT=padded.policy_logp_BT), keys, wide_BT)
    assert wide[0] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(wide[1][:, :width], gradient)
    assert bool((wide[1][:, width:] == 0).all())
    generator = torch.Generator().manual_seed(seed)
    rows, names = torch.randperm(16, generator=generator), torch.randperm(4, generator=generator)
    other = reordered(batch, rows, names)
    shuffled = loss_and_gradient(
        experience_of(other, keys, old_logp_BT=other.policy_logp_BT), keys, moved_BT[rows]
    )
    assert shuffled[0] == pytest.approx(loss, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(shuffled[1], gradient[rows], rtol=1e-5, atol=1e-7)


# Updates of a step


@pytest.mark.parametrize("updates", [1, 2, 3, 4])
def test_a_split_holds_every_row_once_in_whole_groups_in_the_given_order(updates):
    batch = random_batch(7)
    numbered = replace(batch, version_B=torch.arange(16))
    keys = algorithm(weight="token_mean")
    experience = experience_of(numbered, keys)
    order = torch.tensor([2, 0, 3, 1])
    parts = split(experience, updates, keys, LIMIT, order)
    assert sorted(int(row) for part in parts for row in part.version_B) == list(range(16))
    groups = [part.group_B.unique().tolist() for part in parts]
    assert groups == [sorted(chunk.tolist()) for chunk in order.tensor_split(updates)]
    for part in parts:
        rows = part.version_B
        torch.testing.assert_close(part.advantage_BT, experience.advantage_BT[rows, : part.mask_BT.shape[1]])
        assert part.tokens_BT.shape[1] == int(part.length_B.max())


@pytest.mark.parametrize("kind", KINDS)
def test_each_update_of_a_split_has_weights_of_its_own(kind):
    batch = small_batch([[0.0, 1.0], [2.0, float("nan")], [0.0, 3.0]], [[1, 3], [4, 2], [5, 5]])
    keys = algorithm(weight=kind)
    sizes = [(2, 4), (1, 4), (2, 10)]
    for part, (rows, tokens) in zip(
        split(experience_of(batch, keys), 3, keys, LIMIT, torch.arange(3)), sizes, strict=True
    ):
        total = {"sequence_sum": tokens / rows, "constant": tokens / rows / LIMIT}.get(kind, 1.0)
        assert part.weight_BT.sum().item() == pytest.approx(total, rel=1e-6)


def test_a_split_keeps_the_importance_correction():
    batch = small_batch([[0.0, 1.0], [0.0, 1.0]])
    lower = replace(batch, rollout_logp_BT=batch.policy_logp_BT - math.log(1.5) * batch.mask_BT)
    for part in split(experience_of(lower, algorithm()), 2, algorithm(), LIMIT, torch.arange(2)):
        assert part.weight_BT.sum().item() == pytest.approx(1.5, rel=1e-5)


def test_fewer_groups_than_updates_give_fewer_updates_and_no_empty_one():
    batch = small_batch([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    parts = split(experience_of(batch, algorithm()), 4, algorithm(), LIMIT, torch.arange(3))
    assert [part.size for part in parts] == [2, 2, 2]


def test_groups_that_do_not_divide_are_as_many_updates_all_the_same():
    batch = small_batch([[0.0, 1.0]] * 5)
    parts = split(experience_of(batch, algorithm()), 4, algorithm(), LIMIT, torch.arange(5))
    assert [part.size for part in parts] == [4, 2, 2, 2]


# Ratios and surrogates


def surrogate_of(ratio: float, advantage: float, **keys: object) -> tuple[float, float, bool, bool]:
    """Loss and its derivative with respect to the log-probability (here -1), and where the clip binds."""
    logp = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    log_ratio = logp - (-1 - math.log(ratio))
    loss, low, high = surrogate(log_ratio, logp, torch.tensor([[advantage]]), Clip.model_validate(keys))
    loss.sum().backward()
    return loss.item(), logp.grad.item(), low.item(), high.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "low", "high"),
    [
        (1.1, 2.0, -2.2, -2.2, False, False),
        (1.5, 2.0, -2.4, 0.0, False, True),
        (0.5, 2.0, -1.0, -1.0, False, False),
        (1.5, -2.0, 3.0, 3.0, False, False),
        (0.5, -2.0, 1.6, 0.0, True, False),
        (0.9, -2.0, 1.8, 1.8, False, False),
    ],
)
def test_the_clipped_objective_is_the_pessimistic_one(ratio, advantage, loss, slope, low, high):
    got = surrogate_of(ratio, advantage, low=0.2, high=0.2)
    assert got == pytest.approx((loss, slope, low, high), rel=1e-6)


def test_clip_bounds_are_separate_and_can_be_left_open():
    assert surrogate_of(1.25, 1.0, low=0.2, high=0.28)[:2] == pytest.approx((-1.25, -1.25))
    assert surrogate_of(1.30, 1.0, low=0.2, high=0.28)[:2] == pytest.approx((-1.28, 0.0))
    for ratio, advantage in ((50.0, 1.0), (0.01, -1.0)):
        open_ended = surrogate_of(ratio, advantage, low=None, high=None)
        assert open_ended == pytest.approx((-advantage * ratio, -advantage * ratio, False, False))


def test_the_dual_clip_bounds_the_loss_of_bad_tokens_only():
    assert surrogate_of(2.5, -2.0, low=0.2, high=0.2, dual=3.0)[:2] == pytest.approx((5.0, 5.0))
    assert surrogate_of(7.0, -2.0, low=0.2, high=0.2, dual=3.0)[:2] == pytest.approx((6.0, 0.0))
    assert surrogate_of(7.0, -2.0, low=0.2, high=0.2)[:2] == pytest.approx((14.0, 14.0))
    assert surrogate_of(1.1, 2.0, low=0.2, high=0.2, dual=3.0)[:2] == pytest.approx((-2.2, -2.2))
    assert surrogate_of(7.0, 2.0, low=0.2, high=None, dual=3.0)[:2] == pytest.approx((-14.0, -14.0))


@pytest.mark.parametrize(("ratio", "weight"), [(7.0, 5.0), (3.0, 3.0), (0.01, 0.01)])
def test_a_clipped_weight_scales_the_gradient_and_never_stops_it(ratio, weight):
    for advantage in (2.0, -2.0):
        loss, slope, low, high = surrogate_of(ratio, advantage, kind="weight", low=None, high=4.0)
        assert (loss, slope) == pytest.approx((weight * advantage, -weight * advantage))
        assert (low, high) == (False, ratio > 5)


def test_the_sequence_ratio_is_the_geometric_mean_and_splits_its_gradient():
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    log_ratio = torch.tensor(
        [[9.0, 0.3, -0.6, 0.9], [9.0, 0.4, 9.0, 9.0]], dtype=torch.float64, requires_grad=True
    )
    level = sequence_log_ratio(log_ratio, mask)
    torch.testing.assert_close(level, mask * torch.tensor([[0.2], [0.4]], dtype=torch.float64))
    # Each token answers for itself, so that a weight of its own (an importance correction) stays its own.
    weight = torch.tensor([[7.0, 1.0, 2.0, 3.0], [7.0, 4.0, 7.0, 7.0]], dtype=torch.float64)
    (level * weight).sum().backward()
    torch.testing.assert_close(log_ratio.grad, mask * weight)


@pytest.mark.parametrize(
    "keys", [{}, {"ratio": "sequence"}, {"clip": {"kind": "weight", "low": None}}], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_without_old_logp_the_gradient_is_that_of_a_ratio_of_one(keys, seed):
    batch = random_batch(seed)
    settings = algorithm(**keys, correction=None)
    moved_BT = batch.policy_logp_BT + noise(batch, 0.2)
    implied = loss_and_gradient(experience_of(batch, settings), settings, moved_BT)
    given = experience_of(batch, settings, old_logp_BT=moved_BT)
    explicit = loss_and_gradient(given, settings, moved_BT.clone())
    assert implied[0] == pytest.approx(explicit[0], rel=1e-6)
    torch.testing.assert_close(implied[1], explicit[1])
    reinforce = -(given.advantage_BT * given.weight_BT).double()
    torch.testing.assert_close(implied[1], reinforce)


def test_entropy_is_a_bonus_and_its_metric_the_mean_over_tokens():
    batch = small_batch([[0.0, 1.0]], [[1, 3]])
    entropy_BT = torch.tensor([[0.0, 0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 4.0]])
    plain, bonus = algorithm(), algorithm(entropy=0.5)
    experience = experience_of(batch, plain)
    without, _ = loss_and_gradient(experience, plain, batch.policy_logp_BT, entropy_BT)
    with_bonus, _ = loss_and_gradient(experience, bonus, batch.policy_logp_BT, entropy_BT)
    # Means within the answers are 2 and 2, so their mean is 2; over the tokens it is 8/4.
    assert with_bonus - without == pytest.approx(-0.5 * 2.0, rel=1e-6)
    _, sums = policy_loss(batch.policy_logp_BT, entropy_BT, experience, bonus, 0.0)
    assert (sums["entropy"] / sums["tokens"]).item() == pytest.approx(2.0)


def test_the_sums_behind_the_metrics_by_hand():
    batch = small_batch([[0.0, 1.0]], [[2, 2]])
    keys = algorithm(scale="none", kl={"coef": 0.1, "estimator": "k2"})
    step_BT = torch.zeros(batch.mask_BT.shape)
    step_BT[batch.mask_BT] = torch.tensor([-0.5, 0.1, 0.5, 0.15])
    old_BT = batch.policy_logp_BT
    experience = experience_of(batch, keys, old_logp_BT=old_BT, ref_logp_BT=old_BT)
    _, sums = policy_loss(old_BT + step_BT, torch.zeros_like(old_BT), experience, keys, 0.1)
    kl = (0.25 + 0.01 + 0.25 + 0.0225) / 2
    # Advantages are -1/2 and 1/2; the first token is clipped at 0.8, the third at 1.2.
    pg = (0.5 * (0.8 + math.exp(0.1)) - 0.5 * (1.2 + math.exp(0.15))) / 4
    expected = {
        "loss/pg": pg,
        "loss/kl": kl / 4,
        "loss/total": pg + 0.1 * kl / 4,
        "kl": kl,
        "tokens": 4,
        "clip_low": 1,
        "clip_high": 1,
        "ppo_kl": -0.25,
        "max/ratio": math.exp(0.5),
        "gap": 1.25,
        "max/gap": 0.5,
        "ratio": sum(map(math.exp, (-0.5, 0.1, 0.5, 0.15))),
    }
    assert {name: sums[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)


# Degenerate updates


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["objective", "weight"])
@pytest.mark.parametrize("gap", [-1e4, -30.0, 30.0, 1e4])
def test_huge_log_ratios_give_finite_losses_and_gradients(gap, kind, ratio):
    batch = random_batch(0)
    keys = algorithm(clip={"kind": kind, "low": None, "high": None}, ratio=ratio, kl={"coef": 0.1})
    old_BT = batch.policy_logp_BT - gap * batch.mask_BT
    experience = experience_of(batch, keys, old_logp_BT=old_BT, ref_logp_BT=old_BT)
    loss, gradient = loss_and_gradient(experience, keys, batch.policy_logp_BT)
    assert math.isfinite(loss) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_with_nothing_to_train_has_loss_and_gradient_zero(kind):
    batch = small_batch([[0.0, 1.0], [2.0, 3.0]], truncated=range(4))
    keys = algorithm(weight=kind, drop_truncated=True, kl={"coef": 0.1}, entropy=0.1)
    experience = experience_of(batch, keys, ref_logp_BT=batch.policy_logp_BT - batch.mask_BT.float())
    loss, gradient = loss_and_gradient(
        experience, keys, batch.policy_logp_BT, torch.ones_like(batch.policy_logp_BT)
    )
    assert loss == 0.0 and bool((gradient == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_one_token_answers(kind, ratio):
    batch = small_batch([[0.0, 1.0]], [[1, 1]])
    keys = algorithm(weight=kind, ratio=ratio, scale="none")
    loss, gradient = loss_and_gradient(experience_of(batch, keys), keys, batch.policy_logp_BT)
    scale = {"constant": LIMIT}.get(kind, 1) * 2
    assert gradient[:, 2].tolist() == pytest.approx([0.5 / scale, -0.5 / scale])
    assert loss == pytest.approx(0, abs=1e-9)
