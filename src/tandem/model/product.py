"""Products with weights on a CPU: by oneDNN where PyTorch's own would leave a part of the CPU idle.

PyTorch multiplies float32 matrices with MKL, which takes its AVX-512 kernels on Intel's CPUs only, where it is the
faster one. oneDNN, which PyTorch carries for short types, takes them on all. It also takes weights that were laid out
before, as MKL does at every product anew, and then keeps several threads busy with the few rows of a decoding step.
On Intel's CPUs with AVX-512 MKL is the faster one there too, once weights lie in its order. Both compute in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import linear, silu

from tandem.device import idle_vectors, wide_vectors

LEAST = 2**21
"""Multiplications below which a call of oneDNN costs more than it saves."""
FEW = 8
"""Rows below which weights are not laid out anew: reading them is then all there is to a product."""


class Product(torch.autograd.Function):
    """x weight' + bias, or what is known of it already, and its gradients; by oneDNN where that is faster."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, known: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _onednn(x, weight_OI, bias_O) if known is None else known.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        dx = dweight_OI = dbias_O = None
        dy_NO, x_NI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        quick = _quick(x, weight_OI)
        times = _onednn if quick else linear
        if ctx.needs_input_grad[0]:
            dx = times(dy_NO, weight_OI.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            # oneDNN's kernel is faster the wider its second factor.
            wide = quick and len(weight_OI) > weight_OI.shape[1]
            dweight_OI = times(x_NI.t(), dy_NO.t()).t() if wide else times(dy_NO.t(), x_NI.t())
        if ctx.needs_input_grad[2]:
            dbias_O = dy_NO.sum(0)
        return dx, dweight_OI, dbias_O, None


class Linear(nn.Linear):
    """As `torch.nn.Linear`, with the faster product where there is one."""

    given: Tensor | None = None
    """[N, out] What it makes of the input to come, where that is known: it is not computed again."""

    def forward(self, x: Tensor) -> Tensor:
        if self.given is None:
            return product(x, self.weight, self.bias)
        return Product.apply(x, self.weight, self.bias, self.given)


def quicken(network: nn.Module) -> None:
    """Give every plain linear layer of a network on this CPU the faster product; nothing where there is none."""
    if idle_vectors():
        for layer in network.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Linear


def laid_out(weight_OI: Tensor, rows: int) -> Tensor:
    """A copy of the weight for many products with about so many rows, where that is faster; else the weight itself.
    The copy knows nothing of later changes."""
    plain = type(weight_OI) in (Tensor, nn.Parameter) and weight_OI.device.type == "cpu"
    parallel = wide_vectors() or (torch.get_num_threads() > 1 and torch.backends.mkldnn.is_available())
    if not plain or weight_OI.dtype != torch.float32 or rows < FEW or not parallel:
        return weight_OI
    if wide_vectors() and not idle_vectors():
        return weight_OI.detach().t().contiguous().t()
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), rows)


def product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x weight' + bias over the last dimension of x."""
    if not _quick(x, weight_OI):
        return linear(x, weight_OI, bias_O)
    if torch.is_grad_enabled():
        return Product.apply(x, weight_OI, bias_O, None)
    return _onednn(x, weight_OI, bias_O)


def added(residual_NO: Tensor, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """residual + x weight', without gradient."""
    if not _quick(x_NI, weight_OI):
        return torch.addmm(residual_NO, x_NI, weight_OI.t())
    return torch.ops.mkldnn._linear_pointwise.binary(x_NI, residual_NO, weight_OI, None, "add")


def gated(x_NI: Tensor, gate_OI: Tensor, up_OI: Tensor) -> Tensor:
    """silu(x gate') * (x up'), without gradient."""
    if not _quick(x_NI, gate_OI):
        return silu(linear(x_NI, gate_OI)) * linear(x_NI, up_OI)
    opened_NO = torch.ops.mkldnn._linear_pointwise(x_NI, gate_OI, None, "swish", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x_NI, opened_NO, up_OI, None, "mul")


def _quick(x: Tensor, weight_OI: Tensor) -> bool:
    """The weight was laid out for it, or both are plain float32 tensors on a CPU where it pays, and enough of them."""
    if weight_OI.is_mkldnn:
        return True
    if x.dtype != torch.float32 or weight_OI.dtype != torch.float32 or x.device.type != "cpu":
        return False
    plain = type(x) is Tensor and type(weight_OI) in (Tensor, nn.Parameter)
    return plain and x.numel() * len(weight_OI) >= LEAST and idle_vectors()


def _onednn(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
