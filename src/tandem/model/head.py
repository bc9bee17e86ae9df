"""What stands behind the decoder: a score for each token of the vocabulary, or one value."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel

VALUE = "score"
"""The head of a sequence classifier, as Transformers names it."""


def head_of(network: PreTrainedModel) -> nn.Module:
    """The output head of a language model, or a value model's."""
    return network.score if gives_values(network) else network.get_output_embeddings()


def replace_head(network: PreTrainedModel, head: nn.Module) -> None:
    """Put another module behind the decoder."""
    if gives_values(network):
        network.score = head
    else:
        network.set_output_embeddings(head)


def is_tied(network: PreTrainedModel) -> bool:
    """Is the head one weight with the embedding, or will be, where the model has no storage yet?"""
    return network.config.tie_word_embeddings and not gives_values(network)


def gives_values(network: PreTrainedModel) -> bool:
    """Is it a sequence classifier with one output: a critic or a reward model?"""
    return hasattr(network, VALUE)


def chosen_logprobs(
    logits_MV: Tensor, chosen_M: Tensor, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of the chosen entry of each row, and the row's entropy in nats."""
    if not entropy_gradient:
        return Chosen.apply(logits_MV, chosen_M)
    logp_MV = logits_MV.log_softmax(-1)
    entropy_M = -torch.linalg.vecdot(logp_MV.exp(), logp_MV)
    return logp_MV.gather(-1, chosen_M[:, None]).squeeze(-1), entropy_M


class Chosen(torch.autograd.Function):
    """The same where the entropy needs no gradient: one tensor as large as the logits, which becomes their gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits_MV: Tensor, chosen_M: Tensor) -> tuple[Tensor, Tensor]:
        probability_MV = logits_MV.softmax(-1)
        # The largest probability is one that never rounds to 0.
        total_M1 = logits_MV.amax(-1, keepdim=True) - probability_MV.amax(-1, keepdim=True).log()
        logp_M1 = logits_MV.gather(-1, chosen_M[:, None]) - total_M1
        entropy_M = total_M1.squeeze(-1) - torch.linalg.vecdot(probability_MV, logits_MV)
        ctx.save_for_backward(probability_MV, chosen_M)
        ctx.mark_non_differentiable(entropy_M)
        return logp_M1.squeeze(-1), entropy_M

    @staticmethod
    def backward(ctx: Any, dlogp_M: Tensor, _: Tensor) -> tuple[Tensor, None]:
        probability_MV, chosen_M = ctx.saved_tensors
        # Changed in place: PyTorch refuses a second backward pass with an error.
        dlogits_MV = probability_MV.mul_(-dlogp_M[:, None])
        return dlogits_MV.scatter_add_(1, chosen_M[:, None], dlogp_M[:, None]), None
