"""When two mathematical answers are the same. Nothing here evaluates text: numbers are exact fractions, and
everything else goes to math-verify's LaTeX grammar, in a process that can be killed."""

import re
from fractions import Fraction

from tandem.rewards.extraction import MAX_EXPRESSION
from tandem.rewards.number import number, plain_value

PERCENT_TOLERANCE = Fraction(1, 10_000)
_INTEGER = re.compile(r"-?[0-9]{1,15}")
_CHOICE = re.compile(r"(?<![A-Za-z])[A-E](?![A-Za-z])")
_LEFT_OUT = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,; ]|\^\\circ|\^\{\\circ\}|\\\$|\$|\\?%|\s")
_FRACTION_NAME = re.compile(r"\\[dt]frac(?![a-z])")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}")


def normal(text: str) -> str:
    """Without spacing, sizing, text wrappers, a final stop, and signs of currency, per cent and degree."""
    text = _TEXT.sub(r"\1", _FRACTION_NAME.sub(r"\\frac", text.strip()))
    return _LEFT_OUT.sub("", text).rstrip(".")


def too_long(text: str) -> bool:
    return len(text) > MAX_EXPRESSION


def equivalent(answer: str, truth: str) -> bool:
    """Equal integers, or equal in math-verify's judgement; ValueError if the truth cannot be parsed."""
    if _INTEGER.fullmatch(truth) and _INTEGER.fullmatch(answer):
        return int(truth) == int(answer)
    from tandem.rewards.symbolic import same

    return not too_long(answer) and same(answer, truth)


def _close(a: Fraction, b: Fraction) -> bool:
    return abs(a - b) <= PERCENT_TOLERANCE * max(abs(a), abs(b))


def _last_choice(text: str) -> str:
    letters = _CHOICE.findall(text.upper())
    return letters[-1] if letters else text.strip().rstrip("./")


def _parts(text: str) -> list[str] | None:
    """Elements of a tuple, interval or list, or None. Commas inside brackets do not divide."""
    if len(text) < 2 or text[0] not in "([" or text[-1] not in ")]":
        return None
    parts, depth, start = [], 0, 1
    for i, sign in enumerate(text[1:-1], 1):
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return None
        if sign == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:-1]]


def _right_side(text: str) -> str | None:
    """`v` of a text `x = v`."""
    left, sign, right = text.partition("=")
    return right.strip() if sign and len(left.strip()) <= 2 and "=" not in right else None


def _matrix_rows(text: str) -> list[str] | None:
    match = re.fullmatch(r"\\begin\{([pbBv]?matrix)\}(.*)\\end\{\1\}", text, re.DOTALL)
    if match is None:
        return None
    return [cell for row in match[2].rstrip("\\ \n").split("\\\\") for cell in ["(", *row.split("&")]]


def math_equal(answer: str, truth: str, depth: int = 0) -> bool:
    """Qwen2.5-Math's equality: numbers to 1e-4 or as per cent; choices, tuples, matrices, `x = v`."""
    answer, truth = answer.strip(), truth.strip()
    if too_long(answer):
        return False
    shown, wanted = normal(plain_value(answer)), normal(plain_value(truth))
    if answer.casefold() == truth.casefold() or (wanted and shown == wanted):
        return True
    if truth in "ABCDE" and len(truth) == 1:
        return _last_choice(answer) == truth
    ours, gold = number(shown), number(wanted)
    if ours is not None and gold is not None:
        return any(_close(ours, label) for label in (gold, gold / 100, gold * 100))
    if depth == 0:
        verdict = _structure_equal(answer, truth)
        if verdict is not None:
            return verdict
    return equivalent(answer, truth)


def _structure_equal(answer: str, truth: str) -> bool | None:
    """Element by element where the two have parts; None where they do not decide it."""
    for split in (_parts, _matrix_rows):
        ours, gold = split(answer), split(truth)
        if ours is not None and gold is not None and len(ours) == len(gold):
            if split is _parts and len(gold) > 1 and (answer[0], answer[-1]) != (truth[0], truth[-1]):
                return False
            return all(math_equal(a, b, depth=1) for a, b in zip(ours, gold))
    value = _right_side(answer)
    if value is not None and "=" not in truth:
        return math_equal(value, truth, depth=1)
    value = _right_side(truth)
    if value is not None and "=" not in answer:
        return math_equal(answer, value, depth=1)
    return None
