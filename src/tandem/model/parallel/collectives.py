"""Collectives with gradients. In each, what a process returns and what the loss of every process depends on are the
same, so a gradient is either a process's own part or the same everywhere; the names say which direction changes it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from tandem.model.parallel.grid import Axis


class _Enter(Function):
    """Nothing; the gradient is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return summed(gradient, ctx.axis), None


class _Leave(Function):
    """The sum; its gradient goes to each as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return summed(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(Function):
    """Parts end to end along the first dimension; the gradient is summed and cut again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gathered(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return scattered(gradient, ctx.axis), None


class _Scatter(Function):
    """The sum, cut along the first dimension; the gradient's parts are put end to end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return scattered(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gathered(gradient, ctx.axis), None


class _Exchange(Function):
    """Part i of the first dimension goes to process i; its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return exchanged(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return exchanged(gradient, ctx.axis), None


def enter(x: Tensor, axis: Axis) -> Tensor:
    """Into a part that is split over the axis: `x`, the same everywhere, is used in a different way by each."""
    return _Enter.apply(x, axis)


def leave(x: Tensor, axis: Axis) -> Tensor:
    """Out of it: the sum of what each has, the same everywhere."""
    return _Leave.apply(x, axis)


def gather(x: Tensor, axis: Axis) -> Tensor:
    """Like `enter`, where each holds one part of `x` along the first dimension."""
    return _Gather.apply(x, axis)


def scatter(x: Tensor, axis: Axis) -> Tensor:
    """Like `leave`, where each keeps one part of the sum along the first dimension."""
    return _Scatter.apply(x, axis)


def exchange(x: Tensor, axis: Axis) -> Tensor:
    """[size, ...] -> [size, ...]: entry i goes to process i, and entry i of the result came from it."""
    return _Exchange.apply(x, axis)


def summed(x: Tensor, axis: Axis) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=axis.group)
    return out


def gathered(x: Tensor, axis: Axis) -> Tensor:
    out = x.new_empty(len(x) * axis.size, *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=axis.group)
    return out


def scattered(x: Tensor, axis: Axis) -> Tensor:
    out = x.new_empty(len(x) // axis.size, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=axis.group)
    return out


def exchanged(x: Tensor, axis: Axis) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=axis.group)
    return out
