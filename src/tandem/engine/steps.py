"""One more token for every row: the work of a step, on CUDA captured once per shape and replayed."""

import bisect

from tandem.device import Graph, capture, graph_pool
from tandem.engine.answers import Answers
from tandem.engine.cache import Slots
from tandem.model.fused import Forward

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Numbers of rows that a captured step may have; above the last, its multiples."""
COLUMNS = 128
"""Captured steps see a multiple of so many columns of the answers."""


class Steps:
    """Steps of given answers over a given cache; `look_every` is how many of them pass without word to the host."""

    look_every = 1

    def __init__(self, forward: Forward, slots: Slots, answers: Answers) -> None:
        self.forward, self.slots, self.answers = forward, slots, answers
        self.rows = 0

    def seat(self, lanes: list[int]) -> None:
        """The rows from now on, by the lanes of their prompts."""
        self.rows = len(lanes)
        self.slots.seat(lanes)

    def take(self, columns: int) -> None:
        """A step in which no answer has more than `columns` tokens before it."""
        position_B = self.slots.begin(self.answers.count_B, columns)
        hidden_BH = self.forward.hidden(self.answers.token_B[: self.rows], position_B, self.slots)
        self.answers.add(slice(0, self.rows), self.forward.logits(hidden_BH))


class FixedSteps(Steps):
    """Steps of few different shapes: rows and columns are rounded up, rows that are no answers count as done."""

    look_every = 8

    def seat(self, lanes: list[int]) -> None:
        self.rows = min(bucket(len(lanes)), self.slots.room.slots)
        self.slots.seat(lanes, self.rows)

    def take(self, columns: int) -> None:
        rounded = -(-columns // COLUMNS) * COLUMNS
        self.fixed(min(rounded, self.slots.room.answer_columns))

    def fixed(self, columns: int) -> None:
        """A step of one of the few shapes."""
        super().take(columns)


class CapturedSteps(FixedSteps):
    """The same as CUDA graphs. Weights, cache and answers change in place, so a graph stays valid."""

    def __init__(self, forward: Forward, slots: Slots, answers: Answers) -> None:
        super().__init__(forward, slots, answers)
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._pool = graph_pool()

    def fixed(self, columns: int) -> None:
        shape = (self.rows, columns)
        if shape not in self._graphs:
            self._graphs[shape] = capture(lambda: Steps.take(self, columns), self.answers.state, self._pool)
        self._graphs[shape].replay()


def bucket(rows: int) -> int:
    if rows > BUCKETS[-1]:
        return -(-rows // BUCKETS[-1]) * BUCKETS[-1]
    return BUCKETS[bisect.bisect_left(BUCKETS, rows)]
