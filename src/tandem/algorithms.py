"""The mathematics: advantages, weights, surrogates, KL. Needs torch only.

An algorithm is five choices (advantage, ratio, clip, weight, KL) in the `Algorithm` section; the presets of
`recipes/algorithms` name them. B sequences, T tokens; column t of a `*_BT` tensor speaks about token t.

Aggregation is a tensor: every loss is `(loss_BT * weight_BT).sum()`, with `weight_BT` made once per update from the
whole update's mask, so that the result does not depend on how the update is cut into micro-batches or ranks.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from tandem.config.sections import Algorithm, Clip
from tandem.types import Batch, Experience, take
from tandem.value import gae, prediction_figures

EPS = 1e-6
"""Added to every standard deviation that divides."""
MAX_LOG_RATIO = 20.0
"""Log-ratios are held within this, so that no exponential overflows."""


# KL estimators, after Schulman, "Approximating KL divergence" (2020); each is per token, in nats.


def kl_estimate(logp_BT: Tensor, ref_logp_BT: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) from the log-probabilities of sampled tokens. k1 can be negative, the others not."""
    return KL_ESTIMATORS[estimator](logp_BT - ref_logp_BT)


def _k3(difference: Tensor) -> Tensor:
    back = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return back.exp() - 1 - back


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda difference: difference,
    "k2": lambda difference: difference.square() / 2,
    "k3": _k3,
    "abs": torch.abs,
}


class KlController:
    """The coefficient of the KL term: fixed, or steered to a target (Ziegler et al., arXiv 1909.08593, 2.2)."""

    def __init__(self, coef: float, target: float | None, horizon: int) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def observe(self, kl: float, answers: int) -> None:
        """Move the coefficient after a step whose mean KL per token was `kl`."""
        if self.target is not None:
            error = max(-0.2, min(0.2, kl / self.target - 1))
            # A step of more answers than the horizon counts as one horizon, or the factor could turn negative.
            self.coef *= 1 + error * min(1.0, answers / self.horizon)


# Advantages. Arithmetic is in float64; rows whose scoring failed hold NaN rewards and stay out of every mean.


