"""Megatron-Core checkpoints: read in any layout as Hugging Face tensors, written tensor by tensor."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tandem.checkpoint.convert.architecture import EMBEDDING, Architecture, check_complete
from tandem.checkpoint.convert.experts import Experts, fused_name, fused_shape, numbered
from tandem.checkpoint.convert.layout import Layout, check_divides
from tandem.checkpoint.convert.plan import Piece, Pieces, rank_tensors, shape_of
from tandem.checkpoint.convert.rank_file import Entry, write_rank
from tandem.checkpoint.convert.ranks import FILE, TRACKER, Rank, Ranks
from tandem.checkpoint.convert.source import Source
from tandem.errors import ConfigError

log = logging.getLogger("tandem.checkpoint")


class Megatron:
    """The tensors of the model as views of the rank files, which stay mapped."""

    def __init__(self, ranks: Ranks, model: Architecture) -> None:
        self.layout = ranks.layout(model)
        try:
            check_divides(model, self.layout)
        except ConfigError as cause:
            raise ConfigError(f"{ranks.folder}: {cause}; is a rank folder missing?") from cause
        self.shapes = model.shapes()
        self._ranks = ranks
        self._parts: dict[str, dict[tuple[int, int], list[tuple[Rank, Tensor]]]] = {}
        self._dim: dict[str, int] = {}
        for rank in self.layout.ranks():
            self._add_rank(rank, model)
        if model.tied:
            self._check_tie()

    def _add_rank(self, rank: Rank, model: Architecture) -> None:
        for key, planned in rank_tensors(model, self.layout, rank).items():
            held = self._ranks.chunks[rank].get(key, {})
            held = numbered(held, model, model.experts // self.layout.expert) if model.experts else dict(held)
            if "rm_head.weight" in planned and "output_layer.weight" in held:
                held["rm_head.weight"] = held.pop("output_layer.weight")
            check_complete(
                f"{self._ranks.paths[rank]} ({key})",
                {name: tuple(tensor.shape) for name, tensor in held.items()},
                {name: shape_of(pieces, self.shapes) for name, pieces in planned.items()},
            )
            for name, pieces in planned.items():
                self._add_pieces(rank, held[name], pieces)

    def _add_pieces(self, rank: Rank, tensor: Tensor, pieces: Pieces) -> None:
        at = 0
        for piece in pieces:
            view = tensor if piece.dim == 1 else tensor.narrow(0, at, piece.size)
            at += piece.size
            if not piece.zeros:
                self._dim[piece.name] = piece.dim
                copies = self._parts.setdefault(piece.name, {})
                copies.setdefault((piece.start, piece.stop), []).append((rank, view))

    def _check_tie(self) -> None:
        """The head's copy of a tied embedding on the last stage must still be one."""
        for copies in self._parts[EMBEDDING].values():
            (_, first), *others = copies
            for rank, other in others:
                if rank[1] != copies[0][0][1] and not torch.equal(first, other):
                    raise ConfigError(
                        f"{self._ranks.paths[rank]}: the output layer is not the embedding, but the config ties "
                        "them; set tie_word_embeddings to false in config.json"
                    )

    def warn_of_unequal_copies(self) -> None:
        """Tensors that several ranks hold should be equal; those of the first rank count. Reads every byte."""
        unequal = [
            name
            for name, parts in self._parts.items()
            for copies in parts.values()
            if any(not torch.equal(copies[0][1], other) for _, other in copies[1:])
        ]
        if unequal:
            log.warning(
                "%s: %d tensors differ between ranks that should hold the same (%s); those of the lowest rank "
                "are taken",
                self._ranks.folder,
                len(unequal),
                ", ".join(unequal[:5]),
            )

    def dtype(self, name: str) -> torch.dtype:
        return next(iter(self._parts[name].values()))[0][1].dtype

    def read(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        parts = [(*place, copies[0][1]) for place, copies in sorted(self._parts[name].items(), key=_place)]
        cut_along = self._dim[name]
        if dim != cut_along:
            return torch.cat([view.narrow(dim, start, stop - start) for *_, view in parts], cut_along)
        taken = []
        for begin, end, view in parts:
            low, high = max(start, begin), min(stop, end)
            if low < high:
                taken.append(view.narrow(dim, low - begin, high - low))
        return torch.cat(taken, dim)


def _place(part: tuple[tuple[int, int], object]) -> tuple[int, int]:
    return part[0]


def check_types(source: Source, model: Architecture, layout: Layout) -> None:
    """What Megatron fuses into one tensor must be of one type."""
    for rank in layout.ranks():
        for tensors in rank_tensors(model, layout, rank).values():
            for blocks in _stored(tensors, layout).values():
                types = {piece.name: source.dtype(piece.name) for pieces in blocks for piece in pieces}
                if len(set(types.values())) > 1:
                    given = ", ".join(f"{name} {dtype}" for name, dtype in types.items())
                    raise ConfigError(
                        f"Megatron keeps these as one tensor, of one type: {given}; give --dtype"
                    )


def write_megatron(
    source: Source, model: Architecture, layout: Layout, folder: Path, say: Callable[[str], None]
) -> None:
    """`release/mp_rank_*/model_optim_rng.pt` of every rank and the tracker; one tensor in memory."""
    ranks = layout.ranks()
    for i, rank in enumerate(ranks, start=1):
        entries = {
            key: {name: _entry(source, name, blocks) for name, blocks in _stored(tensors, layout).items()}
            for key, tensors in rank_tensors(model, layout, rank).items()
        }
        path = folder / "release" / layout.folder(*rank) / FILE
        path.parent.mkdir(parents=True)
        size = sum(entry.nbytes for chunk in entries.values() for entry in chunk.values())
        progress = Progress(str(path.relative_to(folder)), size, say)
        write_rank(path, {"checkpoint_version": 3.0, "iteration": 0}, entries, progress.add)
        say(f"{path.relative_to(folder)}  {size:,} bytes  ({i} of {len(ranks)})")
    (folder / TRACKER).write_text("release\n", encoding="ascii")


class Progress:
    """A line for each further GiB of a file that is being written."""

    def __init__(self, file: str, size: int, say: Callable[[str], None]) -> None:
        self._file, self._size, self._say = file, size, say
        self._done = self._said = 0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._done - self._said >= 2**30 and self._done < self._size:
            self._said = self._done
            self._say(f"{self._file}  {self._done:,} of {self._size:,} bytes")


def _stored(tensors: dict[str, Pieces], layout: Layout) -> dict[str, tuple[Pieces, ...]]:
    """Name in the file -> the planned tensors that lie in it end to end."""
    stored: dict[str, tuple[Pieces, ...]] = {}
    for name, pieces in tensors.items():
        key = fused_name(name) if layout.experts is Experts.FUSED else name
        stored[key] = (*stored.get(key, ()), pieces)
    return stored


def _entry(source: Source, name: str, blocks: tuple[Pieces, ...]) -> Entry:
    shapes = [shape_of(pieces, source.shapes) for pieces in blocks]
    fused = fused_shape(name, shapes)

    def parts() -> Iterator[Tensor]:
        for pieces in blocks:
            read = (_piece(source, piece) for piece in pieces)
            yield from read if fused is None else [torch.cat(list(read)).T]

    dtype = source.dtype(blocks[0][0].name)
    return Entry(shape=shapes[0] if fused is None else fused, dtype=dtype, parts=parts)


def _piece(source: Source, piece: Piece) -> Tensor:
    if piece.zeros:
        return torch.zeros(piece.size, *source.shapes[piece.name][1:], dtype=source.dtype(piece.name))
    return source.read(piece.name, piece.start, piece.stop, piece.dim)
