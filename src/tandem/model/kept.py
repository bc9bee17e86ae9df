"""What sampling computed and the update after it needs again: outputs of linear layers, a line for each token.

Until the weights change, the forward pass of an update is the one that sampling has made. On a CPU products are most of
it, so as many of them as there is memory for are kept, and given to the layers instead of being computed once more.
What lies between them, and every gradient, is computed as ever.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tandem.model.attention import Branches, Rows
from tandem.model.product import Linear


class Table:
    """The outputs of plain linear layers that read the same input."""

    def __init__(self, layers: Sequence[nn.Linear], *, head: bool = False) -> None:
        self.layers, self.head = layers, head
        for layer in layers:
            layer.__class__ = Linear
        self.sizes = [layer.out_features for layer in layers]
        self.worth = layers[0].in_features
        """Multiplications that each number in it saves."""
        self.line_bytes = sum(self.sizes) * layers[0].weight.element_size()
        self.lines_NO = torch.empty(0, sum(self.sizes))

    @property
    def products(self) -> int:
        """Multiplications for a line."""
        return self.worth * sum(self.sizes)

    def stretch(self, lines: int) -> None:
        """Hold so many lines, of unknown content. Memory is taken as they are written."""
        if len(self.lines_NO) < lines:
            self.lines_NO = torch.empty(lines, sum(self.sizes))

    def give(self, line_N: Tensor) -> None:
        """The next outputs of the layers are these lines."""
        parts_NO = self.lines_NO.index_select(0, line_N).split(self.sizes, -1)
        for layer, part_NO in zip(self.layers, parts_NO, strict=True):
            layer.given = part_NO


def worthiest(tables: Sequence[tuple[int, int]], limit: int) -> list[int]:
    """Which of the tables with this (worth, bytes) are kept in `limit` bytes: the worthiest that still have room."""
    found, left = [], limit
    for index, (_, size) in sorted(enumerate(tables), key=lambda each: -each[1][0]):
        if size <= left:
            left -= size
            found.append(index)
    return found


class Kept:
    """Tables of a model in float32 on a CPU, of at most `limit` bytes together, for one step at a time."""

    def __init__(self, tables: Sequence[Table], limit: int) -> None:
        self.limit = limit
        self._tables = tables
        self._open: dict[nn.Module, Table] = {}
        self._room = self._used = 0
        self._place: slice | Tensor | None = None
        self._line_of: dict[tuple[int, ...], Tensor] = {}
        self.spared = 0.0
        """Of the products of a forward pass, the share that an update was given since room was made."""

    def open(self, lines: int) -> bool:
        """Make room for so many lines more, in the tables that are worth most; False where there is none."""
        if self._used:
            return self._used + lines <= self._room
        self.spared = 0.0
        # Beside the one for rows that are done.
        tables = worthiest([(t.worth, t.line_bytes * (lines + 1)) for t in self._tables], self.limit)
        self._open = {self._tables[i].layers[0]: self._tables[i] for i in tables}
        for table in self._open.values():
            table.stretch(lines + 1)
        self._room = lines
        return bool(self._open)

    def begin(self, live: Sequence[bool]) -> list[int] | None:
        """The lines of the tokens that are computed next, of which those that are not live share one that says nothing;
        None where no lines are left."""
        first, count, self._place = self._used, sum(live), None
        if first + count > self._room:
            return None
        self._used += count
        if count == len(live):
            self._place = slice(first, self._used)
            return list(range(first, self._used))
        fresh = iter(range(first, self._used))
        lines = [next(fresh) if alive else self._room for alive in live]
        self._place = torch.tensor(lines)
        return lines

    def narrow(self, index_M: Tensor) -> None:
        """Only these of the tokens, all live, go on to the output head."""
        if isinstance(self._place, slice):
            self._place = self._place.start + index_M

    def end(self) -> None:
        """What is computed from now on is not kept."""
        self._place = None

    def put(self, layer: nn.Module, y_NO: Tensor) -> None:
        """What this layer, with those that share its table, made of the tokens that are computed."""
        if self._place is not None and (table := self._open.get(layer)):
            table.lines_NO[self._place] = y_NO

    def note(self, tokens: tuple[int, ...], lines: Sequence[int]) -> None:
        """Where the tokens of a row are, but for its last one: nothing depends on what the layers make of that."""
        self._line_of[tokens] = torch.tensor([*lines, lines[-1]])

    def forget(self) -> None:
        """The weights change, or a step is over."""
        self._line_of, self._used = {}, 0

    @contextmanager
    def given(
        self, tokens_BT: Tensor, length_B: Tensor, layout: Rows | Branches, head_M: Tensor | None
    ) -> Iterator[None]:
        """Inside, a forward pass over these rows gets what is kept of it, if that is there for all. `head_M` are
        the places in the line that the output head runs for, where that is done at once."""
        rows = (tuple(row[:end]) for row, end in zip(tokens_BT.tolist(), length_B.tolist(), strict=True))
        lines = [self._line_of.get(row) for row in rows] if self._line_of else [None]
        known = [line_T for line_T in lines if line_T is not None]
        tables = [table for table in self._open.values() if head_M is not None or not table.head]
        if len(known) < len(lines):
            tables = []
        try:
            if tables:
                self.spared = sum(t.products for t in tables) / sum(t.products for t in self._tables)
                line_N = layout.line(nn.utils.rnn.pad_sequence(known, batch_first=True))
                for table in tables:
                    table.give(line_N if head_M is None or not table.head else line_N[head_M])
            yield
        finally:
            for layer in (layer for table in tables for layer in table.layers):
                layer.given = None
