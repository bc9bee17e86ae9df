"""The order in which questions are taken: every one once per epoch, resumable from three numbers.

An epoch's order is computed anew from (seed, epoch), so a checkpoint need not hold it.
"""

import random
from collections.abc import Mapping

from tandem.errors import DataError


class Cursor:
    """Walks over the indices of `size` questions, epoch after epoch."""

    def __init__(self, size: int, seed: int = 0, shuffle: bool = True) -> None:
        if size < 1:
            raise DataError(f"a cursor needs at least one question, got {size}")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.epoch = self.index = 0
        self._order = self._order_of(0)

    def take(self, count: int) -> list[int]:
        """The next so many indices; where an epoch ends, the next one begins."""
        if count < 0:
            raise ValueError(f"cannot take {count} questions")
        taken: list[int] = []
        while len(taken) < count:
            if self.index == self.size:
                self._go_to(self.epoch + 1, 0)
            more = self._order[self.index : self.index + count - len(taken)]
            self.index += len(more)
            taken += more
        return taken

    def state(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "index": self.index,
            "size": self.size,
            "shuffle": int(self.shuffle),
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where `state()` was taken; in constant time however many questions were used."""
        if state["size"] != self.size:
            raise DataError(
                f"the checkpoint was made with {state['size']:,} questions and data.train now gives "
                f"{self.size:,}: the data, data.limit or data.max_prompt_tokens changed; undo the change, or "
                "start a new run"
            )
        if not 0 <= state["index"] <= self.size or state["epoch"] < 0:
            raise DataError(f"the checkpoint's place in the data is impossible: {dict(state)}")
        self.seed, self.shuffle = state["seed"], bool(state["shuffle"])
        self._go_to(state["epoch"], state["index"])

    def _go_to(self, epoch: int, index: int) -> None:
        self.epoch, self.index = epoch, index
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> list[int]:
        """Sorted by random keys: Python keeps `random()` the same in all versions, but not `shuffle()`."""
        if not self.shuffle:
            return list(range(self.size))
        draw = random.Random((self.seed << 32) + epoch).random
        keys = [draw() for _ in range(self.size)]
        return sorted(range(self.size), key=keys.__getitem__)
