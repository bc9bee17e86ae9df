"""Mixtures of experts: a model has the experts of a layer in one tensor, its Hugging Face folder has them apart."""

from collections.abc import Iterator
from functools import cache

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

MIXTURES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
"""Model types whose experts are understood."""

WEIGHTS = frozenset({"gate_up_proj", "down_proj"})
"""The weights of all experts of a layer, [experts, out, in]."""


def is_mixture(config: PreTrainedConfig) -> bool:
    return config.model_type in MIXTURES


def experts_in(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold all experts of a layer, which have no weights but these."""
    for inner in module.modules():
        if {name for name, _ in inner.named_parameters(recurse=False)} == WEIGHTS:
            yield inner


@cache
def names_in_folder(family: str, name: str) -> tuple[str, ...]:
    """What stands in the folder of a model of this type for the model's weight of this name: its name there, or of the
    experts of a layer one or more, with `*` for the number of an expert, whose weight is theirs above each other."""
    names = [name]
    for step in get_checkpoint_conversion_mapping(family) if family in MIXTURES else ():
        [here] = step.target_patterns
        names = [
            n.replace(here, there) for n in names for there in (step.source_patterns if here in n else [here])
        ]
    return tuple(names)


def apart(family: str, name: str, weight: Tensor, first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Views of a model's weight by their names in its folder; `family` is the model's type. A weight that is one tensor
    there comes as it is.

    Rows of experts are numbered from `first` on.
    """
    names = names_in_folder(family, name)
    if "*" not in names[0]:
        yield names[0], weight
        return
    for index, expert in enumerate(weight, first):
        for there, part in zip(names, expert.chunk(len(names))):
            yield there.replace("*", str(index)), part


def experts_first(name: str, factor: Tensor, experts: int) -> Tensor:
    """A factor of an adapter as PEFT has it, [experts x rank, in] or [out, rank x experts], as [experts, rank, in] or
    [experts, out, rank]: their product is the change of the experts. A single weight's stays as it is."""
    if experts == 1 or factor.ndim == 3:
        return factor
    if ".lora_A." in name:
        return factor.unflatten(0, (experts, -1))
    return factor.unflatten(1, (-1, experts)).permute(2, 0, 1)


def as_saved(name: str, factor: Tensor) -> Tensor:
    """The way back, by the name of the weight; whatever is no factor of experts stays as it is."""
    if factor.ndim == 3 and ".lora_A." in name:
        return factor.flatten(0, 1)
    if factor.ndim == 3 and ".lora_B." in name:
        return factor.permute(1, 2, 0).flatten(1)
    return factor
