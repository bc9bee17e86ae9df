"""How a layer of Megatron keeps its experts: apart, numbered in one grouped layer, or fused into two matrices.

Fused (`GroupedMLP`, without Transformer Engine), `weight1` is [hidden, experts x 2 x channels] and `weight2`
[experts x channels, hidden], but their memory is [experts, hidden, gate and up] and [experts, channels, hidden]: what
`linear_fc1` and `linear_fc2` of every expert are elsewhere, transposed. Within a plan fused experts are numbered ones.
"""

import re
from collections.abc import Mapping
from enum import StrEnum

from torch import Tensor

from tandem.checkpoint.convert.architecture import Architecture

_FIRST = re.compile(r"\.experts\.(local_experts\.\d+\.)?linear_fc1\.weight\d*$")
_FUSED = re.compile(r"(.+\.experts)\.weight([12])")
_NUMBERED = re.compile(r"(.+\.experts)\.linear_fc([12])\.weight\d+")


class Experts(StrEnum):
    APART = "apart"
    GROUPED = "grouped"
    FUSED = "fused"


def experts_form(names: set[str]) -> Experts:
    """As the names of a checkpoint show it."""
    if any(_FUSED.fullmatch(name) for name in names):
        return Experts.FUSED
    return Experts.GROUPED if any(_NUMBERED.fullmatch(name) for name in names) else Experts.APART


def expert_names(at: str, local: int, form: Experts) -> tuple[str, str]:
    """Of a rank's `local`-th expert in the layer `at`: gate above up, and down."""
    room = f"{at}.mlp.experts"
    if form is Experts.APART:
        return (
            f"{room}.local_experts.{local}.linear_fc1.weight",
            f"{room}.local_experts.{local}.linear_fc2.weight",
        )
    return f"{room}.linear_fc1.weight{local}", f"{room}.linear_fc2.weight{local}"


def expert_tensor_ranks(tensors: Mapping[str, Tensor], model: Architecture, local: int) -> int | None:
    """How many ranks share an expert, by the shape of one; `local` experts are on a rank. None if no shape says so."""
    for name, tensor in tensors.items():
        fused = _FUSED.fullmatch(name)
        if _FIRST.search(name):
            whole = 2 * model.expert_feedforward
        elif fused is not None and fused[2] == "2":
            whole = local * model.expert_feedforward
        else:
            continue
        return whole // len(tensor) if len(tensor) and whole % len(tensor) == 0 else None
    return None


def numbered(tensors: Mapping[str, Tensor], model: Architecture, local: int) -> dict[str, Tensor]:
    """Views of a rank's tensors, its fused experts as numbered ones; matrices of other shapes stay as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fused = _FUSED.fullmatch(name)
        along = 0 if fused is None else int(fused[2]) - 1
        rows = (-1, model.hidden) if along else (model.hidden, -1)
        if fused is None or tensor.shape[along] != model.hidden or tensor.shape[1 - along] % local:
            found[name] = tensor
            continue
        for index, expert in enumerate(tensor.reshape(local, *rows)):
            found[f"{fused[1]}.linear_fc{fused[2]}.weight{index}"] = expert.T
    return found


def fused_name(name: str) -> str:
    """The matrix that a numbered expert is fused into; any other name as it is."""
    expert = _NUMBERED.fullmatch(name)
    return name if expert is None else f"{expert[1]}.weight{expert[2]}"


def fused_shape(name: str, experts: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Shape of a fused matrix, from those of the numbered experts in it; None for any other name."""
    fused = _FUSED.fullmatch(name)
    if fused is None:
        return None
    rows, columns = experts[0]
    return (columns, len(experts) * rows) if fused[2] == "1" else (len(experts) * columns, rows)
