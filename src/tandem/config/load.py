"""From a YAML file and overrides to a checked `Run`, and back; every problem of a load in one message."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tandem.config.layers import (
    Layer,
    file_layers,
    flatten,
    merge,
    named_preset,
    override_layer,
    preset_layer,
)
from tandem.config.run import Run
from tandem.config.schema import as_yaml, keys, plain, suggest
from tandem.config.secret import environment_secrets, redact
from tandem.config.yaml_text import dump_yaml
from tandem.errors import ConfigError

FREE_ON_RESUME = (
    "run_dir",
    "steps",
    "device",
    "threads",
    "profile",
    "placement",
    "engine.transfer",
    "engine.transfer_dir",
    "engine.verify_every",
    "engine.tensor_parallel",
    "engine.gpu_memory_utilization",
    "engine.kv_cache_mb",
    "engine.sleep",
    "eval",
    "checkpoint",
    "journal",
    "learner.tokens_per_forward",
    "learner.keep_mb",
    "learner.layout",
    "learner.sleep",
    "reference.layout",
    "critic.layout",
    "reward.workers",
    "reward.model.layout",
)
"""Keys and sections that a resumed run may change: they decide neither a sample nor a gradient. More `steps` move the
end of a schedule of the learning rate, too, from where the run goes on."""

_LONGEST_VALUE = 80


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """The run that a file describes, with `section.key=value` overrides on top.

    Example: load("recipes/runs/quickstart.yaml", ["steps=20", "algorithm.preset=dapo"])
    """
    layers = file_layers(Path(path))
    problems: list[str] = []
    for text in overrides:
        try:
            layers.append(override_layer(text))
        except ConfigError as error:
            problems.append(str(error))
    layers = _with_preset(layers, problems)
    data = _merged(layers)
    data.setdefault("run_dir", f"runs/{Path(path).stem}")
    problems += _secret_problems(data, layers)
    try:
        # Strict: no "16", true or 16.0 for 16. JSON, since strict Python input refuses a list for a tuple.
        run = Run.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        problems += _translated(error.errors(), data, layers)
        raise _refusal(path, problems) from None
    if problems:
        raise _refusal(path, problems)
    return run


def dump(run: Run) -> str:
    """YAML that `load` reads back as the same run: the preset by name, and every key it resolved to.

    Nothing is blanked out here, since `load` refuses values that hold a credential of the environment.
    """
    return dump_yaml(run.model_dump(mode="json"))


def difference(old: Run, new: Run, free: Sequence[str] = FREE_ON_RESUME) -> list[str]:
    """`key: old -> new` for each key that is not free to change; unless given, that a resumed run must not change."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    said = []
    for name in sorted(before.keys() | after.keys()):
        may = any(name == key or name.startswith(f"{key}.") for key in free)
        if not may and (name not in before or name not in after or before[name] != after[name]):
            values = [as_yaml(side[name]) if name in side else "(not set)" for side in (before, after)]
            said.append(f"{name}: {values[0]} -> {values[1]}")
    return said


def _merged(layers: Iterable[Layer]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for layer in layers:
        data = merge(data, layer.data)
    return data


def _with_preset(layers: list[Layer], problems: list[str]) -> list[Layer]:
    """The layers with the preset's keys below them; a path to a preset becomes absolute, so that it can be
    dumped and loaded from anywhere."""
    name = named_preset(_merged(layers))
    if name is None:
        return layers
    setters = [layer for layer in layers if layer.place("algorithm.preset")]
    folder = setters[-1].folder if setters else Path.cwd()
    try:
        lowest = preset_layer(name, folder)
    except ConfigError as error:
        place = setters[-1].place("algorithm.preset") if setters else None
        problems.append(f"{error}{f' ({place})' if place else ''}")
        return layers
    if name.endswith((".yaml", ".yml")):
        settled = {"algorithm": {"preset": str((folder / name).resolve())}}
        layers = [*layers, Layer(origin=lowest.origin, data=settled, lines={}, folder=folder)]
    return [lowest, *layers]


def _place(name: str, layers: Sequence[Layer]) -> str:
    """` (file:line)` of the highest layer that sets a key."""
    for layer in reversed(layers):
        if place := layer.place(name):
            return f" ({place})"
    return ""


def _secret_problems(data: dict[str, Any], layers: Sequence[Layer]) -> list[str]:
    """The run's values are written to files and sinks, so a credential must not be among them."""
    secrets = environment_secrets()
    return [
        f"{name}{_place(name, layers)}: holds the value of the environment variable {variable}; leave it out "
        f"and let the code that needs it read the variable"
        for name, value in flatten(data).items()
        for variable, secret in secrets.items()
        if isinstance(value, str) and secret in value
    ]


def _translated(errors: Iterable[ErrorDetails], data: dict[str, Any], layers: Sequence[Layer]) -> list[str]:
    """One line per key, in words of the configuration."""
    lines: dict[str, str] = {}
    for error in errors:
        name = _name(error)
        place = _place(name, layers)
        key = keys().get(plain(name).removesuffix("[]"))
        expected = key.expected if key else "section"
        if error["type"] == "finite_number":
            expected = f"finite {expected}"
        if error["type"] == "extra_forbidden":
            hint = suggest(plain(name), [*keys(), "extends"])
            lines[name] = f"{name}{place}: unknown key.{hint}"
        elif error["type"] == "value_error":
            lines.setdefault(f"{name}!", f"{name or 'run'}{place}: {error['ctx']['error']}")
        elif name not in (flat := flatten(data)) and not any(n.startswith(f"{name}.") for n in flat):
            lines.setdefault(name, f"{name}: missing; expected {expected}")
        else:
            quote = "; quote it to make it text" if _needs_quotes(error) else ""
            lines.setdefault(name, f"{name}={_value(name, data)}{place}: expected {expected}{quote}")
    return list(lines.values())


def _name(error: ErrorDetails) -> str:
    """The dotted key of an error, without what follows it (member of a union, item of a list)."""
    if error["type"] == "extra_forbidden":
        return ".".join(str(part) for part in error["loc"])
    name = ""
    for part in error["loc"]:
        longer = f"{name}.{part}" if name else str(part)
        key = keys().get(plain(longer).removesuffix("[]"))
        if key is None or (isinstance(part, int) and not key.section):
            break
        name = longer
    return name


def _needs_quotes(error: ErrorDetails) -> bool:
    return error["type"] == "string_type" and isinstance(error["input"], bool | int | float)


def _value(name: str, data: Any) -> str:
    for part in name.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    text = as_yaml(data)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _refusal(path: str | Path, problems: Sequence[str]) -> ConfigError:
    head = f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)} in the configuration"
    return ConfigError(redact("\n".join([head, *(f"  {p}" for p in problems), "Every key: tandem explain"])))
