"""Adapters on weights that are no linear layer's: the experts of a mixture, all of a layer in one tensor, and routers.

PEFT puts the changed weight into the module while it computes. Weights that are gathered just then do not allow that,
so here the module's own forward pass runs on a copy of it that has the changed weights. The factors of experts stand
with the expert first, [experts, rank, in] and [experts, out, rank], and are cut as the experts are.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from tandem.model.adapter import adapts_weight
from tandem.model.mixture import experts_first, experts_in


def loosen(module: nn.Module) -> None:
    """Bring the adapters of this kind below `module` into this form."""
    for chain in _chains(module).values():
        for wrapper in chain:
            for side in ("lora_A", "lora_B"):
                layer = wrapper.get_submodule(f"{side}.default")
                first = experts_first(f".{side}.", layer.weight.detach(), wrapper.num_experts)
                layer.weight = nn.Parameter(first.contiguous(), layer.weight.requires_grad)
        chain[0].forward = partial(_forward, chain)


def holders_in(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold all experts of a layer and their adapters, and nothing else."""
    chains = _chains(module)
    for experts in experts_in(module):
        yield chains[id(experts)][0] if id(experts) in chains else experts


def _chains(module: nn.Module) -> dict[int, list[nn.Module]]:
    """The wrappers of each module with such adapters, by its identity, the outermost first."""
    chains: dict[int, list[nn.Module]] = {}
    for inner in module.modules():
        if adapts_weight(inner):
            chains.setdefault(id(inner.get_base_layer()), []).append(inner)
    return chains


def _forward(chain: list[nn.Module], *inputs: Any) -> Any:
    base = chain[0].get_base_layer()
    weights: dict[str, Tensor] = dict(base.named_parameters(recurse=False))
    if not chain[0].disable_adapters:
        for wrapper in chain:
            a, b = (factors["default"].weight for factors in (wrapper.lora_A, wrapper.lora_B))
            weights[wrapper.parameter_name] = (
                weights[wrapper.parameter_name] + (b @ a) * wrapper.scaling["default"]
            )
    changed = copy.copy(base)
    changed._parameters = {}
    for name, weight in weights.items():
        setattr(changed, name, weight)
    return changed(*inputs)
