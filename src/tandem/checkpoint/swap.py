"""Folders that appear whole or not at all: written beside their place, then renamed into it.

`NAME.tmp-<random>` is unfinished or doomed and never read. `NAME.old-<random>` is the complete folder that a
replacement set aside: it stands for NAME until the new one is in place, so that a crash between the two
renames loses nothing.
"""

import logging
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from tandem.checkpoint.disk import sync_folder

log = logging.getLogger("tandem.checkpoint")

_LEFTOVER = re.compile(r"(?P<target>.+)\.(?P<kind>tmp|old)-[0-9a-f]{12}")


def stage(target: Path) -> Path:
    """A new empty folder beside `target`, named as unfinished."""
    tmp = _beside(target, "tmp")
    tmp.mkdir()
    return tmp


def swap(tmp: Path, target: Path) -> None:
    """Put the finished `tmp` in the place of `target`; what stood there is left to `settle`."""
    if _present(target):
        target.rename(_beside(target, "old"))
    tmp.rename(target)
    sync_folder(target.parent)


def set_aside(name: str) -> str | None:
    """The name that a folder set aside stands for; None for any other folder."""
    match = _LEFTOVER.fullmatch(name)
    return match["target"] if match and match["kind"] == "old" else None


def leftover_of(name: str) -> str | None:
    """The name of which a folder is left over, unfinished or set aside; None for any other folder."""
    match = _LEFTOVER.fullmatch(name)
    return match["target"] if match else None


def settle(parent: Path, owned: Callable[[str], bool]) -> None:
    """End what a crash or an error left half done: unfinished folders go, and one set aside whose successor
    never came is put back. Only for names that `owned` accepts; what cannot be removed is reported."""
    try:
        entries = sorted(parent.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s could not be searched for leftovers: %s", parent, error)
        return
    for entry in entries:
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or not owned(match["target"]):
            continue
        target = parent / match["target"]
        try:
            if match["kind"] == "old" and not _present(target):
                entry.rename(target)
            else:
                discard(entry)
        except OSError as error:
            log.warning("%s is left over and could not be removed: %s", entry, error)


def discard(path: Path) -> None:
    """Delete a folder; a crash halfway leaves one that is named as unfinished, not a broken one."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    match = _LEFTOVER.fullmatch(path.name)
    if match is None or match["kind"] == "old":
        doomed = _beside(path.with_name(match["target"]) if match else path, "tmp")
        path.rename(doomed)
        path = doomed
    shutil.rmtree(path)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.{kind}-{secrets.token_hex(6)}")


def _present(path: Path) -> bool:
    return path.is_symlink() or path.exists()
