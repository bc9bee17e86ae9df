"""A LoRA adapter, as PEFT saves it, merged into the weights while they are read."""

import math
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tandem.checkpoint.convert.document import read_object
from tandem.checkpoint.convert.source import Source, whole
from tandem.errors import ConfigError

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "alpha_pattern": {},
    "rank_pattern": {},
    "use_dora": False,
}
"""Settings of an adapter and the one value that merging here knows."""


_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin an adapter that leave the weights it is for as they are."""


class Merged:
    """Another source with `scale * B @ A` added to the weights that the adapter names, rounded once."""

    def __init__(self, inner: Source, folder: Path) -> None:
        self.shapes = inner.shapes
        self._inner = inner
        self._rank, self._scale = _settings(folder)
        self._pairs = _pairs(folder)
        self._check(folder)
        # Queries, keys and values are read in turns, one group of heads at a time.
        self._recent = lru_cache(maxsize=3)(self._whole)

    def _check(self, folder: Path) -> None:
        unknown = [name for name in self._pairs if name not in self.shapes]
        if unknown:
            raise ConfigError(
                f"{folder}: {len(unknown)} adapted weights are not in the model: {', '.join(unknown[:5])}; "
                "was the adapter trained on another model, or on experts?"
            )
        for name, (a, b) in self._pairs.items():
            rows, columns = self.shapes[name]
            wanted = ((self._rank, columns), (rows, self._rank))
            if (tuple(a.shape), tuple(b.shape)) != wanted:
                raise ConfigError(
                    f"{folder}: lora_A and lora_B of {name} are {list(a.shape)} and {list(b.shape)}, but the model "
                    f"and r={self._rank} ask for {list(wanted[0])} and {list(wanted[1])}"
                )

    def dtype(self, name: str) -> torch.dtype:
        return self._inner.dtype(name)

    def read(self, name: str, start: int, stop: int, dim: int) -> Tensor:
        if name not in self._pairs:
            return self._inner.read(name, start, stop, dim)
        return self._recent(name).narrow(dim, start, stop - start)

    def _whole(self, name: str) -> Tensor:
        """The whole product, whatever the slice: parts of it could round otherwise."""
        a, b = (half.float() for half in self._pairs[name])
        merged, product = whole(self._inner, name).clone(), b @ a
        product *= self._scale
        merged += product
        return merged


def _settings(folder: Path) -> tuple[int, float]:
    """Rank and scale; `ConfigError` for adapters that are more than LoRA on linear layers."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no adapter_config.json; give the folder of a PEFT adapter")
    config = read_object(path)
    for key, plain in _PLAIN.items():
        if config.get(key, plain) != plain and config.get(key):
            raise ConfigError(
                f"{path}: {key}={config[key]!r} cannot be merged here; merge it with PEFT (merge_and_unload), "
                "save the model, and convert that"
            )
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ConfigError(
            f"{path}: init_lora_weights={start!r} changes the base weights, too; merge it with PEFT "
            "(merge_and_unload), save the model, and convert that"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ConfigError(f"{path}: r={rank!r}, lora_alpha={alpha!r}; both must be numbers above 0")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of the adapted weight -> A and B."""
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as cause:
        raise ConfigError(f"{path} is not a readable safetensors file: {cause}") from cause
    stems = {name.removesuffix(_A).removesuffix(_B) for name in tensors}
    odd = [
        name
        for name in tensors
        if not name.startswith(_PREFIX)
        or not all(name.removesuffix(_A).removesuffix(_B) + end in tensors for end in (_A, _B))
    ]
    if odd:
        raise ConfigError(
            f"{path}: {len(odd)} tensors are not pairs of lora_A and lora_B: {', '.join(odd[:5])}; "
            "merge the adapter with PEFT (merge_and_unload), and convert the merged model"
        )
    return {
        f"{stem.removeprefix(_PREFIX)}.weight": (tensors[stem + _A], tensors[stem + _B])
        for stem in sorted(stems)
    }
