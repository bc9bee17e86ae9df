"""State of a torch optimizer as named tensors and JSON, keyed by parameter name, bit for bit.

`Optimizer.load_state_dict` is not used: it keys by position and casts state to the parameter's type, which
would round float32 moments of bfloat16 weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tandem.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

_IMPLEMENTATION = frozenset({"capturable", "differentiable", "foreach", "fused"})
"""Options of a group that choose how, not what, is computed: these stay as this machine has them."""


def optimizer_tensors(
    optimizer: "Optimizer", names: Sequence[str]
) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """State and options; `names` are the parameters' names in the order of the optimizer's groups.

    The tensors are the live ones: write them before the next update.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    groups, scalars, shapes = [], {}, {}
    for i, (group, members) in enumerate(_members(optimizer, names)):
        options = {}
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                tensors[f"group/{i}/{key}"] = value.detach()
            elif key != "params" and key not in _IMPLEMENTATION:
                options[key] = value
        groups.append({"names": list(members), "options": options})
        for name, parameter in members.items():
            shapes[name] = list(parameter.shape)
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"state/{key}/{name}"] = value.detach()
                else:
                    scalars.setdefault(name, {})[key] = value
    kind = type(optimizer).__name__
    return tensors, {"kind": kind, "groups": groups, "shapes": shapes, "scalars": scalars}


def restore_optimizer(
    optimizer: "Optimizer", names: Sequence[str], tensors: Mapping[str, "Tensor"], state: Mapping[str, Any]
) -> None:
    """Bring the optimizer to the saved state; nothing is changed unless everything fits."""
    live = list(_members(optimizer, names))
    _check_fit(type(optimizer).__name__, live, state)
    entries = _by_parameter(tensors, state)
    optimizer.state.clear()
    for i, (group, members) in enumerate(live):
        saved = dict(state["groups"][i]["options"])
        prefix = f"group/{i}/"
        saved |= {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
        for key, value in saved.items():
            group[key] = _like(group.get(key), value)
        for name, parameter in members.items():
            if name in entries:
                optimizer.state[parameter] = _placed(entries[name], parameter, group)


def _members(
    optimizer: "Optimizer", names: Sequence[str]
) -> Iterator[tuple[dict[str, Any], dict[str, "Tensor"]]]:
    """Each group with its parameters by name."""
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"{len(set(names))} different names for {count} parameters of the optimizer")
    start = 0
    for group in optimizer.param_groups:
        end = start + len(group["params"])
        yield group, dict(zip(names[start:end], group["params"]))
        start = end


def _check_fit(
    kind: str, live: Sequence[tuple[dict[str, Any], dict[str, "Tensor"]]], state: Mapping[str, Any]
) -> None:
    """Refuse state of another optimizer, other groups or other shapes, and name the difference."""
    if state["kind"] != kind:
        raise RunError(f"the checkpoint holds the state of {state['kind']}, the run uses {kind}")
    if len(state["groups"]) != len(live):
        raise RunError(f"the checkpoint's optimizer has {len(state['groups'])} groups, the run's {len(live)}")
    for i, (_, members) in enumerate(live):
        odd = set(members) ^ set(state["groups"][i]["names"])
        if odd:
            raise RunError(
                f"group {i} of the optimizer: {sorted(odd)[:5]} of {len(odd)} parameters are only in the "
                "checkpoint or only in the model. Resume with the configuration of the checkpoint"
            )
        for name, parameter in members.items():
            if state["shapes"][name] != list(parameter.shape):
                raise RunError(
                    f"{name} has shape {state['shapes'][name]} in the checkpoint's optimizer and "
                    f"{list(parameter.shape)} in the model. Resume with the model of the checkpoint"
                )


def _by_parameter(tensors: Mapping[str, "Tensor"], state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {name: dict(values) for name, values in state["scalars"].items()}
    for path, tensor in tensors.items():
        if path.startswith("state/"):
            _, key, name = path.split("/", 2)
            entries.setdefault(name, {})[key] = tensor
    return entries


def _placed(entry: Mapping[str, Any], parameter: "Tensor", group: Mapping[str, Any]) -> dict[str, Any]:
    """Copies on the parameter's device; the step count stays in host memory unless the kernel reads it."""
    import torch

    on_device = group.get("fused") or group.get("capturable")
    placed = {}
    for key, value in entry.items():
        if isinstance(value, torch.Tensor):
            stays = key == "step" and not on_device
            value = value.clone() if stays else value.to(parameter.device, copy=True)
        placed[key] = value
    return placed


def _like(live: Any, saved: Any) -> Any:
    """The saved value in the live one's form: JSON has no tuples, and a tensor may be held by others."""
    import torch

    if isinstance(live, torch.Tensor):
        return live.copy_(torch.as_tensor(saved))
    if isinstance(saved, torch.Tensor):
        return saved.item()
    return tuple(saved) if isinstance(live, tuple) else saved
