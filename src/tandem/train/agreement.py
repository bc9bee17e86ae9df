"""Sampler and trainer must mean the same by a log-probability, or every ratio is wrong. Checked at a run's start."""

import torch
from torch import Tensor

from tandem.config.run import Run
from tandem.errors import RunError
from tandem.learner import Actor
from tandem.model.load import DTYPES
from tandem.types import Batch, take

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Largest allowed |sampler - trainer| in the less precise of their types, plus the same share of the log-probability
itself. bfloat16 rounds in another order in each forward, and its figure leaves room for that."""


def check_agreement(actor: Actor, batch: Batch) -> None:
    """Compare the sampler's log-probabilities with the trainer's on answers sampled by the present weights."""
    tolerance = max(TOLERANCE[actor.dtype], TOLERANCE[DTYPES[actor.run.engine_dtype]])
    gap_BT = excess(actor.logprobs(batch), batch, tolerance)
    if not bool((gap_BT > 0).any()):
        return
    row, column = divmod(int(gap_BT.argmax()), gap_BT.shape[1])
    alone = take(batch, torch.tensor([row]))
    alone_logp_BT = actor.logprobs(alone)
    wrong_T = excess(alone_logp_BT, alone, tolerance)[0] > 0
    if bool(wrong_T.any()):
        cause = (
            f"the trainer says the same of that answer alone, so it is {engines(actor.run, alone, wrong_T)}"
        )
    else:
        cause = "computed alone the answer agrees, so the trainer's packed forward mixes rows"
    theirs, ours = batch.policy_logp_BT[row, column], alone_logp_BT[0, column]
    raise RunError(
        f"sampler and trainer disagree: log-probability of token {column} of answer {row} is {theirs:.6f} for the "
        f"sampler and {ours:.6f} for the trainer, {int((gap_BT > 0).sum())} tokens are off by more than "
        f"{tolerance:g}. Cause: {cause}. Training would follow wrong ratios"
    )


def engines(run: Run, answer: Batch, wrong_T: Tensor) -> str:
    """What the engine did otherwise; `wrong_T` says at which tokens of one answer it shows."""
    sampling, sampled_T = run.sampling, answer.mask_BT[0]
    own_T = answer.policy_logp_BT[0] == answer.rollout_logp_BT[0]
    if (sampling.top_k or sampling.top_p < 1 or sampling.min_p) and bool(own_T[sampled_T].all()):
        return (
            "truncation: the engine says log-probabilities of the distribution that sampling.top_k, top_p and min_p "
            "leave, where those of the policy are due"
        )
    if bool(wrong_T[sampled_T][0]):
        return (
            "the engine from the first token on: it saw another prompt (a template, or a truncation, between the "
            f"tokenizer and it), or its temperature is not sampling.temperature={sampling.temperature:g}"
        )
    if run.engine_dtype != run.model.dtype:
        return f"the dtype: engine.dtype={run.engine.dtype} and model.dtype={run.model.dtype}, or the engine's cache"
    return "the engine's decoding: the first token is right, so its cache is not"


def excess(logp_BT: Tensor, batch: Batch, tolerance: float) -> Tensor:
    """How far each sampled token's difference is above the tolerance; not positive where the two agree."""
    allowed_BT = tolerance * (1 + logp_BT.abs())
    difference_BT = (logp_BT - batch.policy_logp_BT).abs().nan_to_num(nan=torch.inf)
    return torch.where(batch.mask_BT, difference_BT - allowed_BT, -1.0)
