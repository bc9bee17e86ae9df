"""The decoder of Qwen2, Qwen3 and Llama written out for sampling: few operations, on the model's own weights.

Weights that read the same input lie side by side in one storage, each a parameter of its own as before; so one
product does the work of three, and an optimizer that changes them in place changes nothing else. On a CPU they may be
laid out anew for the time of sampling.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import LlamaModel, Qwen2Model, Qwen3Model

from tandem.model.attention import Layout
from tandem.model.kept import Kept, Table
from tandem.model.language_model import LanguageModel
from tandem.model.product import Linear, added, gated, laid_out, product

FUSED = (Qwen2Model, Qwen3Model, LlamaModel)
ROTATIONS = ("default", "linear", "llama3")
"""Rotary embeddings whose angles depend on the position alone."""


class Forward(Protocol):
    """What sampling asks of a `LanguageModel`."""

    def hidden(self, tokens_N: Tensor, position_N: Tensor, layout: Layout) -> Tensor:
        """[N, hidden] after the last layer, for a line of tokens."""
        ...

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] in float32."""
        ...


def sampling_forward(model: LanguageModel, positions: int, rows: int, kept: Kept | None = None) -> Forward:
    """The fastest forward without gradient for rows of at most `positions` tokens, about so many at once; the model's
    own if unknown. On a CPU it may see no change of the weights that comes later. With `kept`, of the same model, it
    puts there what its layers make."""
    return Fused(model, positions, rows, kept) if is_known(model) else model


def is_known(model: LanguageModel) -> bool:
    """Whether its decoder is one that is written out here."""
    decoder = model.decoder
    return isinstance(decoder, FUSED) and decoder.rotary_emb.rope_type in ROTATIONS


def kept_of(model: LanguageModel, limit: int) -> Kept | None:
    """Room for so many bytes of what the model's layers make, where `sampling_forward` can keep it and training be
    given it: None for other decoders and devices, for short types and adapters."""
    if not is_known(model) or model.device.type != "cpu" or model.network.dtype != torch.float32:
        return None
    groups = [group for layer in model.decoder.layers for group in _inputs(layer)]
    if not all(is_plain(layer) for group in groups for layer in group):
        return None
    tables = [Table(group) for group in groups]
    if joins(model.head):
        tables.append(Table([model.head], head=True))
    return Kept(tables, limit)


