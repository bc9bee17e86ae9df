"""Log-probabilities of sampled tokens: the only place that knows that logits at t-1 predict token t."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tandem.model.attention import lay
from tandem.model.flex import Documents
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
) -> tuple[Tensor, Tensor]:
    """`logp_BT` and `entropy_BT` (nats) at the masked tokens, 0 elsewhere, of softmax(logits / temperature).

    The entropy is a figure for the journal unless `entropy_gradient` says that a loss depends on it.
    Rows of one group share their first `prompt_length_B` tokens; given both, each prompt is computed once.
    The output head runs only where a masked token is predicted; above `logits_bytes` of logits it runs in chunks
    whose logits are computed again in the backward pass.
    """
    assert not mask_BT[:, 0].any(), "the first token of a row has no prediction"
    padded = lay(length_B, prompt_length_B, group_B)
    layout = Documents(padded) if attention == "documents" else padded
    line_N, masked_N = layout.line(tokens_BT), layout.line(mask_BT)
    hidden_NH = model.hidden(line_N, layout.position_N, layout)
    chosen_M = line_N[masked_N]
    hidden_MH = hidden_NH.index_select(0, layout.previous_N[masked_N])

    def head(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits_MV = model.logits(hidden)
        return chosen_logprobs(
            logits_MV if temperature == 1 else logits_MV / temperature, chosen, entropy_gradient
        )

    size = max(1, logits_bytes // (4 * model.vocab_size))
    if len(chosen_M) <= size:
        logp_M, entropy_M = head(hidden_MH, chosen_M)
    else:
        parts = [
            checkpoint(head, hidden_MH[cut], chosen_M[cut], use_reentrant=False)
            for cut in slices(len(chosen_M), size)
        ]
        logp_M, entropy_M = (torch.cat(column) for column in zip(*parts))
    empty_BT = torch.zeros(tokens_BT.shape, device=tokens_BT.device)
    return empty_BT.masked_scatter(mask_BT, logp_M), empty_BT.masked_scatter(mask_BT, entropy_M)


def chosen_logprobs(
    logits_MV: Tensor, chosen_M: Tensor, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of the chosen entry of each row, and the row's entropy in nats."""
    logp_MV = logits_MV.log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_M = -torch.linalg.vecdot(logp_MV.exp(), logp_MV)
    return logp_MV.gather(-1, chosen_M[:, None]).squeeze(-1), entropy_M


def slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, total, size))
