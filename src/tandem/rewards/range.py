"""What number a score can be: training computes with it in 32 bits."""

MAX_SCORE = 3.4e38
"""Just below the largest that 32 bits hold."""


def fits(score: float) -> bool:
    """Neither NaN nor too large either way."""
    return abs(score) <= MAX_SCORE
