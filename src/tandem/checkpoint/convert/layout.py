"""How Megatron cuts a model over ranks: tensor, pipeline (even, uneven, virtual) and expert parallel."""

import math
from dataclasses import dataclass

from tandem.checkpoint.convert.architecture import Architecture
from tandem.checkpoint.convert.experts import Experts
from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    tensor: int
    stages: tuple[tuple[tuple[int, ...], ...], ...]
    """`stages[p][v]`: the layers of pipeline rank p in its virtual chunk v."""
    expert: int
    """Ranks that share the experts of a layer."""
    expert_tensor: int
    """Ranks that share the matrices of an expert."""
    vocabulary: int
    """Rows of the embedding with their padding, over all tensor ranks."""
    fused_norms: bool
    """Norms are named as parts of the linear layer behind them (Transformer Engine)."""
    experts: Experts

    @property
    def pipeline(self) -> int:
        return len(self.stages)

    @property
    def virtual(self) -> int:
        return len(self.stages[0])

    def ranks(self) -> list[tuple[int, int, int]]:
        """(tensor, pipeline, expert) rank of every file.

        Of the processes of a stage, number n has tensor rank n mod tensor, expert tensor rank n mod expert_tensor and
        expert rank (n // expert_tensor) mod expert. So where these numbers of ranks differ, not every pair exists.
        """
        processes = range(math.lcm(self.tensor, self.expert_tensor * self.expert))
        pairs = [(n % self.tensor, n // self.expert_tensor % self.expert) for n in processes]
        return [(t, p, e) for p in range(self.pipeline) for t, e in pairs]

    def folder(self, tensor: int, pipeline: int, expert: int) -> str:
        """Name of a rank's folder, as Megatron spells it."""
        name = f"mp_rank_{tensor:02d}"
        if self.pipeline > 1:
            name += f"_{pipeline:03d}"
        return f"{name}_{expert:03d}" if self.expert > 1 else name

    def chunk(self, number: int) -> str:
        """Key of a virtual chunk's weights within a rank's file."""
        return f"model{number}" if self.virtual > 1 else "model"

    def in_words(self) -> str:
        counts = ["+".join(str(len(chunk)) for chunk in stage) for stage in self.stages]
        words = f"tensor {self.tensor}, pipeline {self.pipeline} (layers {', '.join(counts)})"
        words += f", virtual {self.virtual}" if self.virtual > 1 else ""
        words += f", expert {self.expert}" if self.expert > 1 else ""
        words += f", expert tensor {self.expert_tensor}" if self.expert_tensor != self.tensor else ""
        return f"{words}, vocabulary {self.vocabulary}"


def stages(
    layers: int, pipeline: int, virtual: int, layers_per_stage: list[int] | None
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Layers of each stage and chunk.

    With virtual chunks of n layers, layer l is on rank (l // n) % pipeline, in its chunk l // (n * pipeline).
    """
    if layers_per_stage is not None:
        counts = _uneven(layers, pipeline, virtual, layers_per_stage)
    elif layers % (pipeline * virtual):
        flags = f"--pipeline-parallel {pipeline}" + (f" --virtual-pipeline {virtual}" if virtual > 1 else "")
        raise ConfigError(
            f"{flags}: {layers} layers do not divide into {pipeline * virtual} equal parts; "
            "choose divisors of the layers, or give --layers-per-stage"
        )
    else:
        counts = [layers // (pipeline * virtual)] * (pipeline * virtual)
    return dealt(counts, pipeline)


def dealt(counts: list[int], pipeline: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Consecutive layers, so many to each part, the parts going round the pipeline ranks."""
    parts, begin = [], 0
    for count in counts:
        parts.append(tuple(range(begin, begin + count)))
        begin += count
    return tuple(tuple(parts[p::pipeline]) for p in range(pipeline))


def _uneven(layers: int, pipeline: int, virtual: int, counts: list[int]) -> list[int]:
    flag = f"--layers-per-stage {','.join(map(str, counts))}"
    if virtual > 1:
        raise ConfigError(f"{flag} and --virtual-pipeline {virtual} exclude each other; give one of them")
    if len(counts) != pipeline:
        raise ConfigError(f"{flag} has {len(counts)} stages, --pipeline-parallel {pipeline}; make them equal")
    if min(counts) < 1:
        raise ConfigError(f"{flag}: every stage needs a layer")
    if sum(counts) != layers:
        raise ConfigError(f"{flag} adds up to {sum(counts)} layers, but the model has {layers}")
    return counts


def check_divides(model: Architecture, layout: Layout) -> None:
    """`ConfigError` that names the first size that the ranks cannot share evenly."""
    t, e = layout.tensor, layout.expert
    fused = (model.heads + 2 * model.groups) * model.head_dim
    shared = {
        "attention heads": (model.heads, t),
        "rows of the fused q, k and v": (fused, t),
        "padded vocabulary rows": (layout.vocabulary, t),
    }
    if len(model.expert_layers) < model.layers:
        shared["feed-forward channels"] = (model.feedforward, t)
    if model.expert_layers:
        shared["feed-forward channels of an expert"] = (model.expert_feedforward, layout.expert_tensor)
        shared["experts"] = (model.experts, e)
    elif e > 1:
        raise ConfigError(f"{e} expert-parallel ranks: the model has no experts; leave them out")
    elif layout.expert_tensor != t:
        raise ConfigError("--expert-tensor-parallel: the model has no experts; leave it out")
    elif layout.experts is not Experts.APART:
        raise ConfigError("--grouped-experts: the model has no experts; leave it out")
    if t % layout.expert_tensor:
        raise ConfigError(
            f"{layout.expert_tensor} expert-tensor-parallel ranks do not divide {t} tensor-parallel ranks, by which "
            "the files are named; choose a divisor"
        )
    for what, (size, ranks) in shared.items():
        if size % ranks:
            kind = "expert" if what == "experts" else "tensor"
            raise ConfigError(
                f"{size} {what} cannot be shared by {ranks} {kind}-parallel ranks; choose a divisor"
            )
    if model.groups % t and t % model.groups:
        raise ConfigError(
            f"{model.groups} key-value heads cannot be shared by {t} tensor-parallel ranks; "
            "choose a divisor or a multiple"
        )
    if layout.virtual > 1 and layout.pipeline == 1:
        raise ConfigError(f"{layout.virtual} virtual stages need 2 or more pipeline ranks")
