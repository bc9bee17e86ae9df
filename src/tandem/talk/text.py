"""Answers as text for a terminal: whole characters while they are generated, control characters escaped."""

from transformers import PreTrainedTokenizerBase

from tandem.engine import decode
from tandem.journal import visible

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""


class TextStream:
    """Tokens in, text out, never a part of a character.

    Each piece is the difference between two decodings that begin at the piece before, since some tokenizers
    write a token at the start of a text without the space that it has elsewhere.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0
        """First token of the last piece."""
        self._out = 0
        """Tokens whose text is out."""

    def feed(self, token: int) -> str:
        """The text that is complete with this token; empty while a character lacks bytes."""
        self._tokens.append(token)
        piece = self._waiting()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self._start, self._out = self._out, len(self._tokens)
        return piece

    def rest(self) -> str:
        """At the end: the text held back, bytes without a character as U+FFFD."""
        piece = self._waiting()
        self._start, self._out = self._out, len(self._tokens)
        return piece

    def _waiting(self) -> str:
        before = decode(self._tokenizer, self._tokens[self._start : self._out])
        return decode(self._tokenizer, self._tokens[self._start :])[len(before) :]


def escaped(text: str) -> str:
    """All of a text as a terminal may see it; `visible` alone shortens long ones."""
    return "".join(map(visible, text))
