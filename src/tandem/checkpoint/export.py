"""Atomic export of a model as a plain Hugging Face folder, without anything of Tandem in it."""

from collections.abc import Callable
from pathlib import Path

from tandem.checkpoint.disk import WRITE_ERRORS, durable, failure, make_folder
from tandem.checkpoint.swap import settle, stage, swap
from tandem.errors import RunError

_MARKS = ("config.json", "adapter_config.json")
"""A folder that holds one of these is a model or an adapter."""


def export(model_save: Callable[[Path], None], target: Path) -> Path:
    """Let `model_save` write a model, and put it in the place of `target` once it is whole and on the disk.

    An older export is replaced; any other folder or file in that place is an error. Returns the real path.
    """
    target = target.resolve()
    _check_place(target)
    try:
        make_folder(target.parent)
        settle(target.parent, lambda name: name == target.name)
        tmp = stage(target)
        model_save(tmp)
        if not _is_model(tmp):
            raise RunError(f"the model to export to {target} was saved without {' or '.join(_MARKS)}")
        durable(tmp)
        swap(tmp, target)
    except WRITE_ERRORS as error:
        raise failure("the exported model", target.parent, error) from error
    finally:
        settle(target.parent, lambda name: name == target.name)
    return target


def _check_place(target: Path) -> None:
    """Refuse to replace what is not an export: everything in the folder would be lost."""
    if not target.exists() or _is_model(target):
        return
    if not target.is_dir() or any(target.iterdir()):
        raise RunError(f"{target} exists and is not a model folder: export to a path that is not there yet")


def _is_model(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)
