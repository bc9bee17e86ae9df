"""The layouts an answer is asked for: think and answer tags, a box.

Plain scans, because a pattern with several `.*` takes quadratic time on a text that repeats its tags.
"""

import re

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SEAM = re.compile(r"</think>\s*<answer>")


def _boxes_in_line(line: str) -> int:
    count, start = 0, line.find("\\boxed{")
    while start >= 0:
        end = line.find("}", start)
        if end < 0:
            break
        count += 1
        start = line.find("\\boxed{", end)
    return count


def is_strict(text: str) -> bool:
    r"""Each tag once, one `\boxed{...}` on one line, in order, and nothing before or after the tags."""
    if any(text.count(tag) != 1 for tag in _TAGS) or sum(map(_boxes_in_line, text.split("\n"))) != 1:
        return False
    places = [text.find(mark) for mark in ("</think>", "<answer>", "\\boxed{", "</answer>")]
    return text.startswith("<think>") and text.endswith("</answer>") and places == sorted(places)


def is_tagged(text: str) -> bool:
    """`<think>...</think>`, blanks, `<answer>...</answer>` as a whole; blanks may follow."""
    body = text.rstrip()
    if not body.startswith("<think>") or not body.endswith("</answer>"):
        return False
    return _SEAM.search(body[: -len("</answer>")], len("<think>")) is not None


def has_in_order(text: str, *marks: str) -> bool:
    """The text begins with the first mark and holds the others after it, in order, without overlap."""
    if not text.startswith(marks[0]):
        return False
    place = len(marks[0])
    for mark in marks[1:]:
        place = text.find(mark, place)
        if place < 0:
            return False
        place += len(mark)
    return True


def is_boxed_answer(text: str) -> bool:
    r"""`<think>...</think>...<answer>...\boxed{...}...</answer>` as a whole; tags may repeat."""
    return text.endswith("</answer>") and has_in_order(text, *_TAGS[:3], "\\boxed{", "}", "</answer>")


def has_tag_pairs(text: str) -> bool:
    """A think pair and an answer pair anywhere, in any order."""
    return all(
        text.find(f"<{tag}>") >= 0 and text.find(f"</{tag}>", text.find(f"<{tag}>")) >= 0
        for tag in ("think", "answer")
    )
