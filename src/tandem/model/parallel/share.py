"""Sequences shared out over data ranks so that all have about equally many tokens."""

import heapq
import math

import torch
from torch import Tensor


def shares(length_B: Tensor, prompt_length_B: Tensor, group_B: Tensor, ranks: int) -> list[Tensor]:
    """Row indices of each rank, ascending; every row is in one of them, and a rank may have none.

    Rows of a group stay together, because they share their prompt, unless a group is more than a rank's share, or
    whole groups leave a rank more than a tenth above its share and finer pieces less. The costliest piece goes first,
    always to the rank with the least.
    """
    lengths, prompts = length_B.tolist(), prompt_length_B.tolist()
    members: dict[int, list[int]] = {}
    for row, group in enumerate(group_B.tolist()):
        members.setdefault(group, []).append(row)

    def cost(rows: list[int]) -> int:
        return prompts[rows[0]] + sum(lengths[row] - prompts[row] for row in rows)

    fair = max(1.0, sum(map(cost, members.values())) / ranks)
    best: list[list[int]] = []
    least = math.inf
    for finer in (1, 2, 4):
        pieces: list[list[int]] = []
        for rows in members.values():
            # A quarter above the share is borne, since every piece computes the prompt anew.
            pieces += _pieces(rows, lengths, max(1, math.ceil(finer * cost(rows) / fair - 0.25)))
        dealt, most = _dealt(sorted((-cost(rows), rows) for rows in pieces), ranks)
        if most < least:
            best, least = dealt, most
        if least <= 1.1 * fair:
            break
    return [torch.tensor(sorted(rows), dtype=torch.long) for rows in best]


def _dealt(pieces: list[tuple[int, list[int]]], ranks: int) -> tuple[list[list[int]], int]:
    """The rows of each rank when pieces (their negative cost, their rows) are dealt out in this order, and the cost
    of the rank that has most."""
    out: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for negative, rows in pieces:
        load, rank = heapq.heappop(heap)
        out[rank] += rows
        heapq.heappush(heap, (load - negative, rank))
    return out, max(load for load, _ in heap)


def _pieces(rows: list[int], lengths: list[int], count: int) -> list[list[int]]:
    """The rows in at most `count` pieces of similar length: dealt out longest first, back and forth."""
    order = sorted(rows, key=lambda row: (-lengths[row], row))
    dealt: list[list[int]] = [[] for _ in range(min(count, len(rows)))]
    for i, row in enumerate(order):
        lap, seat = divmod(i, len(dealt))
        dealt[seat if lap % 2 == 0 else -1 - seat].append(row)
    return [sorted(piece) for piece in dealt]
