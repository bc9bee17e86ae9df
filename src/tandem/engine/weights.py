"""Weights on their way to an engine: what a version holds, and the proof that it arrived whole.

A sender makes an `Offer` of a version (`engine/roads.py`), a receiver checks its names, shapes and types against its
own before it touches anything, and the bytes of every tensor by checksum as they come.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tandem.errors import RunError
from tandem.model import LanguageModel
from tandem.model.mixture import apart

if TYPE_CHECKING:
    from peft import PeftConfig

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WIDTH, ROWS = 1024, 256
"""Words of a tensor that are summed at a time on a CPU, in its caches; an accelerator takes `MORE` times as many rows.
It bounds the memory of a checksum."""
MORE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor without its numbers. `dtype` is torch's name of it, such as `bfloat16`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Weights(Protocol):
    """Named tensors, each whole when it comes; on a sharded trainer both calls are made by all ranks."""

    adapter: "PeftConfig | None"
    """Set where the tensors are those of an adapter."""

    def specs(self) -> tuple[TensorSpec, ...]:
        """What iteration gives, in its order, without moving a byte."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A version of the weights that receivers may take now."""

    version: int
    road: str
    specs: tuple[TensorSpec, ...]
    checksums: Mapping[str, int] | None
    """By name; None where bytes are not compared, or where the road brings the sums along (broadcast)."""
    verify: bool = True
    adapter: bool = False
    place: Any = None
    """Where the tensors are, in the road's own terms."""


class ModelWeights:
    """All weights of a model under their Hugging Face names; of a model with an adapter, those of the adapter.

    A weight that two modules share comes once. `dtype`, where given, is what they are cast to, but for an adapter: that
    of a bfloat16 model is float32, and so is the engine's.
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype | None = None) -> None:
        self.tensors = named_tensors(model)
        self.adapter = model.adapter
        self.dtype = None if self.adapter else dtype

    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(spec_of(name, t, self.dtype) for name, t in self.tensors.items())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            yield name, whole.to(self.dtype or whole.dtype)


def named_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The tensors themselves, by the name in a Hugging Face folder: what is written into them is the model's."""
    if model.adapter is not None:
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(model.module, save_embedding_layers=False))
    network = model.network
    shared = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    buffers = {name: t for name, t in network.state_dict().items() if name not in shared}
    return {**named_parameters(network), **buffers}


def named_parameters(network: PreTrainedModel) -> dict[str, Tensor]:
    """Those of `named_tensors` that a folder must have; they need no storage."""
    family, own = network.config.model_type, network.named_parameters()
    return {view: part for name, weight in own for view, part in apart(family, name, weight.detach())}


def specs_of(network: PreTrainedModel) -> dict[str, TensorSpec]:
    """Of its parameters, by name."""
    return {name: spec_of(name, tensor) for name, tensor in named_parameters(network).items()}


def spec_of(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype_name(dtype or tensor.dtype))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """Sum of the tensor's words, each times its odd place number, modulo 2^64.

    Any one changed word changes it, and so does an exchange of two words of up to 32 bits; equal on all devices.
    """
    words_N = tensor.detach().contiguous().reshape(-1).view(WORDS[tensor.element_size()])
    device, cut = words_N.device, len(words_N) - len(words_N) % WIDTH
    odd_C = 2 * torch.arange(WIDTH, device=device) + 1
    tail_C = words_N[cut:].long()
    total = (tail_C * (2 * cut + odd_C[: len(tail_C)])).sum()
    # Word c of row r has place r * WIDTH + c, so sums of the rows and of the columns are enough.
    words_RC, column_C = words_N[:cut].view(-1, WIDTH), torch.zeros_like(odd_C)
    rows = min(len(words_RC), ROWS if device.type == "cpu" else MORE * ROWS)
    room_RC = torch.empty(rows, WIDTH, dtype=torch.int64, device=device)
    for start in range(0, len(words_RC), max(1, rows)):
        words = words_RC[start : start + rows]
        part_RC = room_RC[: len(words)].copy_(words)
        column_C += part_RC.sum(0)
        row_R = torch.arange(start, start + len(part_RC), device=device)
        total += 2 * WIDTH * (part_RC.sum(1) * row_R).sum()
    return int(total + (column_C * odd_C).sum())


def check_specs(offer: Offer, own: Mapping[str, TensorSpec]) -> None:
    """Raise where an offer does not hold exactly the receiver's own tensors."""
    offered = {spec.name: spec for spec in offer.specs}
    if missing := [name for name in own if name not in offered]:
        raise refusal(offer, missing[0], f"is missing{_others(missing)}")
    if surplus := [name for name in offered if name not in own]:
        raise refusal(offer, surplus[0], f"is none of the engine's{_others(surplus)}")
    for name, spec in offered.items():
        if spec != own[name]:
            raise refusal(offer, name, f"is {spec} and the engine's is {own[name]}")


def announced(weights: Weights, version: int, road: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a sender, each at the place where its specs have it; RunError with the name of the first that is
    not there. With the last one the sender is done: where many processes iterate none is left waiting."""
    arriving, specs = iter(weights), weights.specs()
    for place, spec in enumerate(specs, 1):
        name, tensor = next(arriving, ("", None))
        if name != spec.name or tensor is None:
            raise told(version, road, spec.name, "was announced and never came")
        if place == len(specs):
            for surplus, _ in arriving:
                raise told(version, road, surplus, "came and was not announced")
        yield name, tensor


def verified(offer: Offer, arriving: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they come, each compared with the offer; raises at the first that differs, or if one is left."""
    awaited = {spec.name: spec for spec in offer.specs}
    for name, tensor in arriving:
        spec = awaited.pop(name, None)
        if spec is None:
            raise refusal(offer, name, "came twice or was not announced")
        if spec_of(name, tensor) != spec:
            raise refusal(offer, name, f"came as {spec_of(name, tensor)} and was announced as {spec}")
        if offer.verify and offer.checksums is not None:
            compare(offer, name, offer.checksums[name], checksum(tensor))
        yield name, tensor
    if awaited:
        raise refusal(offer, next(iter(awaited)), f"never came{_others(list(awaited))}")


def compare(offer: Offer, name: str, sent: int, received: int) -> None:
    if sent != received:
        raise refusal(offer, name, f"changed on the way (checksum {received} instead of {sent})")


def refusal(offer: Offer, name: str, what: str) -> RunError:
    return told(offer.version, offer.road, name, what)


def told(version: int, road: str, name: str, what: str) -> RunError:
    return RunError(f"weights of version {version} by road {road}: tensor {name} {what}")


def _others(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