def _inputs(layer: nn.Module) -> list[list[nn.Module]]:
    """The linear layers of one of a decoder's, those that read the same input together."""
    attn, mlp = layer.self_attn, layer.mlp
    return [
        [attn.q_proj, attn.k_proj, attn.v_proj],
        [attn.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


class Fused:
    """A decoder's layers with joined projections; adapters run as they are."""

    def __init__(self, model: LanguageModel, positions: int, rows: int, kept: Kept | None = None) -> None:
        self.model, self.decoder, self.kept = model, model.decoder, kept
        decoder = self.decoder
        head_norms, silu = isinstance(decoder, Qwen3Model), decoder.config.hidden_act in ("silu", "swish")
        self.layers = [_Layer(layer, head_norms, silu, rows, kept) for layer in decoder.layers]
        self.head = laid_out(model.head.weight, rows) if joins(model.head) else None
        embedding = decoder.embed_tokens.weight
        place_T = torch.arange(positions, device=embedding.device)
        cos_1TD, sin_1TD = decoder.rotary_emb(embedding[:1, None], place_T[None])
        half = cos_1TD.shape[-1] // 2
        # The rotation of (x1, x2) is (x1, x2) cos + (-x2, x1) sin: the sign is put into the sine.
        sign_D = torch.ones_like(sin_1TD[0, 0]).index_fill_(0, torch.arange(half, device=sin_1TD.device), -1)
        self._cos_T1D, self._sin_T1D = cos_1TD[0, :, None], (sin_1TD[0] * sign_D)[:, None]

    def hidden(self, tokens_N: Tensor, position_N: Tensor, layout: Layout) -> Tensor:
        cos_N1D = self._cos_T1D.index_select(0, position_N)
        sin_N1D = self._sin_T1D.index_select(0, position_N)
        hidden_NH = self.decoder.embed_tokens(tokens_N)
        for index, layer in enumerate(self.layers):
            hidden_NH = layer.attention(index, hidden_NH, cos_N1D, sin_N1D, layout)
            hidden_NH = layer.feed_forward(hidden_NH)
        return norm(self.decoder.norm, hidden_NH)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        logits_NV = self.model.logits(hidden_NH) if self.head is None else product(hidden_NH, self.head)
        if self.kept is not None:
            self.kept.put(self.model.head, logits_NV)
        return logits_NV


class _Layer:
    def __init__(self, layer: nn.Module, head_norms: bool, silu: bool, rows: int, kept: Kept | None) -> None:
        self.layer, self.attn, self.mlp = layer, layer.self_attn, layer.mlp
        self.into_heads = _Joined([self.attn.q_proj, self.attn.k_proj, self.attn.v_proj], rows, kept)
        self.out, self.down = _Onto(self.attn.o_proj, rows, kept), _Onto(self.mlp.down_proj, rows, kept)
        gate, up = self.mlp.gate_proj, self.mlp.up_proj
        self.into_gates = None if kept is None else _Joined([gate, up], rows, kept)
        self.joins_gate = kept is None and joins(gate) and joins(up) and silu
        if self.joins_gate:
            self.gate, self.up = laid_out(gate.weight, rows), laid_out(up.weight, rows)
        self.dim = self.attn.head_dim
        self.key_heads = self.into_heads.sizes[1] // self.dim
        self.query_heads = self.into_heads.sizes[0] // self.dim
        self.head_norms = head_norms

    def attention(self, index: int, x_NH: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, layout: Layout) -> Tensor:
        joined_NH = self.into_heads(norm(self.layer.input_layernorm, x_NH))
        heads_NHD = joined_NH.view(len(x_NH), -1, self.dim)
        turned_NHD, v_NHD = heads_NHD.split((self.query_heads + self.key_heads, self.key_heads), dim=1)
        if self.head_norms:
            q_NHD, k_NHD = turned_NHD.split((self.query_heads, self.key_heads), dim=1)
            turned_NHD = torch.cat([norm(self.attn.q_norm, q_NHD), norm(self.attn.k_norm, k_NHD)], dim=1)
        turned_NHD = turned_NHD * cos_N1D + turned_NHD.roll(self.dim // 2, -1) * sin_N1D
        q_NHD, k_NHD = turned_NHD.split((self.query_heads, self.key_heads), dim=1)
        out_NHD = layout.attend(
            index, q_NHD.transpose(0, 1), k_NHD.transpose(0, 1), v_NHD.transpose(0, 1), self.attn.scaling
        )
        return self.out(x_NH, out_NHD.reshape(len(x_NH), -1))

    def feed_forward(self, x_NH: Tensor) -> Tensor:
        normed_NH = norm(self.layer.post_attention_layernorm, x_NH)
        if self.joins_gate:
            inner_NF = gated(normed_NH, self.gate, self.up)
        elif self.into_gates is not None:
            gate_NF, up_NF = self.into_gates(normed_NH).chunk(2, dim=-1)
            inner_NF = self.mlp.act_fn(gate_NF).mul_(up_NF)
        else:
            inner_NF = self.mlp.act_fn(self.mlp.gate_proj(normed_NH)) * self.mlp.up_proj(normed_NH)
        return self.down(x_NH, inner_NF)


class _Joined:
    """Linear layers that read the same input, as one product where all of them are plain."""

    def __init__(self, layers: list[nn.Module], rows: int, kept: Kept | None) -> None:
        self.layers, self.kept = layers, kept
        self.sizes = [int(layer.out_features) for layer in layers]
        self.plain = all(map(is_plain, layers))
        if self.plain:
            self.weight = laid_out(joined([layer.weight for layer in layers]), rows)
            self.bias = None if layers[0].bias is None else joined([layer.bias for layer in layers])

    def __call__(self, x_NH: Tensor) -> Tensor:
        if not self.plain:
            return torch.cat([layer(x_NH) for layer in self.layers], dim=-1)
        y_NO = product(x_NH, self.weight, self.bias)
        if self.kept is not None:
            self.kept.put(self.layers[0], y_NO)
        return y_NO


class _Onto:
    """residual + layer(x)"""

    def __init__(self, layer: nn.Module, rows: int, kept: Kept | None) -> None:
        self.layer, self.kept = layer, kept
        self.weight = laid_out(layer.weight, rows) if joins(layer) else None

    def __call__(self, residual_NH: Tensor, x_NF: Tensor) -> Tensor:
        if self.weight is not None and self.kept is None:
            return added(residual_NH, x_NF, self.weight)
        y_NH = self.layer(x_NF) if self.weight is None else product(x_NF, self.weight)
        if self.kept is not None:
            self.kept.put(self.layer, y_NH)
        return residual_NH + y_NH


def joined(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor of which the parameters are slices along the first dimension, from now on if not already."""
    first = parameters[0]
    rows = [len(p) for p in parameters]
    if not _adjacent(parameters):
        # Under inference mode the new storage would be of no use to training.
        with torch.inference_mode(False), torch.no_grad():
            for parameter, part in zip(parameters, torch.cat([p.detach() for p in parameters]).split(rows)):
                parameter.data = part
    return first.detach().as_strided((sum(rows), *first.shape[1:]), first.stride())


def _adjacent(parameters: list[nn.Parameter]) -> bool:
    """They lie in one storage, one right behind the other."""
    storage, place = parameters[0].untyped_storage().data_ptr(), parameters[0].data_ptr()
    for parameter in parameters:
        if (parameter.untyped_storage().data_ptr(), parameter.data_ptr()) != (storage, place):
            return False
        place += parameter.numel() * parameter.element_size()
    return True


# In short types every operation rounds: there the module's own ones are kept, so that sampler and trainer agree.


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    if x.dtype != torch.float32:
        return module(x)
    return rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def joins(layer: nn.Module) -> bool:
    """A plain product without bias in float32, with which other operations can be made one."""
    return is_plain(layer) and layer.bias is None and layer.weight.dtype == torch.float32


def is_plain(layer: nn.Module) -> bool:
    """A linear layer without adapter, its weight whole on this device."""
    return type(layer) in (nn.Linear, Linear) and type(layer.weight.data) is Tensor
