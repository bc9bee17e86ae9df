"""Sampler and trainer must mean the same by a log-probability, or every ratio is wrong. Checked at a run's start."""

import torch
from torch import Tensor

from tandem.errors import RunError
from tandem.learner import Actor
from tandem.types import Batch, take

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Largest allowed |sampler - trainer|, plus the same share of the log-probability itself. bfloat16 rounds in another
order in each forward, and its figure leaves room for that."""


def check_agreement(actor: Actor, batch: Batch) -> None:
    """Compare the sampler's log-probabilities with the trainer's on answers sampled by the present weights."""
    gap_BT = excess(actor.logprobs(batch), batch, actor)
    if not bool((gap_BT > 0).any()):
        return
    row, column = divmod(int(gap_BT.argmax()), gap_BT.shape[1])
    alone = take(batch, torch.tensor([row]))
    alone_logp_BT = actor.logprobs(alone)
    if bool((excess(alone_logp_BT, alone, actor) > 0).any()):
        cause = (
            "the trainer gives the same value when it computes that answer alone, so the engine's decoding differs: "
            "its cache, or its temperature"
        )
    else:
        cause = "computed alone the answer agrees, so the trainer's packed forward mixes rows"
    theirs, ours = batch.policy_logp_BT[row, column], alone_logp_BT[0, column]
    raise RunError(
        f"sampler and trainer disagree: log-probability of token {column} of answer {row} is {theirs:.6f} for the "
        f"sampler and {ours:.6f} for the trainer, {int((gap_BT > 0).sum())} tokens are off by more than "
        f"{TOLERANCE[actor.dtype]:g}. Cause: {cause}. Training would follow wrong ratios"
    )


def excess(logp_BT: Tensor, batch: Batch, actor: Actor) -> Tensor:
    """How far each sampled token's difference is above the tolerance; not positive where the two agree."""
    tolerance = TOLERANCE[actor.dtype]
    allowed_BT = tolerance * (1 + logp_BT.abs())
    difference_BT = (logp_BT - batch.policy_logp_BT).abs().nan_to_num(nan=torch.inf)
    return torch.where(batch.mask_BT, difference_BT - allowed_BT, -1.0)
