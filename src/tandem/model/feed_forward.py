"""The feed-forward of Qwen2, Qwen3, Llama and Mistral, of which an update holds a tensor less for each layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import silu
from transformers import activations
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

GATED = (Qwen2MLP, Qwen3MLP, LlamaMLP, MistralMLP)


class Gate(torch.autograd.Function):
    """silu(gate) * up. PyTorch would hold silu(gate) for the gradient of the product; here it is computed again, to
    the same numbers, from the gate that the gradient of silu needs anyway."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dinner: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        dgate = dup = None
        if ctx.needs_input_grad[0]:
            dgate = torch.ops.aten.silu_backward(dinner * up, gate)
        if ctx.needs_input_grad[1]:
            dup = silu(gate).mul_(dinner)
        return dgate, dup


class FeedForward(nn.Module):
    """As Transformers' own, on the same layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(Gate.apply(self.gate_proj(x), self.up_proj(x)))


def lighten(network: nn.Module) -> None:
    """Give every feed-forward that is known here the one that holds less."""
    for module in network.modules():
        if is_known(module):
            module.__class__ = FeedForward


def is_known(module: nn.Module) -> bool:
    """A feed-forward that opens its gates by silu and does nothing else."""
    return type(module) in GATED and isinstance(module.act_fn, nn.SiLU | activations.SiLUActivation)
