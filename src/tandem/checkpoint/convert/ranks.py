"""A Megatron checkpoint on disk: its rank files, and the layout that they show by themselves."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tandem.checkpoint.convert.architecture import IGNORED, Architecture
from tandem.checkpoint.convert.experts import expert_tensor_ranks, experts_form
from tandem.checkpoint.convert.layout import Layout, dealt
from tandem.checkpoint.convert.torch_file import read_mapped
from tandem.errors import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"

_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")

Rank = tuple[int, int, int]
"""Tensor, pipeline and expert rank."""
Chunks = dict[str, dict[str, Tensor]]
"""`model`, or `model0` and so on -> name -> tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The files of a checkpoint, opened but not read."""

    folder: Path
    paths: dict[Rank, Path]
    chunks: dict[Rank, Chunks]

    @property
    def reward(self) -> bool:
        """The head gives one number: under its own name, or in the place of the output layer."""
        last = max(self.chunks)
        names = {name: tensor for chunk in self.chunks[last].values() for name, tensor in chunk.items()}
        return "rm_head.weight" in names or (_HEAD in names and len(names[_HEAD]) == 1)

    def layout(self, model: Architecture) -> Layout:
        """Sizes as the files show them; that they fit the model is checked tensor by tensor afterwards."""
        tensor, pipeline, expert = (1 + max(rank[axis] for rank in self.paths) for axis in range(3))
        self._check_present({(0, p, 0) for p in range(pipeline)})
        firsts = [self.chunks[0, p, 0] for p in range(pipeline)]
        virtual = len(firsts[0])
        if any(len(chunks) != virtual for chunks in firsts):
            raise ConfigError(f"{self.folder}: its pipeline ranks have different numbers of virtual chunks")
        counts = [_layers(list(chunks.values())[v]) for v in range(virtual) for chunks in firsts]
        if sum(counts) != model.layers:
            raise ConfigError(
                f"{self.folder} holds {sum(counts)} layers ({', '.join(map(str, counts))} in its stages), "
                f"but the config has {model.layers}; is a rank missing, or is the config another model's?"
            )
        names = {name for chunks in self.chunks.values() for chunk in chunks.values() for name in chunk}
        embedding = next(iter(firsts[0].values())).get(_EMBEDDING)
        if embedding is None:
            raise ConfigError(f"{self.paths[0, 0, 0]} has no {_EMBEDDING}; is it a Megatron-Core checkpoint?")
        found = Layout(
            tensor=tensor,
            stages=dealt(counts, pipeline),
            expert=expert,
            expert_tensor=self._expert_tensor(model, expert) or tensor,
            vocabulary=len(embedding) * tensor,
            fused_norms=any(name.endswith("linear_qkv.layer_norm_weight") for name in names),
            experts=experts_form(names),
        )
        self._check_present(set(found.ranks()))
        return found

    def _expert_tensor(self, model: Architecture, expert: int) -> int | None:
        held = (chunk for chunks in self.chunks.values() for chunk in chunks.values())
        shown = (expert_tensor_ranks(chunk, model, model.experts // expert) for chunk in held)
        return next((ranks for ranks in shown if ranks is not None), None)

    def _check_present(self, ranks: set[Rank]) -> None:
        if missing := sorted(ranks - set(self.paths)):
            raise ConfigError(
                f"{self.folder} lacks the files of {len(missing)} ranks (tensor, pipeline, expert): "
                f"{', '.join(map(str, missing[:10]))}"
            )


def is_megatron(source: Path) -> bool:
    return (source / TRACKER).is_file() or bool(_rank_folders(source))


def open_ranks(source: Path) -> Ranks:
    """Every rank's file, of the iteration that the tracker names or of the folder itself."""
    folder = _iteration(source)
    if (folder / ".metadata").is_file() or (folder / "metadata.json").is_file():
        raise ConfigError(
            f"{folder} is in Megatron's distributed format, not in one file per rank: save it once more in Megatron "
            "with --ckpt-convert-format torch --ckpt-convert-save DIR, and convert that"
        )
    found = _rank_folders(folder)
    if not found:
        raise ConfigError(f"{folder} has no mp_rank_* folders; give the folder that holds {TRACKER}")
    files = {numbers: path / FILE for numbers, path in found.items()}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise ConfigError(f"{len(missing)} rank files are missing: {', '.join(missing[:5])}")
    opened = {numbers: _chunks(path) for numbers, path in files.items()}
    places = _places(folder, opened)
    return Ranks(
        folder=folder,
        paths={places[numbers]: path for numbers, path in files.items()},
        chunks={places[numbers]: chunks for numbers, chunks in opened.items()},
    )


def _iteration(source: Path) -> Path:
    tracker = source / TRACKER
    if not tracker.is_file():
        return source
    word = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if word != "release" and not word.isdigit():
        raise ConfigError(f"{tracker} says {word!r}, neither a number nor `release`")
    folder = source / (word if word == "release" else f"iter_{int(word):07d}")
    if not folder.is_dir():
        raise ConfigError(f"{tracker} says {word!r}, but {folder} does not exist")
    return folder


def _rank_folders(folder: Path) -> dict[tuple[int, ...], Path]:
    """Numbers in the name -> folder."""
    matches = [(_FOLDER.fullmatch(path.name), path) for path in folder.glob("mp_rank_*")]
    return {tuple(int(g) for g in m.groups() if g is not None): path for m, path in _sorted(matches)}


def _sorted(
    matches: Iterable[tuple[re.Match[str] | None, Path]],
) -> list[tuple[re.Match[str], Path]]:
    return sorted(((m, path) for m, path in matches if m is not None), key=lambda pair: pair[1])


def _chunks(path: Path) -> Chunks:
    """The weights in a file; other state, and what holds no weights, is left out."""
    content = read_mapped(path)
    keys = sorted((k for k in content if re.fullmatch(r"model\d*", str(k))), key=lambda k: int(k[5:] or 0))
    chunks: Chunks = {}
    for key in keys:
        entries = content[key]
        if not isinstance(entries, dict) or "language_model" in entries:
            raise ConfigError(
                f"{path}: {key!r} is not laid out by Megatron-Core, but by its predecessor; convert it with "
                "Megatron's own tools first"
            )
        chunks[key] = {
            name: tensor
            for name, tensor in entries.items()
            if isinstance(tensor, Tensor) and not name.endswith(IGNORED)
        }
    if not chunks:
        raise ConfigError(f"{path} has no weights under `model`; its keys are {', '.join(map(str, content))}")
    return chunks


def _places(folder: Path, opened: dict[tuple[int, ...], Chunks]) -> dict[tuple[int, ...], Rank]:
    """Which ranks the numbers of each folder are.

    A second number alone is the pipeline rank, or the expert rank where every file has an embedding.
    """
    lengths = {len(numbers) for numbers in opened}
    if len(lengths) > 1:
        raise ConfigError(f"{folder} mixes rank folders of several layouts; remove those that do not belong")
    first_everywhere = all(_EMBEDDING in next(iter(chunks.values())) for chunks in opened.values())
    places: dict[tuple[int, ...], Rank] = {}
    for numbers in opened:
        tensor, *rest = numbers
        match rest:
            case [pipeline, expert]:
                places[numbers] = (tensor, pipeline, expert)
            case [other]:
                places[numbers] = (tensor, 0, other) if first_everywhere else (tensor, other, 0)
            case _:
                places[numbers] = (tensor, 0, 0)
    return places


def _layers(chunk: dict[str, Tensor]) -> int:
    numbers = {int(m[1]) for name in chunk if (m := _LAYER.match(name))}
    return 1 + max(numbers, default=-1)
