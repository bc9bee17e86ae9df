"""Numbers in text, as exact fractions: sign, thousands separators, decimals, fractions, exponents.

Every pattern is linear in the text (possessive quantifiers, bounded look-behind): the text is hostile.
"""

import re
from fractions import Fraction

MAX_DIGITS = 100
"""A longer number is no answer; it is not read, so that it costs no time."""

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)(?:\.[0-9]++)?|(?<![.0-9])\.[0-9]++"
_NUMBER = re.compile(
    # A minus after a word, a digit or a closing bracket is a subtraction, not a sign.
    rf"(?:(?<![A-Za-z0-9.)\]}}])(?P<sign>[-+]))?(?:\\?\$)?(?<![A-Za-z0-9])(?P<number>{_PLAIN})"
    rf"(?P<exponent>[eE][-+]?[0-9]++)?(?:\ ?/\ ?(?P<below>{_PLAIN}))?"
)
_SIMPLE_FRACTION = re.compile(r"\\[dt]?frac\{(-?[0-9.,]{1,40})\}\{([0-9.,]{1,40})\}")
_WHOLE = r"(?<![0-9.,/])([0-9]{1,40}+)"
_MIXED_TEX = re.compile(_WHOLE + r"\s{0,3}\\[dt]?frac\{([0-9]{1,40})\}\{([0-9]{1,40})\}")
_MIXED = re.compile(_WHOLE + r" ([0-9]{1,40}+)/([0-9]{1,40}+)")


def plain(text: str) -> str:
    """The text with typographic minus, TeX thousands commas and simple TeX fractions, those after a whole number among
    them, written plainly."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "")
    if "frac" not in text:
        return text
    return _SIMPLE_FRACTION.sub(r"\1/\2", _MIXED_TEX.sub(_improper, text))


def plain_value(text: str) -> str:
    """The same of a text that is one value, where `1 1/2` is 3/2."""
    return _MIXED.sub(_improper, plain(text)) if "/" in text or "frac" in text else plain(text)


def _improper(match: re.Match[str]) -> str:
    whole, above, below = match.groups()
    return f"{int(whole) * int(below) + int(above)}/{below}"


def _value(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > MAX_DIGITS:
        return None
    exponent = match["exponent"] or ""
    if len(exponent) > 4:
        return None
    value = Fraction(match["number"].replace(",", "") + exponent)
    if match["below"]:
        below = Fraction(match["below"].replace(",", ""))
        if below == 0:
            return None
        value /= below
    return -value if match["sign"] == "-" else value


def _last(text: str) -> re.Match[str] | None:
    last = None
    for match in _NUMBER.finditer(plain(text)):
        last = match
    return last


def last_number(text: str) -> Fraction | None:
    """The last number in the text; None if there is none, or if it is no number (1/0, a thousand digits)."""
    match = _last(text)
    return None if match is None else _value(match)


def last_literal(text: str) -> str | None:
    """The last number as it is written, without currency sign and separators; None where `last_number` is."""
    match = _last(text)
    if match is None or _value(match) is None:
        return None
    return str(_value(match)) if match["exponent"] else re.sub(r"[^-.0-9/]", "", match[0])


def number(text: str) -> Fraction | None:
    """The text as a number if all of it is one, but for a currency sign, a per cent sign or a full stop."""
    bare = plain_value(text).strip().strip("$").removesuffix(".").removesuffix("%").removesuffix("\\").strip()
    match = _NUMBER.fullmatch(bare)
    return None if match is None else _value(match)


def gold_number(truth: str | None) -> Fraction:
    """The truth as a number, after any `####`; a truth that is no number is a fault of the data."""
    value = None if truth is None else number(truth.rsplit("####", 1)[-1])
    if value is None:
        raise ValueError(f"the truth {truth!r} is not a number")
    return value
