"""Whether seconds are near those that were expected, on a machine whose speed changes while one looks."""

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median

import pytest

NEAR, STEADY = 0.2, 1.18
LEAST, MOST, PATIENCE_S = 3, 5, 400.0
"""Tries that it takes to say that something is wrong, tries at most, and seconds within which one begins."""


def assert_near(
    expected: Callable[[], Mapping[str, float]], taken: Callable[[], Mapping[str, float]]
) -> None:
    """Expected over taken seconds, of each name that is taken, differ from 1 by less than `NEAR`.

    That holds where a first try is near what was expected just before it. Otherwise each try lies between two looks at
    what is expected: what counts is what lies between both and is nearest. It is void where they differ by `STEADY` or
    more, for other work on the machine disturbed it. The median of the tries counts, of as few as will do. Skips where
    fewer than `LEAST` were not void.
    """
    began, tries = time.monotonic(), []
    before = expected()
    for number in range(MOST):
        if time.monotonic() - began > PATIENCE_S:
            break
        found = taken()
        if number == 0 and near(before[name] / seconds for name, seconds in found.items()):
            return
        after = expected()
        if all(1 / STEADY < after[name] / before[name] < STEADY for name in found):
            tries.append({name: nearest(before[name], after[name], s) / s for name, s in found.items()})
            if near(median(ratios[name] for ratios in tries) for name in found):
                return
        before = after
    if len(tries) < LEAST:
        pytest.skip(f"{len(tries)} tries on a steady machine, which do not tell: {tries}")
    raise AssertionError(f"expected over taken seconds: {tries}")


def near(ratios: Iterable[float]) -> bool:
    return all(abs(ratio - 1) < NEAR for ratio in ratios)


def nearest(one: float, other: float, value: float) -> float:
    """To the value, of all that lies between two others."""
    return min(max(value, min(one, other)), max(one, other))
