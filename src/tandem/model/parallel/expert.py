"""Expert parallelism: the experts of a mixture split over processes that see different tokens. Every token travels to
the processes of its experts, and what they make of it travels back (GShard, arXiv 2006.16668); routers stay whole.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor

from tandem.model.mixture import experts_in
from tandem.model.parallel.adapter import holders_in
from tandem.model.parallel.collectives import exchanged
from tandem.model.parallel.grid import Axis, Grid
from tandem.model.parallel.tensor import Part

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""([N, hidden], experts [N, k], their shares [N, k]) -> [N, hidden]."""


def split(module: nn.Module, axis: Axis) -> dict[str, Part]:
    """Keep this process's share of the experts below `module`, and send tokens to where theirs are. Returns what
    became of the parameters that were cut; weights may be without storage (meta device)."""
    if axis.size == 1:
        return {}
    made = set()
    for holder in list(holders_in(module)):
        for owner in list(holder.modules()):
            for name, whole in list(owner.named_parameters(recurse=False)):
                part = nn.Parameter(whole.detach().chunk(axis.size)[axis.rank].clone(), whole.requires_grad)
                setattr(owner, name, part)
                made.add(id(part))
        local = len(part)
        next(experts_in(holder)).num_experts = local
        holder.forward = partial(_travelling, holder.forward, local, axis)
    named = module.named_parameters()
    return {name: Part(dim=0, expert=True) for name, weight in named if id(weight) in made}


def first_row(weight: Tensor, part: Part, grid: Grid) -> int:
    """Which row of the whole weight the first one is that this process has of it."""
    rows = len(weight)
    first = grid.expert.rank * rows if part.expert else 0
    if not isinstance(weight, DTensor):
        return first
    mesh = grid.experts if part.expert else grid.weights
    return first + min(rows, mesh.get_local_rank("shard") * -(-rows // mesh.size(2)))


def _travelling(
    compute: Compute, local: int, axis: Axis, hidden_NH: Tensor, expert_NK: Tensor, share_NK: Tensor
) -> Tensor:
    """What the experts make of the tokens of this process, each weighed by its share; `compute` is what the `local`
    experts here make of any tokens. R are the visits here, M those that this process's tokens make."""
    tokens, choices = expert_NK.shape
    expert_M, order_M = expert_NK.flatten().sort(stable=True)
    to = expert_M.div(local, rounding_mode="floor").bincount(minlength=axis.size)
    sent, received = to.tolist(), exchanged(to, axis).tolist()
    guest_RH = _Travel.apply(hidden_NH[order_M // choices], sent, received, axis)
    choice_R1 = _travelled(expert_M % local, sent, received, axis)[:, None]
    visits = len(guest_RH)
    if not visits:
        # All processes must have a gradient of these weights, if only a zero one: an empty guest brings it.
        guest_RH, choice_R1 = (
            torch.cat([guest_RH, guest_RH.new_zeros(1, guest_RH.shape[1])]),
            to.new_zeros(1, 1),
        )
    made_RH = compute(guest_RH, choice_R1, share_NK.new_ones(choice_R1.shape))[:visits]
    back_MH = _Travel.apply(made_RH, received, sent, axis)
    home_NKH = back_MH[order_M.argsort()].view(tokens, choices, -1)
    return (home_NKH * share_NK[..., None]).sum(1).to(hidden_NH.dtype)


class _Travel(Function):
    """Rows to the processes they belong to: the first `sent[0]` to process 0, and so on; the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.way = received, sent, axis
        return _travelled(x, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _travelled(gradient, *ctx.way), None, None, None


def _travelled(x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out
