"""What stands behind the decoder: a score for each token of the vocabulary, or one value."""

import torch
from torch import Tensor, nn
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
    logp_MV = logits_MV.log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_M = -torch.linalg.vecdot(logp_MV.exp(), logp_MV)
    return logp_MV.gather(-1, chosen_M[:, None]).squeeze(-1), entropy_M
