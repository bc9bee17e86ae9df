"""Proof by log-probabilities: an engine with a copy of the weights must say what the trainer says of a fixed text.

Checksums prove that the bytes arrived, a probe that the engine computes with them.
"""

from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor

from tandem.engine.random import key
from tandem.engine.weights import dtype_name
from tandem.errors import RunError
from tandem.model import LanguageModel
from tandem.model.logprobs import token_logprobs
from tandem.types import Batch, to_device

LENGTH = 32
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest allowed |engine - trainer| in the less precise of their types, plus the same share of the value."""

ROUNDING = 4.0
"""A difference of so many times the allowed one may still come from types; a larger one does not."""


class Scores(Protocol):
    """An engine that says the log-probabilities of given tokens."""

    version: int

    def score(self, sequences: list[tuple[int, ...]]) -> list[tuple[float, ...]]: ...


def probe_tokens(vocab_size: int, max_positions: int) -> tuple[int, ...]:
    """A fixed row of tokens from all over the vocabulary."""
    return tuple(key(i) % vocab_size for i in range(min(LENGTH, max_positions)))


@torch.no_grad()
def policy_logp(model: LanguageModel, tokens: tuple[int, ...]) -> list[float]:
    """Log-probability of each token but the first, at temperature 1. Of a model on many processes all compute it
    together, and each has it."""
    logp_T = torch.zeros(len(tokens))

    def keep(_: Tensor, row: Batch) -> None:
        logp_BT, _ = token_logprobs(
            model,
            row.tokens_BT,
            row.mask_BT,
            row.length_B,
            prompt_length_B=row.prompt_length_B,
            group_B=row.group_B,
            temperature=1.0,
            logits_bytes=4 * model.vocab_size * LENGTH,
        )
        # Those that share out sequences all have this one.
        if model.mesh.data_rank == 0:
            logp_T.copy_(logp_BT[0])

    model.forward_each([(torch.tensor([0]), to_device(row_of(tokens), model.device))], keep)
    return model.mesh.sum(logp_T)[1:].tolist()


def row_of(tokens: tuple[int, ...]) -> Batch:
    """The tokens as the answer to the first of them."""
    tokens_BT = torch.tensor([tokens])
    zero_BT, zero_B = torch.zeros(tokens_BT.shape), torch.zeros(1, dtype=torch.long)
    return Batch(
        tokens_BT=tokens_BT,
        mask_BT=torch.arange(len(tokens))[None] > 0,
        rollout_logp_BT=zero_BT,
        policy_logp_BT=zero_BT,
        reward_B=torch.zeros(1),
        group_B=zero_B,
        length_B=torch.tensor([len(tokens)]),
        prompt_length_B=torch.ones(1, dtype=torch.long),
        truncated_B=torch.zeros(1, dtype=torch.bool),
        version_B=zero_B,
    )


def check_probe(engine: Scores, model: LanguageModel, version: int, dtype: torch.dtype) -> float:
    """Compare an engine that serves `version` in `dtype` with the trainer's `model`; returns the largest difference.

    Raises a `RunError` that names the cause where they disagree.
    """
    if engine.version != version:
        raise RunError(
            f"the engine serves version {engine.version} of the weights and the trainer is at {version}: "
            "the last transfer did not reach it"
        )
    tokens = probe_tokens(model.vocab_size, model.max_positions)
    (theirs,) = engine.score([tokens])
    model.module.eval()
    ours = policy_logp(model, tokens)
    allowed = max(TOLERANCE[dtype], TOLERANCE[model.network.dtype])
    excess = [abs(a - b) / (allowed * (1 + abs(b))) for a, b in zip(theirs, ours, strict=True)]
    if max(excess) <= 1:
        return largest(theirs, ours)
    place = excess.index(max(excess))
    raise RunError(
        f"engine and trainer disagree on weights of version {version}: log-probability of token {place + 1} of the "
        f"probe is {theirs[place]:.6f} for the engine and {ours[place]:.6f} for the trainer (allowed {allowed:g}). "
        f"Cause: {_cause(theirs, model, tokens, dtype, max(excess))}. Training would follow wrong ratios"
    )


def _cause(
    theirs: tuple[float, ...],
    model: LanguageModel,
    tokens: tuple[int, ...],
    dtype: torch.dtype,
    excess: float,
) -> str:
    """What the differences look like; `excess` is the largest in units of what is allowed."""
    if isinstance(model.module, PeftModel):
        with model.base():
            without = largest(theirs, policy_logp(model, tokens))
        if without < largest(theirs, policy_logp(model, tokens)) / 2:
            return "the adapter: the engine answers as the base model does, so it has not applied it"
    if dtype != model.network.dtype and excess < ROUNDING:
        return (
            f"the dtype: {dtype_name(dtype)} in the engine, {dtype_name(model.network.dtype)} in the trainer"
        )
    return (
        "the weights: they arrived and the engine computes with others (an output head that it keeps apart from the "
        "embeddings, a layer that it did not reload), or it is another model than model.path"
    )


def largest(theirs: tuple[float, ...], ours: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