def group_baseline(reward_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased standard deviation and number of the valid rewards of each row's group, all [B].

    The deviation is 0 for groups with fewer than two valid rewards and exactly 0 where all are equal.
    """
    valid_B = ~reward_B.isnan()
    groups = int(group_B.max()) + 1
    known_B = reward_B.nan_to_num(0.0)

    def total(values_B: Tensor) -> Tensor:
        return values_B.new_zeros(groups).index_add(0, group_B, values_B)[group_B]

    count_B = total(valid_B.to(reward_B.dtype))
    mean_B = total(known_B) / count_B.clamp(min=1)
    square_B = total((known_B - mean_B).square() * valid_B)
    std_B = (square_B / (count_B - 1).clamp(min=1)).sqrt()
    low = reward_B.new_full((groups,), torch.inf)
    high = reward_B.new_full((groups,), -torch.inf)
    low_B = low.scatter_reduce(0, group_B[valid_B], reward_B[valid_B], "amin")[group_B]
    high_B = high.scatter_reduce(0, group_B[valid_B], reward_B[valid_B], "amax")[group_B]
    equal_B = low_B >= high_B
    return (
        torch.where(equal_B, low_B.nan_to_num(posinf=0.0), mean_B),
        std_B.masked_fill(equal_B, 0.0),
        count_B,
    )


def _group(token_reward_BT: Tensor, value_BT: Tensor | None, batch: Batch, algorithm: Algorithm) -> Tensor:
    """Reward minus the group's mean (GRPO, arXiv 2402.03300)."""
    reward_B = token_reward_BT.sum(-1)
    mean_B, std_B, _ = group_baseline(reward_B, batch.group_B)
    advantage_B = reward_B - mean_B
    if algorithm.scale == "group_std":
        advantage_B = advantage_B / (std_B + EPS)
    return advantage_B[:, None].expand_as(token_reward_BT)


def _leave_one_out(
    token_reward_BT: Tensor, value_BT: Tensor | None, batch: Batch, algorithm: Algorithm
) -> Tensor:
    """Reward minus the mean of the group's other rewards (RLOO, arXiv 2402.14740): (R - mean) G / (G - 1)."""
    reward_B = token_reward_BT.sum(-1)
    mean_B, std_B, count_B = group_baseline(reward_B, batch.group_B)
    advantage_B = (reward_B - mean_B) * count_B / (count_B - 1).clamp(min=1)
    if algorithm.scale == "group_std":
        advantage_B = advantage_B / (std_B + EPS)
    return advantage_B[:, None].expand_as(token_reward_BT)


def _discounted(
    token_reward_BT: Tensor, value_BT: Tensor | None, batch: Batch, algorithm: Algorithm
) -> Tensor:
    """Rewards to go (REINFORCE++, arXiv 2501.03262), optionally after subtracting the group's mean reward."""
    reward_BT = token_reward_BT
    if algorithm.group_baseline:
        mean_B, _, _ = group_baseline(token_reward_BT.sum(-1), batch.group_B)
        reward_BT = reward_BT - mean_B[:, None] * last_token(batch.mask_BT)
    return rewards_to_go(reward_BT, batch.mask_BT, algorithm.discount)


def _gae(token_reward_BT: Tensor, value_BT: Tensor | None, batch: Batch, algorithm: Algorithm) -> Tensor:
    """Rewards to go against a critic's values (PPO, arXiv 1707.06347, eq. 11)."""
    assert value_BT is not None
    return gae(token_reward_BT, value_BT, batch.mask_BT, algorithm.discount, algorithm.gae_lambda)


ADVANTAGES: dict[str, Callable[[Tensor, Tensor | None, Batch, Algorithm], Tensor]] = {
    "group": _group,
    "leave_one_out": _leave_one_out,
    "discounted": _discounted,
    "gae": _gae,
}


def rewards_to_go(reward_BT: Tensor, mask_BT: Tensor, discount: float) -> Tensor:
    """G_t = r_t + discount * G_(next sampled token); tokens that were not sampled pass G on undiscounted."""
    going_B = torch.zeros_like(reward_BT[:, 0])
    out_BT = torch.zeros_like(reward_BT)
    for t in reversed(range(reward_BT.shape[1])):
        going_B = torch.where(mask_BT[:, t], reward_BT[:, t] + discount * going_B, going_B)
        out_BT[:, t] = going_B
    return out_BT


def last_token(mask_BT: Tensor) -> Tensor:
    """True at the last sampled token of each row that has one."""
    count_BT = mask_BT.flip(-1).cumsum(-1).flip(-1)
    return mask_BT & (count_BT == 1)


def whiten(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean 0 and unbiased deviation 1 over the masked entries; 0 elsewhere, and everywhere if all are equal."""
    values_M = values_BT[mask_BT]
    if len(values_M) < 2 or bool((values_M == values_M[0]).all()):
        return torch.zeros_like(values_BT)
    return ((values_BT - values_M.mean()) / (values_M.std() + EPS)) * mask_BT


# Weights: how token losses add up to one number.


def weights(mask_BT: Tensor, kind: str, max_answer_tokens: int) -> Tensor:
    """`weight_BT` for one update whose trained tokens are `mask_BT`; rows without any do not count. Sums to 1 for
    the two means. An empty mask gives zeros."""
    mask_BT = mask_BT.double()
    length_B1 = mask_BT.sum(-1, keepdim=True)
    rows = (length_B1 > 0).sum().clamp(min=1)
    return (mask_BT * WEIGHTS[kind](length_B1, rows, max_answer_tokens)).float()


WEIGHTS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "sequence_mean": lambda length_B1, rows, limit: 1 / (length_B1.clamp(min=1) * rows),
    "token_mean": lambda length_B1, rows, limit: 1 / length_B1.sum().clamp(min=1),
    "sequence_sum": lambda length_B1, rows, limit: 1 / rows,
    "constant": lambda length_B1, rows, limit: 1 / (rows * limit),
}


# From a batch to experience, and from experience to a loss.


def assess(
    batch: Batch,
    algorithm: Algorithm,
    max_answer_tokens: int,
    kl_coef: float,
    *,
    old_logp_BT: Tensor | None = None,
    ref_logp_BT: Tensor | None = None,
    value_BT: Tensor | None = None,
) -> tuple[Experience, dict[str, float]]:
    """Advantages, returns and weights of a step. `old_logp_BT` None says the policy is still the sampler's; only
    advantage=gae has a `value_BT`."""
    mask_BT = batch.mask_BT
    policy_logp_BT = batch.policy_logp_BT if old_logp_BT is None else old_logp_BT
    kl_BT = torch.zeros_like(policy_logp_BT)
    if ref_logp_BT is not None:
        kl_BT = kl_estimate(policy_logp_BT, ref_logp_BT, algorithm.kl.estimator) * mask_BT
    token_reward_BT = batch.reward_B[:, None] * last_token(mask_BT)
    if algorithm.kl.place == "reward":
        token_reward_BT = token_reward_BT - kl_coef * kl_BT.double()
    trained_B = ~batch.reward_B.isnan()
    if algorithm.drop_truncated:
        trained_B &= ~batch.truncated_B
    trained_BT = mask_BT & trained_B[:, None]
    advantage_BT = ADVANTAGES[algorithm.advantage](token_reward_BT, value_BT, batch, algorithm)
    advantage_BT = advantage_BT.masked_fill(~trained_BT, 0.0)
    return_BT = None if value_BT is None else advantage_BT.float() + value_BT * trained_BT
    if algorithm.scale == "batch_std":
        advantage_BT = whiten(advantage_BT, trained_BT)
    correction_BT, correction = importance_correction(policy_logp_BT, batch, algorithm.correction)
    inherited = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    experience = Experience(
        **{**inherited, "mask_BT": trained_BT},
        advantage_BT=advantage_BT.float(),
        correction_BT=correction_BT,
        weight_BT=weights(trained_BT, algorithm.weight, max_answer_tokens) * correction_BT,
        old_logp_BT=old_logp_BT,
        ref_logp_BT=ref_logp_BT,
        value_BT=value_BT,
        return_BT=return_BT,
    )
    predicted = {} if value_BT is None else prediction_figures(value_BT, return_BT, trained_BT)
    return experience, {
        "kl/reference": masked_mean(kl_BT, mask_BT),
        "kl/coef": kl_coef,
        **correction,
        **predicted,
        **_spread(experience, batch),
    }


def importance_correction(
    policy_logp_BT: Tensor, batch: Batch, cap: float | None
) -> tuple[Tensor, dict[str, float]]:
    """min(policy / distribution sampled from, cap) per token: truncated importance sampling (Yao et al., "Your
    efficient RL framework secretly brings you off-policy training", 2025)."""
    if cap is None:
        return torch.ones_like(policy_logp_BT), {}
    ratio_BT = torch.where(batch.mask_BT, (policy_logp_BT - batch.rollout_logp_BT).exp(), 1.0)
    return ratio_BT.clamp(max=cap), {
        "correction/mean": masked_mean(ratio_BT.clamp(max=cap), batch.mask_BT),
        "correction/capped_share": masked_mean((ratio_BT > cap).float(), batch.mask_BT),
    }


def split(
    experience: Experience, updates: int, algorithm: Algorithm, max_answer_tokens: int, order_G: Tensor
) -> list[Experience]:
    """Cut a step into updates of whole groups, taken in the given order; each gets weights of its own."""
    parts = []
    for groups in order_G.tensor_split(min(updates, len(order_G))):
        rows = torch.isin(experience.group_B, groups).nonzero().squeeze(1)
        part = take(experience, rows)
        fresh_BT = weights(part.mask_BT, algorithm.weight, max_answer_tokens)
        parts.append(replace(part, weight_BT=fresh_BT * part.correction_BT))
    return parts


def policy_loss(
    logp_BT: Tensor, entropy_BT: Tensor, experience: Experience, algorithm: Algorithm, kl_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some rows of an update, and the sums its metrics are made of: those named `loss/*` add up to the
    update's losses, `max/*` are maxima, the others are sums over `tokens` trained tokens."""
    mask_BT, weight_BT = experience.mask_BT, experience.weight_BT
    old_logp_BT = logp_BT.detach() if experience.old_logp_BT is None else experience.old_logp_BT
    log_ratio_BT = (logp_BT - old_logp_BT) * mask_BT
    if algorithm.ratio == "sequence":
        log_ratio_BT = sequence_log_ratio(log_ratio_BT, mask_BT)
    log_ratio_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    pg_BT, low_BT, high_BT = surrogate(log_ratio_BT, logp_BT, experience.advantage_BT, algorithm.clip)
    pg_loss = (pg_BT * weight_BT).sum()
    loss = pg_loss
    sums = {"loss/pg": pg_loss}
    if experience.ref_logp_BT is not None:
        kl_BT = kl_estimate(logp_BT, experience.ref_logp_BT, algorithm.kl.estimator) * mask_BT
        sums["kl"] = kl_BT.sum()
        if algorithm.kl.place == "loss":
            sums["loss/kl"] = (kl_BT * weight_BT).sum()
            loss = loss + kl_coef * sums["loss/kl"]
    if algorithm.entropy:
        loss = loss - algorithm.entropy * (entropy_BT * weight_BT).sum()
    gap_BT = (logp_BT - experience.policy_logp_BT).abs() * mask_BT
    sums |= {
        "loss/total": loss,
        "tokens": mask_BT.sum(),
        "entropy": (entropy_BT * mask_BT).sum(),
        "clip_low": (low_BT & mask_BT).sum(),
        "clip_high": (high_BT & mask_BT).sum(),
        "ppo_kl": -(log_ratio_BT * mask_BT).sum(),
        "ratio": (log_ratio_BT.exp() * mask_BT).sum(),
        "gap": gap_BT.sum(),
        "gap_tokens": mask_BT.sum(),
        "max/ratio": (log_ratio_BT.exp() * mask_BT).amax(),
        "max/gap": gap_BT.amax(),
    }
    return loss, {name: value.detach() for name, value in sums.items()}


def add(totals: dict[str, float], sums: dict[str, float]) -> None:
    """Gather the sums of `policy_loss`: those named `max/*` by their maximum."""
    for name, value in sums.items():
        old = totals.get(name, 0.0)
        totals[name] = max(old, value) if name.startswith("max/") else old + value


def means(totals: dict[str, float], updates: int) -> dict[str, float]:
    """Metrics from the sums of `policy_loss`: losses per update, the rest per trained token, where there was one."""
    tokens = totals.get("tokens", 0.0)
    losses = {
        f"actor/{name}": totals.get(f"loss/{short}", 0.0) / max(1, updates)
        for name, short in (("pg_loss", "pg"), ("kl_loss", "kl"), ("loss", "total"))
    }
    if not tokens:
        return losses

    def mean(name: str, over: float = tokens) -> float:
        return totals.get(name, 0.0) / over

    return losses | {
        "actor/entropy": mean("entropy"),
        "actor/pg_clipfrac": mean("clip_low") + mean("clip_high"),
        "actor/pg_clipfrac_low": mean("clip_low"),
        "actor/pg_clipfrac_high": mean("clip_high"),
        "actor/ppo_kl": mean("ppo_kl"),
        "actor/ratio_mean": mean("ratio"),
        "actor/ratio_max": totals.get("max/ratio", 1.0),
        "rollout/logp_gap_mean": mean("gap", max(1.0, totals.get("gap_tokens", 0.0))),
        "rollout/logp_gap_max": totals.get("max/gap", 0.0),
    }


def sequence_log_ratio(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean log-ratio of the answer at each of its tokens, with the gradient of that token's own log-probability
    (GSPO-token, arXiv 2507.18071, eq. 13-14): summed with sequence-mean weights it is GSPO's gradient."""
    length_B1 = mask_BT.sum(-1, keepdim=True).clamp(min=1)
    mean_B1 = (log_ratio_BT * mask_BT).sum(-1, keepdim=True) / length_B1
    return (mean_B1.detach() + log_ratio_BT - log_ratio_BT.detach()) * mask_BT


def surrogate(
    log_ratio_BT: Tensor, logp_BT: Tensor, advantage_BT: Tensor, clip: Clip
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per token, and where the clip binds below and above.

    `objective`: max(-A r, -A clip(r, 1-low, 1+high)) (PPO, arXiv 1707.06347, eq. 7), for A < 0 at most -A dual
    (Ye et al., arXiv 1912.09729). `weight`: -sg(clip(r)) A logp (CISPO, arXiv 2506.13585, eq. 4).
    """
    ratio_BT = log_ratio_BT.exp()
    low = 0.0 if clip.low is None else 1 - clip.low
    high = torch.inf if clip.high is None else 1 + clip.high
    clipped_BT = ratio_BT.clamp(low, high)
    if clip.kind == "weight":
        return -clipped_BT.detach() * advantage_BT * logp_BT, ratio_BT < low, ratio_BT > high
    loss_BT = torch.maximum(-advantage_BT * ratio_BT, -advantage_BT * clipped_BT)
    if clip.dual is not None:
        loss_BT = torch.where(advantage_BT < 0, torch.minimum(loss_BT, -advantage_BT * clip.dual), loss_BT)
    return loss_BT, (ratio_BT < low) & (advantage_BT < 0), (ratio_BT > high) & (advantage_BT > 0)


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> float:
    """Mean over the mask; 0 where it is empty."""
    return float((values_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1))


def _spread(experience: Experience, batch: Batch) -> dict[str, float]:
    trained_M = experience.advantage_BT[experience.mask_BT].double()
    _, std_B, _ = group_baseline(batch.reward_B, batch.group_B)
    std_G = std_B.new_zeros(int(batch.group_B.max()) + 1).scatter(0, batch.group_B, std_B)
    return {
        "advantage/mean": float(trained_M.mean()) if len(trained_M) else 0.0,
        "advantage/std": float(trained_M.std()) if len(trained_M) > 1 else 0.0,
        "advantage/zero_share": masked_mean((experience.advantage_BT == 0).double(), batch.mask_BT),
        "frac_zero_std": float((std_G == 0).double().mean()),
    }
