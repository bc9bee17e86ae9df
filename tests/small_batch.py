"""Small batches made by hand or by seed, for the laws of the mathematics."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from tandem.config.sections import Algorithm
from tandem.types import Batch, pad

PROMPT = 2
"""Prompt tokens of every row."""


def small_batch(
    rewards: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]] | None = None,
    *,
    truncated: Sequence[int] = (),
    padding: int = 0,
    seed: int = 0,
) -> Batch:
    """One inner list per group; NaN is a failed score. The sampler's two log-probabilities agree."""
    flat = [reward for group in rewards for reward in group]
    spans = [n for group in lengths for n in group] if lengths else [3] * len(flat)
    generator = torch.Generator().manual_seed(seed)
    columns = PROMPT + max(spans) + padding
    mask_BT = pad(
        [[False] * PROMPT + [True] * n + [False] * (columns - PROMPT - n) for n in spans], torch.bool
    )
    # Drawn row by row, so that padding does not change what a token gets.
    draws = [torch.rand(n, generator=generator).tolist() for n in spans]
    logp = pad([[0.0] * PROMPT + [-0.2 - 2 * x for x in row] for row in draws], torch.float32)
    logp_BT = torch.nn.functional.pad(logp, (0, columns - logp.shape[1]))
    return Batch(
        tokens_BT=torch.ones(mask_BT.shape, dtype=torch.long),
        mask_BT=mask_BT,
        rollout_logp_BT=logp_BT,
        policy_logp_BT=logp_BT,
        reward_B=torch.tensor(flat, dtype=torch.float64),
        group_B=torch.tensor([i for i, group in enumerate(rewards) for _ in group]),
        length_B=torch.tensor([PROMPT + n for n in spans]),
        prompt_length_B=torch.full((len(spans),), PROMPT),
        truncated_B=torch.tensor([i in truncated for i in range(len(flat))]),
        version_B=torch.zeros(len(flat), dtype=torch.long),
    )


def random_batch(seed: int, groups: int = 4, answers: int = 4, padding: int = 0) -> Batch:
    """Rewards are drawn from a few values, so that ties occur; one answer in eight failed, one in eight is cut."""
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, answers)
    values = torch.tensor([-1.0, 0.0, 0.1, 1.0, 2.5], dtype=torch.float64)
    rewards = values[torch.randint(0, 5, shape, generator=generator)]
    rewards[torch.rand(shape, generator=generator) < 0.125] = torch.nan
    lengths = torch.randint(1, 9, shape, generator=generator)
    cut = (torch.rand(groups * answers, generator=generator) < 0.125).nonzero().squeeze(1)
    return small_batch(rewards.tolist(), lengths.tolist(), truncated=cut.tolist(), padding=padding, seed=seed)


def reordered(batch: Batch, rows: Tensor, names: Tensor) -> Batch:
    """The same answers in another order, and group g under the name `names[g]`."""
    taken = {f.name: getattr(batch, f.name)[rows] for f in fields(Batch)}
    return replace(batch, **{**taken, "group_B": names[batch.group_B][rows]})


def noise(batch: Batch, scale: float, seed: int = 1) -> Tensor:
    """[B, T] normal draws at the sampled tokens, the same whatever the padding."""
    generator = torch.Generator().manual_seed(seed)
    out_BT = torch.zeros(batch.mask_BT.shape)
    drawn = torch.randn(int(batch.mask_BT.sum()), generator=generator)
    out_BT[batch.mask_BT] = drawn * scale
    return out_BT


def algorithm(**keys: object) -> Algorithm:
    return Algorithm.model_validate({"kl": {"coef": 0.0}, **keys})
