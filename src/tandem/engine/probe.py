"""Proof by log-probabilities: an engine with a copy of the weights must say what the trainer says of a fixed text.

Checksums prove that the bytes arrived, a probe that the engine computes with them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fixed text, and what the trainer says of it with a version of the weights."""

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    """Of each token but the first, at temperature 1."""
    base_logp: tuple[float, ...] | None
    """The same without the adapter, of a model that has one."""
    engine_dtype: torch.dtype
    trainer_dtype: torch.dtype

    def check(self, engine: str, version: int, scores: Sequence[float]) -> float:
        """Compare what an engine says of the text; returns the largest difference. RunError with the cause where it is
        larger than the less precise of the two types explains."""
        allowed = max(TOLERANCE[self.engine_dtype], TOLERANCE[self.trainer_dtype])
        gaps = [abs(a - b) / (allowed * (1 + abs(b))) for a, b in zip(scores, self.logp, strict=True)]
        excess = [math.inf if math.isnan(gap) else gap for gap in gaps]
        if max(excess) <= 1:
            return largest(scores, self.logp)
        place = next(i for i, gap in enumerate(excess) if gap > 1)
        raise RunError(
            f"{engine} and the trainer disagree on weights of version {version}: log-probability of token {place + 1} "
            f"of the probe is {scores[place]:.6f} for the engine and {self.logp[place]:.6f} for the trainer (allowed "
            f"{allowed:g}). Cause: {self._cause(scores, max(excess))}. Training would follow wrong ratios"
        )

    def _cause(self, scores: Sequence[float], excess: float) -> str:
        """What the differences look like; `excess` is the largest in units of what is allowed."""
        if self.base_logp and largest(scores, self.base_logp) < largest(scores, self.logp) / 2:
            return "the adapter: the engine answers as the base model does, so it has not applied it"
        if self.engine_dtype != self.trainer_dtype and excess < ROUNDING:
            return (
                f"the dtype: {dtype_name(self.engine_dtype)} in the engine, {dtype_name(self.trainer_dtype)} in the "
                "trainer"
            )
        return (
            "the weights: they arrived and the engine computes with others (an output head that it keeps apart from "
            "the embeddings, a layer that it did not reload), or it is another model than model.path"
        )


def probe_of(model: LanguageModel, engine_dtype: torch.dtype) -> Probe:
    """With the weights as they are now, for an engine that computes in a type of its own. Of a model on many processes
    all make it together."""
    tokens = probe_tokens(model.vocab_size, model.max_positions)
    model.module.eval()
    base = None
    if model.adapter is not None:
        with model.base():
            base = tuple(policy_logp(model, tokens))
    return Probe(
        tokens=tokens,
        logp=tuple(policy_logp(model, tokens)),
        base_logp=base,
        engine_dtype=engine_dtype,
        trainer_dtype=model.network.dtype,
    )


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


def largest(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
