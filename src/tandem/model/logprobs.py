"""Log-probabilities of sampled tokens: the only place that knows that logits at t-1 predict token t."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tandem.model.attention import Branches, Rows
from tandem.model.flex import Documents, arranged
from tandem.model.kept import Kept
from tandem.model.language_model import LanguageModel


def token_logprobs(
    model: LanguageModel,
    tokens_BT: Tensor,
    mask_BT: Tensor,
    length_B: Tensor,
    *,
    prompt_length_B: Tensor | None = None,
    group_B: Tensor | None = None,
    temperature: float,
    logits_bytes: int,
    entropy_gradient: bool = False,
    attention: str = "padded",
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """`logp_BT` and `entropy_BT` (nats) at the masked tokens, 0 elsewhere, of softmax(logits / temperature).

    The entropy is a figure for the journal unless `entropy_gradient` says that a loss depends on it.
    Rows of one group share their first `prompt_length_B` tokens; given both, each prompt is computed once.
    The output head runs only where a masked token is predicted; above `logits_bytes` of logits it runs in chunks
    whose logits are computed again in the backward pass. What sampling has `kept` of the rows is not computed again.
    """
    assert not mask_BT[:, 0].any(), "the first token of a row has no prediction"
    layout = arranged(attention, length_B, prompt_length_B, group_B)
    line_N, masked_N = layout.line(tokens_BT), layout.line(mask_BT)
    at_M, size = layout.previous_N[masked_N], max(1, logits_bytes // (4 * model.logits_width))

    def head(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits_MV = model.logits(hidden)
        if temperature != 1:
            logits_MV = logits_MV / temperature
        return model.chosen_logprobs(logits_MV, chosen, entropy_gradient)

    def heads(hidden_MH: Tensor, chosen_M: Tensor) -> tuple[Tensor, ...]:
        if len(chosen_M) <= size:
            return head(hidden_MH, chosen_M)
        parts = [
            checkpoint(head, hidden_MH[cut], chosen_M[cut], use_reentrant=False)
            for cut in slices(len(chosen_M), size)
        ]
        return tuple(torch.cat(column) for column in zip(*parts))

    whole_M = at_M if len(at_M) <= size else None
    with nullcontext() if kept is None else kept.given(tokens_BT, length_B, layout, whole_M):
        logp_M, entropy_M = model.at(line_N, layout, at_M, heads, line_N[masked_N])
    empty_BT = torch.zeros(tokens_BT.shape, device=tokens_BT.device)
    return empty_BT.masked_scatter(mask_BT, logp_M), empty_BT.masked_scatter(mask_BT, entropy_M)


def token_values(
    model: LanguageModel,
    tokens_BT: Tensor,
    mask_BT: Tensor,
    length_B: Tensor,
    *,
    prompt_length_B: Tensor | None = None,
    group_B: Tensor | None = None,
    attention: str = "padded",
) -> Tensor:
    """`value_BT` at the masked tokens, 0 elsewhere, of a model whose head has one output. The value of token t is
    what the model says at t-1, so it cannot know the token. Arguments as for `token_logprobs`."""
    assert not mask_BT[:, 0].any(), "the first token of a row has nothing before it"
    layout = arranged(attention, length_B, prompt_length_B, group_B)
    value_M = values_at(model, tokens_BT, layout, layout.previous_N[layout.line(mask_BT)])
    return torch.zeros(tokens_BT.shape, device=tokens_BT.device).masked_scatter(mask_BT, value_M)


def row_values(
    model: LanguageModel,
    tokens_BT: Tensor,
    length_B: Tensor,
    *,
    prompt_length_B: Tensor | None = None,
    group_B: Tensor | None = None,
    attention: str = "padded",
) -> Tensor:
    """`value_B`: what a model whose head has one output says at the last token of each row. Arguments as for
    `token_logprobs`."""
    layout = arranged(attention, length_B, prompt_length_B, group_B)
    last_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) == (length_B - 1)[:, None]
    # Answers lie in the line in the order of their rows.
    return values_at(model, tokens_BT, layout, layout.line(last_BT).nonzero().squeeze(1))


def values_at(
    model: LanguageModel, tokens_BT: Tensor, layout: Rows | Branches | Documents, at_M: Tensor
) -> Tensor:
    """`value_M` at places of the line."""
    line_N = layout.line(tokens_BT)
    (value_M,) = model.at(line_N, layout, at_M, lambda hidden_MH: (model.logits(hidden_MH).squeeze(-1),))
    return value_M


def slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, total, size))
