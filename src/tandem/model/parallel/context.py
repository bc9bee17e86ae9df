"""Context parallelism: each process holds every c-th token of the line, and during attention every token of a share
of the heads (DeepSpeed-Ulysses, arXiv 2309.14509). Whatever layout attends sees the whole line, so packing and shared
prompts stay as they are."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from tandem.model.attention import Layout
from tandem.model.parallel.collectives import exchange, leave
from tandem.model.parallel.grid import Axis


class Cut:
    """The tokens of a line that this process holds: rank, rank + c, rank + 2c, ... of the line, which is padded
    first so that all hold equally many and `multiple` divides their number."""

    def __init__(self, tokens: int, axis: Axis, multiple: int) -> None:
        self.tokens, self.axis = tokens, axis
        unit = axis.size * multiple
        self.padding = -tokens % unit
        self.size = (tokens + self.padding) // axis.size

    def __call__(self, x_N: Tensor) -> Tensor:
        """[N] -> [n]"""
        return pad(x_N, (0, self.padding))[self.axis.rank :: self.axis.size]

    def mine(self, index_M: Tensor) -> Tensor:
        """Which of the given places of the line are held here."""
        return index_M % self.axis.size == self.axis.rank

    def local(self, index_M: Tensor) -> Tensor:
        """Where held places stand among the n."""
        return index_M // self.axis.size

    def join(self, values_m: Tensor, mine_M: Tensor) -> Tensor:
        """Values of the places held here and elsewhere, [M], the same everywhere."""
        if self.axis.size == 1:
            return values_m
        return leave(values_m.new_zeros(len(mine_M)).masked_scatter(mine_M, values_m), self.axis)


class Ulysses:
    """A layout of the whole line for processes that hold a cut of it."""

    def __init__(self, layout: Layout, cut: Cut) -> None:
        self.layout, self.cut, self.axis = layout, cut, cut.axis

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        """Here N is n, the tokens of the cut, on both sides."""
        tokens, size = self.cut.tokens, self.axis.size
        heads, dim = q_HND.shape[0], q_HND.shape[-1]
        # With fewer key heads than processes each is sent to all that need it.
        copies = size // math.gcd(k_HND.shape[0], size)
        k_HND, v_HND = (x.repeat_interleave(copies, 0) for x in (k_HND, v_HND))
        parts = [x.unflatten(0, (size, -1)) for x in (q_HND, k_HND, v_HND)]
        received_CHnD = exchange(torch.cat(parts, dim=1), self.axis)
        line_HND = received_CHnD.permute(1, 2, 0, 3).flatten(1, 2)[:, :tokens]
        q, k, v = line_HND.split([part.shape[1] for part in parts])
        out_NHD = self.layout.attend(layer, q, k, v, scale)
        padded_NHD = pad(out_NHD, (0, 0, 0, 0, 0, self.cut.padding))
        back_CnHD = padded_NHD.unflatten(0, (-1, size)).transpose(0, 1)
        return exchange(back_CnHD, self.axis).transpose(0, 1).reshape(-1, heads, dim)


class Trimmed:
    """A layout for a line with padding behind it, held whole."""

    def __init__(self, layout: Layout, cut: Cut) -> None:
        self.layout, self.cut = layout, cut

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        tokens = self.cut.tokens
        out_NHD = self.layout.attend(layer, q_HND[:, :tokens], k_HND[:, :tokens], v_HND[:, :tokens], scale)
        return pad(out_NHD, (0, 0, 0, 0, 0, self.cut.padding))


def spread(layout: Layout, cut: Cut) -> Layout:
    """The layout that a cut line needs."""
    if cut.axis.size > 1:
        return Ulysses(layout, cut)
    return Trimmed(layout, cut) if cut.padding else layout
