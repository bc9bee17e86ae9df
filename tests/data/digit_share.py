"""A reward function of one's own, as a user would write it."""


def digit_share(answer: str) -> float:
    return sum(c.isdigit() for c in answer) / max(1, len(answer))
