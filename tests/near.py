"""Whether seconds are near those that were expected, on a machine whose speed changes while one looks."""

from collections.abc import Callable, Mapping
from statistics import median

import pytest

TRIES, NEAR, STEADY = 5, 0.2, 1.18


def assert_near(
    expected: Callable[[], Mapping[str, float]], taken: Callable[[], Mapping[str, float]]
) -> None:
    """Expected over taken seconds, of each name that is taken, differ from 1 by less than `NEAR`.

    Each try lies between two looks at what is expected: what counts is what lies between both and is nearest. It is
    void where they differ by `STEADY` or more, for other work on the machine disturbed it. The median of the tries
    counts, of as few as will do.
    """
    tries: list[dict[str, float]] = []
    before = expected()
    for _ in range(TRIES):
        found, after = taken(), expected()
        if all(1 / STEADY < after[name] / before[name] < STEADY for name in found):
            tries.append({name: nearest(before[name], after[name], s) / s for name, s in found.items()})
            if all(abs(median(ratios[name] for ratios in tries) - 1) < NEAR for name in found):
                return
        before = after
    if not tries:
        pytest.skip(f"the machine's speed changed by a factor of {STEADY} and more in each of {TRIES} tries")
    raise AssertionError(f"expected over taken seconds: {tries}")


def nearest(one: float, other: float, value: float) -> float:
    """To the value, of all that lies between two others."""
    return min(max(value, min(one, other)), max(one, other))
