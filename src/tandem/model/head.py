"""What the output head's logits say of a token."""

import torch
from torch import Tensor


def chosen_logprobs(
    logits_MV: Tensor, chosen_M: Tensor, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of the chosen entry of each row, and the row's entropy in nats."""
    logp_MV = logits_MV.log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_M = -torch.linalg.vecdot(logp_MV.exp(), logp_MV)
    return logp_MV.gather(-1, chosen_M[:, None]).squeeze(-1), entropy_M
