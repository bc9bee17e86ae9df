"""Choose a token from logits: penalty, temperature, top-k, top-p, min-p, in Transformers' order."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How answers are drawn. `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """An answer ends with the token that completes one of these texts."""
    stop_tokens: frozenset[int] = frozenset()

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def choose(
    logits_BV: Tensor,
    uniform_B: Tensor,
    params: SamplingParams,
    held_back_BV: Tensor | None,
    seen_BV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_B`, its `logp_B` under the distribution it is drawn from, and its `policy_logp_B`.

    The policy is softmax(logits / temperature), for greedy softmax(logits); the distribution drawn from is that
    after the repetition penalty (`seen_BV`), held-back end tokens (`held_back_BV`) and truncation.
    """
    scaled_BV = logits_BV if params.temperature in (0, 1) else logits_BV / params.temperature
    if seen_BV is None and held_back_BV is None and not params.truncates:
        probability_BV = scaled_BV.softmax(-1)
        token_B = scaled_BV.argmax(-1) if params.temperature == 0 else inverse_cdf(probability_BV, uniform_B)
        logp_B = probability_BV.gather(-1, token_B[:, None]).squeeze(-1).log()
        return token_B, logp_B, logp_B
    changed_BV = logits_BV
    if seen_BV is not None:
        changed_BV = torch.where(seen_BV, _penalize(changed_BV, params.repetition_penalty), changed_BV)
    if held_back_BV is not None:
        changed_BV = changed_BV.masked_fill(held_back_BV, float("-inf"))
    drawn_BV = truncate((changed_BV / (params.temperature or 1.0)).log_softmax(-1), params)
    token_B = drawn_BV.argmax(-1) if params.temperature == 0 else inverse_cdf(drawn_BV.exp(), uniform_B)
    pick_B1 = token_B[:, None]
    policy_B = scaled_BV.log_softmax(-1).gather(-1, pick_B1).squeeze(-1)
    return token_B, drawn_BV.gather(-1, pick_B1).squeeze(-1), policy_B


def truncate(logp_BV: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities after top-k, top-p and min-p, normalized again; -inf where dropped."""
    if not params.truncates:
        return logp_BV
    kept_BV = logp_BV
    if 0 < params.top_k < logp_BV.shape[-1]:
        bound_B1 = kept_BV.topk(params.top_k, dim=-1).values[:, -1:]
        kept_BV = kept_BV.masked_fill(kept_BV < bound_B1, float("-inf")).log_softmax(-1)
    if params.top_p < 1:
        sorted_BV, order_BV = kept_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
        drop_BV = (before_BV >= params.top_p).scatter(-1, order_BV, before_BV >= params.top_p)
        kept_BV = kept_BV.masked_fill(drop_BV, float("-inf")).log_softmax(-1)
    if params.min_p > 0:
        bound_B1 = kept_BV.max(-1, keepdim=True).values + torch.tensor(params.min_p).log()
        kept_BV = kept_BV.masked_fill(kept_BV < bound_B1, float("-inf")).log_softmax(-1)
    return kept_BV


def inverse_cdf(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The entry whose cumulative probability first exceeds uniform x total; one number per row is enough.

    First the block of entries is found, then the entry in it: a running sum over all of them would be a long chain.
    Of a row that holds NaN it is any entry.
    """
    (rows, entries), short = probability_BV.shape, -probability_BV.shape[-1] % BLOCK
    blocks_BNK = pad(probability_BV, (0, short)).view(rows, -1, BLOCK)
    cumulative_BN = blocks_BNK.sum(-1).cumsum(-1)
    threshold_B1 = uniform_B[:, None] * cumulative_BN[:, -1:]
    block_B1 = torch.searchsorted(cumulative_BN, threshold_B1, right=True).clamp(
        max=cumulative_BN.shape[1] - 1
    )
    before_B1 = cumulative_BN.gather(1, (block_B1 - 1).clamp(min=0)).masked_fill(block_B1 == 0, 0)
    inside_BK = blocks_BNK.gather(1, block_B1[:, :, None].expand(-1, 1, BLOCK)).squeeze(1).cumsum(-1)
    # The block's own sum may be rounded below the threshold: its last entry of any probability is then meant.
    last_B1 = torch.searchsorted(inside_BK, inside_BK[:, -1:].contiguous())
    entry_B1 = torch.searchsorted(inside_BK, threshold_B1 - before_B1, right=True).minimum(last_B1)
    return (block_B1 * BLOCK + entry_B1).clamp(max=entries - 1).squeeze(1)


BLOCK = 64
"""Entries that are searched at once."""


def _penalize(logits_BV: Tensor, penalty: float) -> Tensor:
    return torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
