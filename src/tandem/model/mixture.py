"""Mixtures of experts: a model has the experts of a layer in one tensor, its Hugging Face folder has them apart."""

from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedConfig

MIXTURES = frozenset({"qwen2_moe", "qwen3_moe"})
"""Model types whose experts are understood."""

PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The weights of all experts of a layer, [experts, out, in], and what stands for each of them in the folder: per
expert these, one above the other."""


def is_mixture(config: PreTrainedConfig) -> bool:
    return config.model_type in MIXTURES


def experts_in(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold all experts of a layer, which have no weights but these."""
    for inner in module.modules():
        if {name for name, _ in inner.named_parameters(recurse=False)} == set(PROJECTIONS):
            yield inner


def apart(name: str, weight: Tensor, first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Views of a mixture's weight by their names in its folder, where it has several; else the weight by its name.

    Rows are experts, from number `first` on.
    """
    stem, _, leaf = name.rpartition(".experts.")
    if not stem or leaf not in PROJECTIONS:
        yield name, weight
        return
    projections = PROJECTIONS[leaf]
    for index, expert in enumerate(weight, first):
        for projection, part in zip(projections, expert.chunk(len(projections))):
            yield f"{stem}.experts.{index}.{projection}.weight", part


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
