"""What draws are held against: Transformers' own logits processors, and chi-square."""

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tandem.engine import SamplingParams

SETTINGS = {
    "temperature": SamplingParams(temperature=0.6),
    "hot": SamplingParams(temperature=1.7),
    "top_k": SamplingParams(top_k=7),
    "top_k_above_vocabulary": SamplingParams(top_k=10_000),
    "top_p": SamplingParams(top_p=0.8),
    "tiny_top_p": SamplingParams(top_p=1e-4),
    "min_p": SamplingParams(min_p=0.1),
    "penalty": SamplingParams(repetition_penalty=1.3),
    "all": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.05),
}


def chi_square_bound(freedom: int) -> float:
    """What chi-square exceeds with probability below 1e-6 (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.8 * spread**0.5) ** 3


def chi_square(drawn: torch.Tensor, probability: torch.Tensor) -> tuple[float, float]:
    """Chi-square of drawn entries against their distribution, rare entries pooled, and its bound."""
    expected = probability.double() * len(drawn)
    counted = torch.bincount(drawn, minlength=len(expected)).double()
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    counted = torch.cat([counted[often], counted[~often].sum()[None]])
    present = expected > 0
    assert counted[~present].sum() == 0, "an entry without probability was drawn"
    value = ((counted - expected)[present].square() / expected[present]).sum()
    return float(value), chi_square_bound(max(1, int(present.sum()) - 1))


def processors(params: SamplingParams) -> LogitsProcessorList:
    """Transformers' own, in the order in which its `generate` applies them."""
    made = LogitsProcessorList()
    if params.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    made.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        made.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        made.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        made.append(MinPLogitsWarper(params.min_p))
    return made
