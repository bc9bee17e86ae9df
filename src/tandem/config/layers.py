"""What a run's values come from: preset, extended files, the file, overrides; lowest first."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tandem.config.schema import suggest
from tandem.config.sections import Algorithm
from tandem.config.yaml_text import Parsed, parse
from tandem.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One source of values."""

    origin: str
    """File, or the override as it was typed."""
    data: dict[str, Any]
    lines: dict[str, int]
    folder: Path
    """What relative paths in it are relative to."""

    def place(self, name: str) -> str | None:
        """Where this layer sets a key, as file:line; None where it does not."""
        if name not in flatten(self.data) and not any(n.startswith(f"{name}.") for n in flatten(self.data)):
            return None
        return f"{self.origin}:{self.lines[name]}" if name in self.lines else self.origin


def recipes() -> Path:
    """The folder of recipes: inside an installed package, else at the top of the repository."""
    packaged = _PACKAGE / "recipes"
    return packaged if packaged.is_dir() else _PACKAGE.parents[1] / "recipes"


def preset_names() -> list[str]:
    """The algorithms that come with the project."""
    return sorted(file.stem for file in (recipes() / "algorithms").glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """What a preset sets, by dotted key from the top of a run."""
    return flatten(preset_layer(name, Path.cwd()).data)


def preset_layer(name: str, folder: Path) -> Layer:
    """The keys of a preset, by name or by path."""
    if name.endswith((".yaml", ".yml")):
        path = folder / name
    else:
        path = recipes() / "algorithms" / f"{name}.yaml"
        if name not in preset_names():
            known = preset_names()
            raise ConfigError(
                f"algorithm.preset={name}: no such preset.{suggest(name, known)} "
                f"Presets: {', '.join(known)}; or a path to a YAML file"
            )
    parsed = read(path)
    if "preset" in parsed.data:
        raise ConfigError(f"{path}:{parsed.lines['preset']}: a preset cannot name a preset; use keys only")
    return Layer(
        origin=_short(path),
        data={"algorithm": parsed.data},
        lines={f"algorithm.{name}": line for name, line in parsed.lines.items()},
        folder=path.parent,
    )


def named_preset(data: dict[str, Any]) -> str | None:
    """The preset that merged values ask for; None where they are too broken to ask for one."""
    section = data.get("algorithm", {})
    name = section.get("preset", Algorithm.model_fields["preset"].default) if isinstance(section, dict) else 0
    return name if isinstance(name, str) else None


def file_layers(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The file and, below it, those it extends."""
    path = path.resolve()
    if path in above:
        chain = " -> ".join(_short(p) for p in (*above[above.index(path) :], path))
        raise ConfigError(f"extends goes in a circle: {chain}; remove one of them")
    parsed = read(path)
    layers = [
        layer
        for below in _extended(parsed, path)
        for layer in file_layers(path.parent / below, (*above, path))
    ]
    data = {key: value for key, value in parsed.data.items() if key != "extends"}
    return [*layers, Layer(origin=_short(path), data=data, lines=parsed.lines, folder=path.parent)]


def override_layer(text: str) -> Layer:
    """`section.key=value`, the value read as YAML and not interpolated."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip().strip("."):
        raise ConfigError(f"{text}: an override is written section.key=value")
    if name.strip() == "extends":
        raise ConfigError(
            f"{text}: only a file extends others; write `extends: {value}` into one, and load that"
        )
    try:
        data = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except (OmegaConfBaseException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{text}: cannot be read as section.key=value ({reason})") from None
    assert isinstance(data, dict)
    return Layer(origin="override", data=data, lines={}, folder=Path.cwd())


def read(path: Path) -> Parsed:
    """A YAML file; a missing one names its neighbours."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{_short(path)}: no such file.{_near(path)}") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{_short(path)} is a folder; name a YAML file in it.{_near(path / '.yaml')}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_short(path)}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{_short(path)}: cannot be read ({error.strerror})") from None
    return parse(text, _short(path))


def merge(low: Any, high: Any) -> Any:
    """Mappings key by key; a mapping of numbers onto a list item by item; otherwise the higher one."""
    if isinstance(low, dict) and isinstance(high, dict):
        return low | {key: merge(low[key], value) if key in low else value for key, value in high.items()}
    if isinstance(low, list) and isinstance(high, dict) and high and _indices(high, len(low)):
        return [merge(item, high[str(i)]) if str(i) in high else item for i, item in enumerate(low)]
    return high


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves by dotted name; an empty mapping or list is a leaf."""
    if isinstance(value, dict) and value:
        inside = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        inside = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, item in inside:
        leaves |= flatten(item, f"{name}.{key}" if name else key)
    return leaves


def _indices(high: dict[Any, Any], length: int) -> bool:
    return all(isinstance(key, str) and key.isdecimal() and int(key) < length for key in high)


def _extended(parsed: Parsed, path: Path) -> Sequence[str]:
    said = parsed.data.get("extends", [])
    listed = [said] if isinstance(said, str) else said
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        line = parsed.lines["extends"]
        raise ConfigError(f"{_short(path)}:{line}: extends={said!r}: expected a path or a list of paths")
    return listed


def _near(path: Path) -> str:
    """The likeliest YAML files beside a missing one and among the recipes that come with the project."""
    found = [file for folder in (path.parent, recipes() / "runs") for file in sorted(folder.glob("*.y*ml"))]
    files = {file.name: _short(file) for file in reversed(found)}
    names = get_close_matches(path.name, files, n=3, cutoff=0.5) or sorted(files)[:5]
    return f" Near: {', '.join(files[name] for name in names)}" if names else ""


def _short(path: Path) -> str:
    """Relative to the working folder where it lies below it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
