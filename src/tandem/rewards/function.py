"""Reward functions by name: whether they exist and can be filled, found out before anything slow."""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tandem.errors import ConfigError
from tandem.rewards.verifiers import VERIFIERS

Kind = Literal["answer", "async", "group"]
_FILLED = ("truth", "question", "row", "tokens", "finish")
_EITHER = ("answer", "answers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function that is ready to score."""

    name: str
    call: Callable[..., Any]
    kind: Kind
    """answer: one at a time; async: one answer, awaited with its group; group: a prompt's answers at once."""
    fields: tuple[str, ...]
    """Parameters that are filled from the answer."""
    args: Mapping[str, Any]


def _described(parameters: Mapping[str, inspect.Parameter]) -> str:
    return f"({', '.join(parameters)})"


def bind(name: str, call: Callable[..., Any], args: Mapping[str, Any]) -> Function:
    """Match parameters with what can fill them; ConfigError names those that nothing fills."""
    parameters = inspect.signature(call).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    fields = tuple(n for n in named if n in _FILLED + _EITHER)
    where = f"reward function {name!r} {_described(parameters)}"
    if all(e in fields for e in _EITHER):
        raise ConfigError(f"{where}: `answer` is one answer and `answers` a whole group; take one of them")
    if clash := sorted(set(args) & {*_FILLED, *_EITHER}):
        raise ConfigError(f"{where}: args may not set {', '.join(clash)}; they are filled from the answer")
    unknown = sorted(set(args) - set(named))
    if unknown and not takes_any:
        raise ConfigError(f"{where} has no parameter {', '.join(unknown)}; correct reward.functions[].args")
    required = [n for n, p in named.items() if p.default is p.empty and n not in fields and n not in args]
    required += [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    if required:
        raise ConfigError(
            f"{where}: nothing fills {', '.join(required)}; parameters are filled from answer or answers, "
            f"{', '.join(_FILLED)}, and reward.functions[].args"
        )
    is_async = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)
    kind: Kind = "group" if "answers" in fields else "async" if is_async else "answer"
    return Function(name=name, call=call, kind=kind, fields=fields, args=args)


def locate(name: str, args: Mapping[str, Any]) -> str:
    """The name with its path made absolute. Imports no code of the user; a built-in is checked whole."""
    place, colon, function = name.rpartition(":")
    if not colon:
        if name not in VERIFIERS:
            raise ConfigError(_unknown(name))
        bind(name, VERIFIERS[name], args)
        return name
    if not function.isidentifier():
        raise ConfigError(f"reward function {name!r}: {function!r} is not a function's name")
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"reward function {name!r}: there is no file {path}")
        return f"{path}:{function}"
    if not all(part.isidentifier() for part in place.split(".")):
        raise ConfigError(f"reward function {name!r}: {place!r} is neither a module nor a .py file")
    return name


def digest(located: str) -> str | None:
    """Of the file that a function comes from; None of a built-in and of a module."""
    place, _, _ = located.rpartition(":")
    if not place.endswith(".py"):
        return None
    with Path(place).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, VERIFIERS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"reward function {name!r} is not built in; {hint}built-ins: {', '.join(sorted(VERIFIERS))}; "
        "a function of your own is `package.module:function` or `path.py:function`"
    )


def _file_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tandem_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def load(name: str, located: str, args: Mapping[str, Any]) -> Function:
    """Import the function and bind it. Runs in a worker: the import is the user's code."""
    place, colon, function = located.rpartition(":")
    if not colon:
        return bind(name, VERIFIERS[located], args)
    module = _file_module(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    if function not in vars(module):
        near = difflib.get_close_matches(function, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"reward function {name!r}: {place} has no {function!r}{hint}")
    call = vars(module)[function]
    if not callable(call):
        raise ConfigError(f"reward function {name!r}: {function!r} in {place} cannot be called")
    return bind(name, call, args)
