"""The mathematics of a critic: advantages from predicted values, and the loss of the prediction. Needs torch only.

`value_BT`, as every `*_BT`, speaks about token t: it is the reward to come that is expected before token t is chosen,
read off the tokens before it.
"""

import torch
from torch import Tensor

from tandem.types import Experience


def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, discount: float, decay: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16), [B, T]:

    A_t = d_t + discount * decay * A_next with d_t = r_t + discount * V_next - V_t, where `next` is the next sampled
    token of the row. Nothing is expected behind the last one, nor behind one that the length limit cut off: the limit
    is part of the task, and the reward has judged what there is. 0 at tokens that were not sampled.
    """
    value_BT = value_BT.to(reward_BT.dtype)
    next_value_B = torch.zeros_like(reward_BT[:, 0])
    next_advantage_B = torch.zeros_like(next_value_B)
    out_BT = torch.zeros_like(reward_BT)
    for t in reversed(range(reward_BT.shape[1])):
        sampled_B = mask_BT[:, t]
        surprise_B = reward_BT[:, t] + discount * next_value_B - value_BT[:, t]
        advantage_B = surprise_B + discount * decay * next_advantage_B
        out_BT[:, t] = torch.where(sampled_B, advantage_B, 0.0)
        next_value_B = torch.where(sampled_B, value_BT[:, t], next_value_B)
        next_advantage_B = torch.where(sampled_B, advantage_B, next_advantage_B)
    return out_BT


def value_loss(
    value_BT: Tensor, experience: Experience, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some rows of an update, and its sums, named as those of `policy_loss`.

    max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 per token (PPO's published code; Huang et al.,
    "The 37 Implementation Details of Proximal Policy Optimization", 2022, detail 9); without a clip (V - R)^2 / 2.
    """
    mask_BT, old_BT, return_BT = experience.mask_BT, experience.value_BT, experience.return_BT
    assert old_BT is not None and return_BT is not None
    error_BT = (value_BT - return_BT).square()
    binds_BT = torch.zeros_like(mask_BT)
    if clip is not None:
        held_BT = (value_BT.clamp(old_BT - clip, old_BT + clip) - return_BT).square()
        binds_BT = held_BT > error_BT
        error_BT = torch.maximum(error_BT, held_BT)
    loss = (error_BT / 2 * experience.weight_BT).sum()
    sums = {"loss/total": loss, "tokens": mask_BT.sum(), "clipped": (binds_BT & mask_BT).sum()}
    return loss, {name: value.detach() for name, value in sums.items()}


def prediction_figures(value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """How the values predicted the returns, over the masked tokens; zeros where there are none.

    Explained variance is 1 - Var(R - V) / Var(R): 1 for a perfect prediction, 0 for none, and 0 where all returns are
    equal.
    """
    figures = {"critic/explained_variance": 0.0}
    value_M, return_M = value_BT[mask_BT].double(), return_BT[mask_BT].double()
    for name, figures_M in (("values", value_M), ("returns", return_M)):
        some_M = figures_M if len(figures_M) else torch.zeros(1)
        figures[f"critic/{name}/mean"] = float(some_M.mean())
        figures[f"critic/{name}/max"] = float(some_M.max())
        figures[f"critic/{name}/min"] = float(some_M.min())
    if len(return_M) > 1 and bool((return_M != return_M[0]).any()):
        figures["critic/explained_variance"] = float(1 - (return_M - value_M).var() / return_M.var())
    return figures
