"""Symbolic equality by math-verify, only ever imported where a stuck computation can be killed.

Text reaches math-verify's LaTeX grammar alone. Its extraction of plain expressions is left out: that hands
text to `sympy.parse_expr`, which evaluates Python. Its own timeouts are off: a signal does not stop C
code, and its expiry would read as a wrong answer.
"""

import logging
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)

_LATEX = [LatexExtractionConfig(boxed_match_priority=-1)]


@lru_cache(maxsize=512)
def _parsed(text: str) -> tuple[Any, ...]:
    # No formula has a double underscore; Python's internals do.
    if "__" in text:
        return ()
    text = text.replace("\\$", "").replace("$", "").replace("\n", " ").rstrip("\\").strip()
    return tuple(parse(f"${text}$", _LATEX, fallback_mode="no_fallback", parsing_timeout=None))


def same(answer: str, truth: str) -> bool:
    """Whether math-verify holds the two for equal; an answer it cannot parse is not."""
    gold = _parsed(truth)
    if not gold:
        raise ValueError(f"the truth {truth!r} cannot be parsed by math-verify")
    return verify(list(gold), list(_parsed(answer)), timeout_seconds=None)
