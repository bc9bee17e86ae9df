"""The keys of a run as data: dotted name, expected values, default, documentation; read off the sections."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic.fields import FieldInfo

from tandem.config.run import Run
from tandem.config.section import Section

_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "anything"}
_INDEX = re.compile(r"\[\d*\]|\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of the configuration. Items of a list of sections are written `reward.functions[].name`."""

    name: str
    expected: str
    """Type and bounds in words."""
    default: str
    """As YAML, or empty where the key must be given."""
    doc: str
    section: type[Section] | None
    """The section that the key opens, if it opens one."""

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


@cache
def keys() -> dict[str, Key]:
    """Every key by dotted name, in the order of the sections."""
    return {key.name: key for key in _keys(Run, "")}


def plain(name: str) -> str:
    """The schema's spelling of a key: `reward.functions.0.name` is `reward.functions[].name`."""
    return _INDEX.sub("[]", name.strip().strip("."))


def suggest(name: str, candidates: Iterable[str]) -> str:
    """` Did you mean ...?` with the one or two nearest names, or nothing."""
    scored = sorted(((_likeness(name, c), c) for c in candidates), key=lambda pair: (-pair[0], pair[1]))
    best = [c for score, c in scored[:2] if score >= max(0.72, scored[0][0] - 0.02)]
    return f" Did you mean {' or '.join(best)}?" if best else ""


def _likeness(name: str, candidate: str) -> float:
    """Alike as a whole, or alike in the last word: a key is often right but stands in the wrong section."""
    whole = SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
    parent, _, leaf = name.lower().rpartition(".")
    other_parent, _, other_leaf = candidate.lower().rpartition(".")
    words = SequenceMatcher(None, leaf, other_leaf).ratio()
    if min(len(leaf), len(other_leaf)) >= 4 and (leaf.startswith(other_leaf) or other_leaf.startswith(leaf)):
        words = max(words, 0.85)
    return words if parent == other_parent else max(whole * 0.9, words * 0.93)


def as_yaml(value: Any) -> str:
    """A value as one would write it in the file, on one line."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _keys(section: type[Section], prefix: str) -> Iterable[Key]:
    section.model_rebuild()  # a section that names a later one keeps the bare name until then
    for field, info in section.model_fields.items():
        inner, many = _section_of(info.annotation)
        name = f"{prefix}{field}"
        yield Key(
            name=name,
            expected=_expected(info),
            default=_default(name, info),
            doc=_flat(info.description or (inner.__dict__.get("__doc__") if inner else "") or ""),
            section=inner,
        )
        if inner:
            yield from _keys(inner, f"{name}[]." if many else f"{name}.")


def _section_of(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section inside an annotation, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    many = get_origin(annotation) is list
    for inner in get_args(annotation):
        section, nested = _section_of(inner)
        if section:
            return section, many or nested
    return None, False


def _expected(info: FieldInfo) -> str:
    """`number above 0 and at most 1, or null`."""
    options = get_args(info.annotation) if get_origin(info.annotation) in (Union, UnionType) else ()
    kind = " or ".join(_type(a) for a in options if a is not NoneType) or _type(info.annotation)
    return f"{kind}{_bounds(info.metadata)}" + (", or null" if NoneType in options else "")


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0])
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(f"`{a}`" for a in args)
    if origin is list:
        inner = _type(args[0]).removeprefix("one of ")
        plural = "" if args[0] is str or get_origin(args[0]) is Literal else "s"
        return f"list of {inner}{plural}{_bounds_of(args[0])}"
    if origin is tuple:
        return f"list of {len(args)} {_type(args[0])}s{_bounds_of(args[0])}"
    if origin is dict:
        return "mapping of names to values"
    return _WORDS.get(annotation, "section")


def _bounds_of(item: Any) -> str:
    """Bounds on each item of a list."""
    fields = get_args(item)[1:] if get_origin(item) is Annotated else ()
    return _bounds([bound for field in fields for bound in field.metadata])


def _bounds(bounds: Sequence[Any]) -> str:
    return f" {' and '.join(map(_bound, bounds))}" if bounds else ""


def _bound(bound: Any) -> str:
    match bound:
        case Gt(gt=limit):
            return f"above {limit}"
        case Ge(ge=limit):
            return f"at least {limit}"
        case Lt(lt=limit):
            return f"below {limit}"
        case Le(le=limit):
            return f"at most {limit}"
        case MultipleOf(multiple_of=step):
            return f"a multiple of {step}"
        case MinLen(min_length=least):
            return f"with at least {least}"
    return str(bound)


def _default(name: str, info: FieldInfo) -> str:
    if name == "run_dir":
        return "runs/NAME"
    if info.is_required():
        return ""
    default = info.get_default(call_default_factory=True)
    return "" if isinstance(default, Section) else as_yaml(default)


def _flat(text: str) -> str:
    return " ".join(text.split())
