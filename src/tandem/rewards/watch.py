"""A run whose rewards mostly fail must stop, not train on what is left."""

import logging
from collections import Counter
from collections.abc import Iterable

from tandem.errors import SamplingError
from tandem.types import Score

logger = logging.getLogger("tandem.rewards")

STEPS = 3
"""Steps in a row that must be above the share."""


def kind_of(score: Score) -> str | None:
    """The failure of a score, one that counts as zero included: its detail then opens with the kind."""
    return score.failure or score.detail.partition(":")[0] or None


class FailureWatch:
    """Warns when more than `max_share` of the answers of a step failed, and stops the run when they did in each of
    three steps in a row."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._steps = 0
        self._kinds: Counter[str] = Counter()
        self._first = ""

    def state(self) -> int:
        """Steps in a row above the share so far."""
        return self._steps

    def restore(self, state: int) -> None:
        self._steps = state

    def observe(self, scores: Iterable[Score]) -> None:
        """Take in the scores of one step."""
        scores = list(scores)
        failures = [(kind, score.detail) for score in scores if (kind := kind_of(score)) is not None]
        if len(failures) <= self._max_share * len(scores):
            self._steps, self._first = 0, ""
            self._kinds.clear()
            return
        self._steps += 1
        self._kinds.update(kind for kind, _ in failures)
        self._first = self._first or failures[0][1]
        counts = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
        if self._steps == 1:
            logger.warning(
                "%d of %d rewards of a step failed (%s). The first: %s. Where more than reward.max_failure_share=%g "
                "fail, the run ends after %d steps in a row",
                len(failures),
                len(scores),
                counts,
                self._first,
                self._max_share,
                STEPS,
            )
        if self._steps >= STEPS:
            raise SamplingError(
                f"more than {self._max_share:.0%} of the rewards failed, {STEPS} steps in a row ({counts}). "
                f"The first: {self._first}. Correct the reward function or the data, or raise "
                "reward.timeout_s, reward.memory_mb or reward.max_failure_share"
            )
