"""What each Megatron rank holds, in pieces of Hugging Face tensors.

One description serves both directions: written, a rank's tensor is its pieces end to end; read, a Hugging Face
tensor is put together from the pieces of it that the ranks hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tandem.checkpoint.convert.architecture import EMBEDDING, NORM, Architecture
from tandem.checkpoint.convert.experts import expert_names
from tandem.checkpoint.convert.layout import Layout


@dataclass(frozen=True, slots=True)
class Piece:
    """`name[start:stop]` along `dim`; with `zeros`, as many rows of zeros instead."""

    name: str
    start: int
    stop: int
    dim: int = 0
    zeros: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start


Pieces = tuple[Piece, ...]
"""Of one Megatron tensor, end to end along dimension 0; a piece along dimension 1 stands alone."""


def rank_tensors(
    model: Architecture, layout: Layout, rank: tuple[int, int, int]
) -> dict[str, dict[str, Pieces]]:
    """Chunk key -> Megatron name -> pieces, of the file of (tensor, pipeline, expert) rank."""
    tensor, pipeline, expert = rank
    chunks = {}
    for number, layers in enumerate(layout.stages[pipeline]):
        first = pipeline == 0 and number == 0
        last = pipeline == layout.pipeline - 1 and number == layout.virtual - 1
        tensors: dict[str, Pieces] = {}
        if first:
            tensors["embedding.word_embeddings.weight"] = _rows(model, layout, EMBEDDING, tensor)
        for local, layer in enumerate(layers):
            at = f"decoder.layers.{local}"
            tensors |= _attention(model, layout, layer, at, tensor)
            tensors |= _feedforward(model, layout, layer, at, tensor, expert)
        if last:
            tensors["decoder.final_layernorm.weight"] = (Piece(NORM, 0, model.hidden),)
            if model.reward:
                tensors["rm_head.weight"] = (Piece(model.head(), 0, 1),)
            elif not (model.tied and first):
                # The last stage keeps its own copy of a tied embedding.
                tensors["output_layer.weight"] = _rows(model, layout, model.head(), tensor)
        chunks[layout.chunk(number)] = tensors
    return chunks


def shape_of(pieces: Pieces, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the Megatron tensor, from those of the Hugging Face tensors."""
    full = shapes[pieces[0].name]
    if pieces[0].dim == 1:
        return (full[0], pieces[0].size)
    return (sum(piece.size for piece in pieces), *full[1:])


def cut(pieces: Pieces, part: int, parts: int) -> Pieces:
    """The `part`-th of `parts` equal lengths of the line of pieces."""
    length = sum(piece.size for piece in pieces) // parts
    begin, end, at, taken = part * length, (part + 1) * length, 0, []
    for piece in pieces:
        low, high = max(begin - at, 0), min(end - at, piece.size)
        if low < high:
            taken.append(replace(piece, start=piece.start + low, stop=piece.start + high))
        at += piece.size
    return tuple(taken)


def _rows(model: Architecture, layout: Layout, name: str, tensor: int) -> Pieces:
    """A rank's share of the vocabulary, its padding included."""
    whole: Pieces = (Piece(name, 0, model.vocabulary),)
    if layout.vocabulary > model.vocabulary:
        whole = (*whole, Piece(name, 0, layout.vocabulary - model.vocabulary, zeros=True))
    return cut(whole, tensor, layout.tensor)


def _attention(model: Architecture, layout: Layout, layer: int, at: str, tensor: int) -> dict[str, Pieces]:
    norm = "self_attention.linear_qkv.layer_norm_weight" if layout.fused_norms else "input_layernorm.weight"
    source = f"model.layers.{layer}"
    width = model.heads * model.head_dim
    output = Piece(f"{source}.self_attn.o_proj.weight", 0, width, dim=1)
    tensors: dict[str, Pieces] = {
        f"{at}.{norm}": (Piece(f"{source}.input_layernorm.weight", 0, model.hidden),),
        f"{at}.self_attention.linear_proj.weight": cut((output,), tensor, layout.tensor),
    }
    for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
        fused = _fused_qkv(model, f"{source}.self_attn", kind)
        tensors[f"{at}.self_attention.linear_qkv.{kind}"] = cut(fused, tensor, layout.tensor)
    if model.qk_norm:
        for letter in "qk":
            piece = Piece(f"{source}.self_attn.{letter}_norm.weight", 0, model.head_dim)
            tensors[f"{at}.self_attention.{letter}_layernorm.weight"] = (piece,)
    return tensors


def _fused_qkv(model: Architecture, source: str, kind: str) -> Pieces:
    """For each key-value head: the query heads that read it, then its key, then its value."""
    pieces = []
    for group in range(model.groups):
        for letter, heads in (("q", model.heads_per_group), ("k", 1), ("v", 1)):
            size = heads * model.head_dim
            pieces.append(Piece(f"{source}.{letter}_proj.{kind}", group * size, (group + 1) * size))
    return tuple(pieces)


def _feedforward(
    model: Architecture, layout: Layout, layer: int, at: str, tensor: int, expert: int
) -> dict[str, Pieces]:
    sparse = layer in model.expert_layers
    # Transformer Engine does not fuse the norm before a router.
    fused = layout.fused_norms and not sparse
    norm = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
    source = Piece(f"model.layers.{layer}.post_attention_layernorm.weight", 0, model.hidden)
    tensors: dict[str, Pieces] = {f"{at}.{norm}": (source,)}
    if not sparse:
        names = (f"{at}.mlp.linear_fc1.weight", f"{at}.mlp.linear_fc2.weight")
        return tensors | _gated(model.mlp(layer), names, model.feedforward, tensor, layout.tensor)
    tensors[f"{at}.mlp.router.weight"] = (Piece(model.router(layer), 0, model.experts),)
    share = model.experts // layout.expert
    for local in range(share):
        tensors |= _gated(
            model.mlp(layer, expert * share + local),
            expert_names(at, local, layout.experts),
            model.expert_feedforward,
            tensor % layout.expert_tensor,
            layout.expert_tensor,
        )
    return tensors


def _gated(
    sources: tuple[str, str, str], names: tuple[str, str], width: int, part: int, parts: int
) -> dict[str, Pieces]:
    """fc1 is the rank's share of the gate above its share of up; fc2 the same channels of down."""
    gate, up, down = sources
    return {
        names[0]: (*cut((Piece(gate, 0, width),), part, parts), *cut((Piece(up, 0, width),), part, parts)),
        names[1]: cut((Piece(down, 0, width, dim=1),), part, parts),
    }
