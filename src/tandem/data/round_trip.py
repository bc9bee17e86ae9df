"""A check before the run: do the prompts' tokens say what their text says, in tokens the model knows?"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tandem.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = re.compile(r"<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c\s]+\uff5c>")
"""How chat templates write their special tokens; U+FF5C is the wide bar of DeepSeek."""


def check_round_trip(prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The problems found; none for prompts that decode to their text in a template that fits the model."""
    problems = []
    special = [token for token in tokenizer.all_special_tokens if token]
    for prompt in prompts:
        decoded = tokenizer.decode(prompt.tokens, clean_up_tokenization_spaces=False)
        if decoded != prompt.text:
            problems.append(f"prompt {prompt.id}: {first_difference(prompt.text, decoded)}")
        if prompt.tokens[:2] == (tokenizer.bos_token_id,) * 2:
            problems.append(f"prompt {prompt.id}: begins with the BOS token {tokenizer.bos_token!r} twice")
        found = [token for token in special if token in prompt.question]
        if found:
            problems.append(f"prompt {prompt.id}: the question itself holds the special token {found[0]!r}")
    return problems + foreign_markers(prompts, tokenizer)


def first_difference(text: str, decoded: str) -> str:
    pairs = enumerate(zip(text, decoded))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(decoded)))
    near = slice(max(at - 10, 0), at + 20)
    return f"decodes to {decoded[near]!a} where the text has {text[near]!a}, at character {at}"


def foreign_markers(prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Markers of the template that this tokenizer cuts into pieces: the template is for another model."""
    markers = sorted({marker for prompt in prompts for marker in MARKER.findall(prompt.text)})
    pieces = {marker: len(tokenizer.encode(marker, add_special_tokens=False)) for marker in markers}
    return [
        f"the marker {marker!r} is {count} tokens to this tokenizer instead of one; "
        "data.template is for another model"
        for marker, count in pieces.items()
        if count != 1
    ]
