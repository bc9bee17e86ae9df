"""Folders of the driver for learners on nodes that do not see them: their files go through Ray's memory."""

import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.placement.cluster import port

PIECE = 1 << 26
"""Bytes of a file that are one object of Ray's."""

Files = list[tuple[str, list[Any]]]
"""Paths below a folder, each with the pieces of its file in Ray's memory, which live as long as this is held."""


def pack(folder: Path, but: Container[str] = ()) -> Files:
    """All files below a folder, or all but some; none where it is not there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    return [(name, list(_pieces(path))) for path, name in names.items() if name not in but]


def unpack(files: Files, folder: Path) -> None:
    """Write them below a folder."""
    for name, pieces in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for piece in pieces:
                file.write(port.fetch(piece))


@contextmanager
def at_hand(given: str | Files | None) -> Iterator[Path | None]:
    """A folder that this process sees, by its path, or one that is here for the time being, with these files."""
    if given is None or isinstance(given, str):
        yield None if given is None else Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="tandem-") as place:
        unpack(given, Path(place))
        yield Path(place)


@dataclass(frozen=True, slots=True)
class Carried:
    """Work on a folder that is elsewhere: what was in it comes along, and what the work puts there goes back with its
    value."""

    work: Callable[..., Any]
    files: Files

    def __call__(self, *arguments: Any) -> tuple[Any, Files]:
        with at_hand(self.files) as folder:
            assert folder is not None
            value = self.work(*(folder if isinstance(a, Path) else a for a in arguments))
            return value, pack(folder, but=dict(self.files))


def _pieces(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield port.share(piece)
