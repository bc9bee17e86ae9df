"""The checkpoints of a run: save one atomically, find the newest valid one, keep a few.

The caller holds the run folder's lock while it saves. Reading needs none.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from tandem.checkpoint.disk import WRITE_ERRORS, durable, failure, free_bytes, make_folder
from tandem.checkpoint.manifest import FILE, list_problems, read_manifest, seal, step_of, verify
from tandem.checkpoint.swap import discard, set_aside, settle, stage, swap
from tandem.errors import RunError

log = logging.getLogger("tandem.checkpoint")

HEADROOM = 1.1
"""Free space asked for before a save, as a multiple of the expected size."""


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    config_hash: str,
    keep: int,
    expected_bytes: int | None = None,
) -> Path:
    """Save `step` under `folder` and return its path, or raise RunError and leave the folder as it was.

    `write` puts the files into the folder it is given. The checkpoint is on the disk and verified before it
    gets its name; only then are older ones deleted, such that the newest `keep` valid ones stay.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step={step} must be at least 0 and keep={keep} at least 1")
    final = folder / f"step_{step:08d}"
    try:
        make_folder(folder)
        clean(folder)
        _check_space(folder, expected_bytes)
        tmp = stage(final)
        write(tmp)
        seal(tmp, step=step, config_hash=config_hash)
        durable(tmp)
        problems = verify(tmp)
        if problems:
            raise RunError(
                f"checkpoint {final.name} in {folder} did not read back as written and was removed: "
                f"{list_problems(problems)}. Check the disk"
            )
        if not _identical(tmp, final):
            swap(tmp, final)
    except WRITE_ERRORS as error:
        raise failure(f"checkpoint {final.name}", folder, error) from error
    finally:
        clean(folder)
    _retire(folder, step, keep)
    return final


def newest(folder: Path, *, strict: bool = False) -> Path | None:
    """The valid checkpoint of the highest step; None if there is no checkpoint at all.

    A broken one is reported and passed over; with `strict` it is an error. It is always an error when there
    are checkpoints and none is valid: the run must not silently start over.
    """
    broken = []
    for _, path in _steps(folder):
        problems = verify(path)
        if not problems:
            return path
        if not path.exists():
            # A run that goes on has retired it, so there is a newer one.
            return newest(folder, strict=strict)
        broken.append(f"checkpoint {path} is broken: {list_problems(problems)}")
        if strict:
            raise RunError(f"{broken[0]}. Move it away, or resume without strict to use an older one")
        log.warning("%s; looking for an older one", broken[-1])
    if broken:
        raise RunError(
            f"{folder} has {len(broken)} checkpoint(s) and none is valid; {broken[0]}. "
            "Move them away to start from the beginning"
        )
    return None


def clean(folder: Path) -> None:
    """Remove what an interrupted save left behind, and finish what it had begun."""
    settle(folder, lambda name: step_of(name) is not None)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Steps and their folders, highest first; one set aside counts where its successor is not in place."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        name = set_aside(path.name) or path.name
        step = step_of(name)
        if step is None or ".tmp-" in name or (name != path.name and (folder / name).exists()):
            continue
        found.append((step, path))
    return sorted(found, reverse=True)


def _check_space(folder: Path, expected_bytes: int | None) -> None:
    """Refuse to begin what would not fit, judging by the last checkpoint unless the size is given."""
    expected = _last_size(folder) if expected_bytes is None else expected_bytes
    need, free = int(HEADROOM * expected), free_bytes(folder)
    if need > free:
        raise RunError(
            f"{folder} has {free:,} bytes free and the checkpoint needs about {need:,}: nothing was written. "
            "Free some space, lower checkpoint.keep, or set run_dir to a folder on another disk"
        )


def _last_size(folder: Path) -> int:
    for _, path in _steps(folder):
        try:
            return read_manifest(path).size
        except RunError as error:
            log.warning("%s is passed over when estimating the space needed: %s", path, error)
    return 0


def _identical(tmp: Path, final: Path) -> bool:
    """Whether the place already holds a valid checkpoint with the same contents."""
    return not verify(final) and (tmp / FILE).read_bytes() == (final / FILE).read_bytes()


def _retire(folder: Path, step: int, keep: int) -> None:
    """Delete what is older than the newest `keep` valid checkpoints up to `step`, which is one of them.

    Those of a higher step belong to another course of the run and are not touched. Failing to delete does not
    fail the save.
    """
    kept = 1
    for other, path in _steps(folder):
        if other > step:
            log.warning("%s is of a later step than the one just saved: a resume takes it first", path)
        elif other < step and kept < keep:
            problems = verify(path)
            kept += not problems
            if problems:
                log.warning("%s is broken and not counted: %s", path, list_problems(problems))
        elif other < step:
            try:
                discard(path)
            except OSError as error:
                log.warning("old checkpoint %s could not be deleted: %s", path, error)
