"""Atomic export of a model as a plain Hugging Face folder, and the mark that lets a later export replace it."""

from collections.abc import Callable
from pathlib import Path

from tandem.checkpoint.disk import WRITE_ERRORS, durable, failure, make_folder
from tandem.checkpoint.swap import settle, stage, swap
from tandem.errors import RunError

MARK = ".tandem-export"
"""In each export: its files, a name a line. What holds any other file is more than an export."""
_MODELS = ("config.json", "adapter_config.json")
"""A folder that holds one of these is a model or an adapter."""
_SHOWN = 3


def export(model_save: Callable[[Path], None], target: Path) -> Path:
    """Let `model_save` write a model, and put it in the place of `target` once it is whole and on the disk.

    An older export is replaced; any other folder or file in that place is an error. Returns the real path.
    """
    target = target.resolve()
    if said := not_exported(target):
        raise RunError(f"{target} {said}; remove it, or export to a path that is not there yet")

    def save(folder: Path) -> None:
        model_save(folder)
        (folder / MARK).write_text("".join(f"{name}\n" for name in _names(folder)), encoding="utf-8")

    return put(save, target)


def put(model_save: Callable[[Path], None], target: Path) -> Path:
    """A model's folder in the place of `target`, whatever it replaces, whole and on the disk. Returns the real path."""
    target = target.resolve()
    try:
        make_folder(target.parent)
        settle(target.parent, lambda name: name == target.name)
        tmp = stage(target)
        model_save(tmp)
        if not any((tmp / name).is_file() for name in _MODELS):
            raise RunError(f"the model to export to {target} was saved without {' or '.join(_MODELS)}")
        durable(tmp)
        swap(tmp, target)
    except WRITE_ERRORS as error:
        raise failure("the exported model", target.parent, error) from error
    finally:
        settle(target.parent, lambda name: name == target.name)
    return target


def not_exported(target: Path) -> str:
    """What would be lost if an export took this place, in words; empty for an older export and where nothing is."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return ""
    if not (target / MARK).is_file():
        return f"exists and is no export of Tandem's (it has no {MARK})"
    ours = set((target / MARK).read_text(encoding="utf-8").splitlines())
    others = [name for name in _names(target) if name not in ours]
    if not others:
        return ""
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return f"holds what no export wrote: {', '.join(others[:_SHOWN])}{more}"


def _names(folder: Path) -> list[str]:
    """Of all that lies in it but folders and the mark, below it."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != MARK)
