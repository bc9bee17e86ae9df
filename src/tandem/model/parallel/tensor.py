"""Tensor parallelism: attention heads, the MLP's width and the vocabulary split over processes (Megatron-LM, arXiv
1909.08053), with what lies between them split along the tokens if so wished (arXiv 2205.05198).

Which linear layers are split, and how, is the plan that Transformers models carry. Weights become plain tensors of
this process's part, so adapters and the attention hook see an ordinary, narrower layer.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from tandem.errors import ConfigError
from tandem.model.adapter import is_adapted
from tandem.model.head import gives_values, head_of
from tandem.model.parallel.collectives import enter, gather, leave, scatter
from tandem.model.parallel.grid import Axis

COLUMN, ROW = "colwise", "rowwise"
ASIDE = {"replicated_with_grad_allreduce", "replicate", "sequence_parallel", "embedding_rowwise"}
"""Styles of a plan that leave the weight whole, and that of the embedding, which is split here in any case."""
EXPERTS = ".experts"
"""In the patterns of a mixture's experts, which the expert axis splits: each process of the tensor axis has the same
ones, for the tokens that lie with it between the split parts."""


def styles(config: PreTrainedConfig) -> dict[str, str]:
    """Of the model's plan, how each pattern of layers is to be cut."""
    plan = config.base_model_tp_plan or {}
    return {
        pattern: style for pattern, style in plan.items() if style not in ASIDE and EXPERTS not in pattern
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What of a weight a process of the tensor axis has."""

    dim: int | None = None
    """The dimension it is cut along; None where each has all of it."""
    summed: bool = False
    """Each process sees only a part of its gradient."""
    expert: bool = False
    """Cut over the expert axis, not over the tensor axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """How activations get into and out of the split parts of a layer; both are [1, tokens, hidden]."""

    axis: Axis
    sequence: bool

    def into(self, x_1NH: Tensor) -> Tensor:
        return gather(x_1NH[0], self.axis)[None] if self.sequence else enter(x_1NH, self.axis)

    def out(self, x_1NH: Tensor) -> Tensor:
        return scatter(x_1NH[0], self.axis)[None] if self.sequence else leave(x_1NH, self.axis)


def split(
    module: nn.Module, network: PreTrainedModel, axis: Axis, sequence: bool, where: str
) -> dict[str, Part]:
    """Cut the weights of `network`, which stands inside `module`, and make its forward pass join the parts.

    Returns what became of each parameter of `module`. Weights may be without storage (meta device).
    """
    if axis.size == 1:
        return {name: Part() for name, _ in module.named_parameters()}
    table, head = network.get_input_embeddings(), head_of(network)
    if is_adapted(table) or is_adapted(head) or head.bias is not None:
        raise ConfigError(
            f"{where}.tensor={axis.size}: embedding and output head with an adapter or a bias cannot be split; "
            "leave them out of model.lora.targets, or use shard instead"
        )
    decoder, edges, scissors = network.get_decoder(), Edges(axis=axis, sequence=sequence), _Scissors(axis)
    blocks = set()
    for path, style in linear_layers(decoder):
        layer = decoder.get_submodule(path)
        scissors.cut_linear(layer, column=style == COLUMN)
        if style == ROW:
            layer.register_forward_hook(partial(_join, edges))
        blocks.add(path.rpartition(".")[0])
    for path in blocks:
        decoder.get_submodule(path).register_forward_pre_hook(partial(_enter_block, edges), with_kwargs=True)
    scissors.cut(table, "weight", 0)
    table.forward = partial(_look_up, table, edges)
    if gives_values(network):
        _split_value(head, scissors, where)
    else:
        scissors.cut(head, "weight", 0)
    decoder.register_forward_hook(partial(_leave_decoder, edges))
    split_blocks = {id(decoder.get_submodule(path)) for path in blocks}
    inside = tuple(f"{name}." for name, inner in module.named_modules() if id(inner) in split_blocks)
    return {
        name: Part(
            dim=scissors.dims.get(id(weight)),
            summed=id(weight) not in scissors.dims and (sequence or name.startswith(inside)),
        )
        for name, weight in module.named_parameters()
    }


def linear_layers(decoder: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Path below the decoder and style of every layer that the model's plan splits."""
    patterns = {
        re.compile(pattern.replace(".", r"\.").replace("*", r"\d+")): style
        for pattern, style in styles(decoder.config).items()
    }
    for path, _ in decoder.named_modules():
        for expression, style in patterns.items():
            if expression.fullmatch(path):
                yield path, style


class _Scissors:
    """Replaces weights by this process's part of them."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.dims: dict[int, int] = {}
        """Dimension of each cut weight, by its identity."""
        self._made: dict[int, nn.Parameter] = {}
        self._whole: list[nn.Parameter] = []

    def cut(self, module: nn.Module, name: str, dim: int) -> None:
        """Cut a weight; one that two modules share stays shared."""
        whole = module.get_parameter(name)
        if id(whole) in self.dims:
            return
        if id(whole) not in self._made:
            part = whole.detach().chunk(self.axis.size, dim)[self.axis.rank].clone()
            self._made[id(whole)] = nn.Parameter(part, requires_grad=whole.requires_grad)
            # Kept alive, or another could take its identity.
            self._whole.append(whole)
            self.dims[id(self._made[id(whole)])] = dim
        setattr(module, name, self._made[id(whole)])

    def cut_linear(self, layer: nn.Module, *, column: bool) -> None:
        """A linear layer, or the adapted one that stands for it."""
        if is_adapted(layer):
            # Of the two factors, the one that meets the split side of the layer is split.
            for factor in (layer.lora_B if column else layer.lora_A).values():
                self.cut_linear(factor, column=column)
            layer = layer.get_base_layer()
        self.cut(layer, "weight", 0 if column else 1)
        if column and layer.bias is not None:
            self.cut(layer, "bias", 0)
        layer.out_features, layer.in_features = layer.weight.shape


def _enter_block(
    edges: Edges, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before attention and MLP, whose first layers are split by columns."""
    if args:
        return (edges.into(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": edges.into(kwargs["hidden_states"])}


def _join(edges: Edges, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """After a layer split by rows. Each process has added the whole bias."""
    bias = (layer.get_base_layer() if is_adapted(layer) else layer).bias
    if bias is not None:
        output = output + bias * (1 / edges.axis.size - 1)
    return edges.out(output)


def _look_up(table: nn.Embedding, edges: Edges, tokens_1N: Tensor) -> Tensor:
    """Embeddings of all tokens from a table of which each process has some rows."""
    start = edges.axis.rank * len(table.weight)
    row_1N = tokens_1N - start
    absent_1N = (row_1N < 0) | (row_1N >= len(table.weight))
    padding = None if table.padding_idx is None else table.padding_idx - start
    if padding is not None and not 0 <= padding < len(table.weight):
        padding = None
    found_1NH = embedding(row_1N.masked_fill(absent_1N, 0), table.weight, padding_idx=padding)
    return edges.out(found_1NH.masked_fill(absent_1N[..., None], 0))


def _split_value(head: nn.Linear, scissors: "_Scissors", where: str) -> None:
    """A head with one output is cut along its input."""
    axis = scissors.axis
    if head.in_features % axis.size:
        raise ConfigError(
            f"{where}.tensor={axis.size} does not divide the model's hidden_size={head.in_features}; use shard instead"
        )
    scissors.cut(head, "weight", 1)
    head.forward = partial(_value, head, axis)


def _value(head: nn.Linear, axis: Axis, hidden_NH: Tensor) -> Tensor:
    """[N, 1] from each process's part of the hidden state."""
    width = head.weight.shape[1]
    return leave(linear(hidden_NH.narrow(-1, axis.rank * width, width), head.weight), axis)


def _leave_decoder(
    edges: Edges, decoder: nn.Module, args: tuple[Any, ...], output: ModelOutput
) -> ModelOutput:
    """Every process's part of the output head needs all tokens."""
    output["last_hidden_state"] = edges.into(output["last_hidden_state"])
    return output


def chosen_logprobs(
    logits_MV: Tensor, chosen_M: Tensor, axis: Axis, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of the chosen token and the entropy in nats, the same everywhere, where V is this process's
    part of the vocabulary."""
    top_M = logits_MV.detach().amax(-1)
    dist.all_reduce(top_M, op=dist.ReduceOp.MAX, group=axis.group)
    shifted_MV = logits_MV - top_M[:, None]
    mass_MV = shifted_MV.exp()
    column_M = chosen_M - axis.rank * logits_MV.shape[1]
    absent_M = (column_M < 0) | (column_M >= logits_MV.shape[1])
    own_M = (
        shifted_MV.gather(-1, column_M.masked_fill(absent_M, 0)[:, None]).squeeze(-1).masked_fill(absent_M, 0)
    )
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        weighted_M = torch.linalg.vecdot(mass_MV, shifted_MV)
    mass_M, weighted_M, score_M = leave(torch.stack([mass_MV.sum(-1), weighted_M, own_M]), axis)
    entropy_M = mass_M.log() - weighted_M / mass_M
    return score_M - mass_M.log(), entropy_M if entropy_gradient else entropy_M.detach()


def whole_shape(weight: Tensor, part: Part, size: int) -> torch.Size:
    """The shape of the weight that a process of the axis has a part of."""
    return torch.Size(n * size if dim == part.dim else n for dim, n in enumerate(weight.shape))


def sum_parts(gradients: Mapping[str, Tensor], parts: Mapping[str, Part], axis: Axis) -> None:
    """Complete the gradients of which each process has only a part, in place."""
    found = [gradient for name, gradient in gradients.items() if parts[name].summed]
    if axis.size == 1 or not found:
        return
    flat = torch.cat([gradient.flatten() for gradient in found])
    dist.all_reduce(flat, group=axis.group)
    for gradient, total in zip(found, flat.split([gradient.numel() for gradient in found])):
        gradient.copy_(total.view_as(gradient))
