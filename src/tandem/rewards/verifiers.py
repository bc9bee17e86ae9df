"""The built-in verifiers, by name. docs/rewards.md tables their scores.

Each is a pure function of the answer up to, not including, its end token. None evaluates that text as code.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from tandem.rewards import layout
from tandem.rewards.arithmetic import evaluate
from tandem.rewards.equality import equivalent, math_equal
from tandem.rewards.extraction import announced, boxed, chat_turn, is_prose, tagged
from tandem.rewards.minerva import minerva
from tandem.rewards.number import gold_number, last_literal, last_number, number

_STEP = re.compile(r"Step [0-9]++:|^[0-9]++\.|\n[-*]|First,|Second,|Next,|Finally,", re.MULTILINE)
_FINAL_LINE = re.compile(r"answer\s*+:\s*+([^\n]++)", re.IGNORECASE)
_LETTER = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")
_CHOICE_PHRASE = re.compile(r"(?i:answer(?:\s++is)?\s*+:?)[\s(*]*+([A-Z])(?![A-Za-z])")


def _needed(truth: str | None) -> str:
    """The truth, stripped; a verifier that compares cannot do without one."""
    if truth is None or not truth.strip():
        raise ValueError("this verifier needs a truth, and the row has none")
    return truth.strip()


def _final(truth: str | None) -> str:
    """The truth as mathematics: after `####`, in a box or whole."""
    text = _needed(truth).rsplit("####", 1)[-1].strip()
    inside = boxed(text)
    text = text if inside is None else inside
    value = number(text)
    return str(value) if value is not None and value.denominator == 1 and "%" not in text else text


def accuracy(answer: str, truth: str | None) -> float:
    """1 if math-verify holds the final answer for equal to the truth, else 0."""
    gold = _final(truth)
    inside = tagged(answer, "answer")
    scope = answer if inside is None else inside
    found = boxed(scope)
    if found is None:
        found = last_literal(scope) if inside is None or is_prose(scope) else scope
    return float(found is not None and equivalent(found.strip(), gold))


def base_acc(answer: str, truth: str | None, strict: bool = True) -> float:
    """1 if the layout holds and the box is right; not `strict`: tags may repeat, and equality is exact."""
    gold = _final(truth)
    found = boxed(answer) if (layout.is_strict if strict else layout.is_boxed_answer)(answer) else None
    return float(found is not None and (math_equal if strict else equivalent)(found.strip(), gold))


def acc(
    answer: str, truth: str | None, right: float = 1.0, wrong: float = -0.5, unboxed: float = -1.0
) -> float:
    """Right, wrong, or without a box or an answer (even when correct)."""
    gold = _final(truth)
    text = chat_turn(answer)
    found = announced(text)
    if "boxed" not in text or found is None or not found.strip():
        return unboxed
    return right if math_equal(found, gold) else wrong


def strict_format(answer: str, right: float = 1.0, wrong: float = -0.5) -> float:
    """Each tag once, one box, in order, nothing around."""
    return right if layout.is_strict(answer) else wrong


def format_whole(answer: str) -> float:
    """1 if the answer is a think part and an answer part as a whole, else 0."""
    return float(layout.is_tagged(answer))


def reasoning_steps(answer: str) -> float:
    """A third for each sign of a step, at most 1."""
    return min(1.0, len(_STEP.findall(answer)) / 3)


def boxed_acc(answer: str, truth: str | None) -> float:
    """1 if the last box is right, whatever the layout, else 0."""
    gold = _final(truth)
    found = boxed(answer)
    return float(found is not None and equivalent(found.strip(), gold))


def math_verify_reward(answer: str, truth: str | None) -> float:
    """1 if the layout holds (tags may repeat) and math-verify agrees, else 0."""
    return base_acc(answer, truth, strict=False)


def boxed_with_format(answer: str, truth: str | None, weight: float = 0.1) -> float:
    """0.9 for the right box and 0.1 for thinking before it."""
    thought = layout.has_in_order(answer, "<think>", "</think>", "\\boxed{", "}")
    return (1 - weight) * boxed_acc(answer, truth) + weight * thought


def dapo(answer: str, truth: str | None) -> float:
    """+1 if the last `Answer:` line of the last 300 characters is the truth as a string, else -1."""
    gold = minerva(_final(truth))
    lines = _FINAL_LINE.findall(answer[-300:])
    return 1.0 if lines and minerva(lines[-1].strip()) == gold else -1.0


def choice(
    answer: str, truth: str | None, letters: str = "ABCDEFGHIJ", right: float = 1.0, wrong: float = 0.0
) -> float:
    """The letter of a multiple-choice answer."""
    gold = _needed(truth).strip("().: ").upper()
    if len(gold) != 1 or gold not in letters:
        raise ValueError(f"the truth {truth!r} is not one of the letters {letters}")
    scope = tagged(answer, "answer")
    scope = answer if scope is None else scope
    inside = boxed(scope)
    scope = scope if inside is None else inside
    said = _CHOICE_PHRASE.findall(scope)
    if said:
        return right if said[-1] == gold else wrong
    bare = scope.strip().strip("().:*").upper()
    found = [bare] if len(bare) == 1 else [c for c in _LETTER.findall(scope) if c in letters]
    return right if found and found[-1] == gold else wrong


def answer_number(
    answer: str, truth: str | None, right: float = 1.0, wrong: float = -1.0, tag: str | None = "answer"
) -> float:
    """The last number inside the last `<answer>` tag (`tag: null`: of the whole answer), to 1e-5."""
    gold = gold_number(truth)
    scope = answer if tag is None else tagged(answer, tag)
    value = None if scope is None else last_number(scope)
    return right if value is not None and abs(value - gold) <= Fraction(1, 100_000) else wrong


def format_tags(answer: str, right: float = 1.25, wrong: float = -1.0, anchored: bool = False) -> float:
    """A think pair and an answer pair anywhere; `anchored`: as a whole, each tag once."""
    ok = layout.has_tag_pairs(answer)
    if anchored:
        once = all(answer.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
        ok = once and layout.is_tagged(answer)
    return right if ok else wrong


def _countdown_row(truth: str | None, row: Mapping[str, Any]) -> tuple[Sequence[int], Fraction]:
    numbers = row.get("numbers", row.get("nums"))
    if not isinstance(numbers, Sequence) or isinstance(numbers, str):
        raise ValueError(f"countdown needs a column `numbers` (or `nums`) with a list, not {numbers!r}")
    return [int(n) for n in numbers], gold_number(str(row["target"]) if "target" in row else truth)


def countdown(answer: str, truth: str | None, row: Mapping[str, Any]) -> float:
    """1 if the first `<answer>` uses each number of the row once and makes the target, else 0."""
    numbers, target = _countdown_row(truth, row)
    _, opened, rest = answer.partition("<answer>")
    text, closed, _ = rest.partition("</answer>")
    result = evaluate(text) if opened and closed else None
    if result is None:
        return 0.0
    value, used = result
    return float(sorted(used) == sorted(numbers) and abs(value - target) < Fraction(1, 100_000))


def countdown_format(answer: str, prefix: str = "<think>") -> float:
    """1 for the whole layout, else 0.1 for a think part plus 0.5 for an answer part."""
    text = prefix + answer
    seam = text.find("</think>\n<answer>", len("<think>"))
    body = text.removesuffix("\n")
    if body.startswith("<think>") and body.endswith("</answer>") and seam >= 0:
        return 1.0
    pairs = [(text.find(f"<{tag}>"), text.rfind(f"</{tag}>")) for tag in ("think", "answer")]
    think, final = (0 <= opened < closed for opened, closed in pairs)
    return 0.1 * think + 0.5 * final


VERIFIERS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "base_acc": base_acc,
    "acc": acc,
    "strict_format": strict_format,
    "format": format_whole,
    "reasoning_steps": reasoning_steps,
    "math_17k_acc": boxed_acc,
    "acc_for_ppo": boxed_acc,
    "math_verify_reward": math_verify_reward,
    "boxed_with_format": boxed_with_format,
    "dapo": dapo,
    "choice": choice,
    "answer_number": answer_number,
    "format_tags": format_tags,
    "countdown": countdown,
    "countdown_format": countdown_format,
}

SYMBOLIC = frozenset(
    {"accuracy", "base_acc", "acc", "math_17k_acc", "acc_for_ppo", "math_verify_reward", "boxed_with_format"}
)
"""Those that reach math-verify; a worker imports it before its first answer: no deadline pays for that."""
