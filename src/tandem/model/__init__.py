"""Models: load, forward, log-probabilities."""

from tandem.model.language_model import LanguageModel
from tandem.model.load import describe, load, load_frozen, tokenizer_of
from tandem.model.logprobs import row_values, token_logprobs, token_values

__all__ = [
    "LanguageModel",
    "describe",
    "load",
    "load_frozen",
    "row_values",
    "token_logprobs",
    "token_values",
    "tokenizer_of",
]
