"""Where the answer stands in a text: the last tag, the last box, a closing phrase. All scans are linear."""

import re

MAX_EXPRESSION = 500
"""Longer expressions are wrong without being compared."""

_ENDS = ("</s>", "<|im_end|>", "<|endoftext|>")
_HEADER = "<|im_start|>assistant"
_WORD = re.compile(r"[A-Za-z]{2}")


def tagged(text: str, tag: str) -> str | None:
    """What stands in the last closed `<tag>...</tag>`."""
    end = text.rfind(f"</{tag}>")
    start = -1 if end < 0 else text.rfind(f"<{tag}>", 0, end)
    return None if start < 0 else text[start + len(tag) + 2 : end]


def _braced(text: str, start: int) -> str | None:
    """What stands in the braces that open at `start`; None if they never close."""
    depth = 0
    for i in range(start, min(len(text), start + MAX_EXPRESSION + 2)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : i]
    return None


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, with nested braces; None if it never closes or is overlong."""
    start = text.rfind("\\boxed{")
    return None if start < 0 else _braced(text, start + len("\\boxed"))


def is_prose(text: str) -> bool:
    """A sentence rather than a formula: words, and no TeX."""
    return "\\" not in text and len(text.split(maxsplit=1)) > 1 and _WORD.search(text) is not None


def chat_turn(text: str) -> str:
    """The last assistant turn of a text in which chat markers were left, up to the first end marker."""
    text = text.rsplit(_HEADER, 1)[-1]
    for end in _ENDS:
        text = text.split(end, 1)[0]
    return text


def announced(text: str) -> str | None:
    """The answer in Minerva's closing phrase, else in the last box."""
    tail = text.rpartition("final answer is $")[2]
    return tail.split("$. I hope", 1)[0] if "$. I hope" in tail else boxed(text)
