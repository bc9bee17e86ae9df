"""Megatron's .pt files without their code: tensors are mapped, every other object is an empty stand-in."""

import pickle
from pathlib import Path
from typing import Any

import torch

from tandem.errors import ConfigError


class Inert:
    """Stands for any object of a class that is not plain data; keeps nothing and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_mapped(path: Path) -> dict[str, Any]:
    """The dict that was saved, its tensors views of the file on disk.

    No class or function that the file names is imported or called: training arguments, generator states and the
    like become `Inert`. `ConfigError` for a file that cannot be read in this way.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as cause:
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read without running code that it may contain: {reason}. If you trust it, save its "
            "weights alone, where Megatron is installed: s = torch.load(PATH, weights_only=False); torch.save({k: v "
            'for k, v in s.items() if k.startswith("model")}, PATH)'
        ) from cause
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not the dict that Megatron saves")
    return content
