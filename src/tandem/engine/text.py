"""The text of an answer's tokens, and the texts that end it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tandem.engine.sampling import SamplingParams


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Text of an answer's tokens, control tokens left out."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def has_stop_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], params: SamplingParams) -> bool:
    """One of the stop texts is complete, and the answer long enough to end."""
    if not params.stop or len(tokens) < params.min_tokens:
        return False
    # A stop text of n bytes lies within the last n + 1 tokens: a token may hold no more than one byte.
    longest = max(len(stop.encode()) for stop in params.stop)
    tail = decode(tokenizer, tokens[-longest - 1 :])
    return any(stop in tail for stop in params.stop)
