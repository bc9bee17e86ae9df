"""What the disk promises and how it fails: durable folders, free space, and errors a user can act on."""

import errno
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from tandem.errors import RunError

WRITE_ERRORS = (OSError, SafetensorError)
"""What writing raises; safetensors reports the system's errors under a type of its own."""


def make_folder(folder: Path) -> None:
    """Create the folder and what is missing above it, each entry on the disk before the next."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def durable(folder: Path) -> None:
    """Bring every file and folder below `folder`, and itself, to the disk.

    Files get the folder's permissions, since safetensors makes them readable to their owner alone.
    """
    mode = folder.stat().st_mode & 0o666
    for here, _, files in os.walk(folder, topdown=False, onerror=_raise):
        for name in files:
            path = Path(here, name)
            if not path.is_symlink():
                path.chmod(mode)
                _sync(path)
        sync_folder(Path(here))


def sync_folder(folder: Path) -> None:
    """Bring the entries of a folder to the disk, where the file system can."""
    try:
        _sync(folder)
    except OSError as error:
        # Some network file systems refuse this for folders; they order renames themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written at `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def failure(what: str, folder: Path, error: OSError | SafetensorError) -> RunError:
    """The error that names the folder, the bytes free and what to do."""
    try:
        free = f"{free_bytes(folder):,} bytes free there"
    except OSError:
        free = "free space unknown"
    advice = _ADVICE.get(_code(error), "Check the disk")
    return RunError(f"{what} could not be written to {folder}: {error} ({free}). {advice}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _raise(error: OSError) -> None:
    raise error


def _code(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else None


_SPACE = "Free some space, lower checkpoint.keep, or set run_dir to a folder on another disk"
_RIGHTS = "Make the folder writable for this user, or set run_dir to one that is"

_ADVICE = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: f"The quota of this user or group is used up. {_SPACE}",
    errno.EFBIG: "A file would exceed the limit on file sizes: raise it (ulimit -f), or use another disk",
    errno.EROFS: f"The file system is read-only. {_RIGHTS}",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
}
