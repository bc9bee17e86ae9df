"""One process at a time in a run's folder: an advisory lock that the kernel drops when its holder dies.

POSIX only. The file stays when the lock is released, because deleting it would let two processes hold locks
on two files of the same name.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from tandem.checkpoint.disk import failure, make_folder
from tandem.errors import RunError

FILE = "lock"

_held: set[int] = set()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder, which is created if missing; RunError naming the holder if there is one."""
    fcntl = _posix()
    try:
        make_folder(folder)
        handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise failure("the lock of the run", folder, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(handle)
        os.close(handle)
        raise RunError(in_use(folder, holder)) from error
    except OSError as error:
        os.close(handle)
        raise RunError(f"{folder} cannot be locked ({error}): set another run_dir") from error
    _held.add(handle)
    try:
        _sign(folder, handle)
        yield
    finally:
        _release(handle)


def holder_of(folder: Path) -> str | None:
    """Who holds the folder, in words; None where nobody does. Nothing is made or changed."""
    fcntl = _posix()
    try:
        handle = os.open(folder / FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None  # There is no run, or none that this user could read.
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(handle)
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


def in_use(folder: Path, holder: str) -> str:
    return f"{folder} is in use by {holder}. Wait for it to end, or set another run_dir"


def _posix() -> ModuleType:
    try:
        import fcntl
    except ImportError as error:
        raise RunError("locking a run folder needs a POSIX system (Linux, macOS, or Windows' WSL)") from error
    return fcntl


def _sign(folder: Path, handle: int) -> None:
    """Write who holds the lock."""
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
    except OSError as error:
        raise failure("the lock of the run", folder, error) from error


def _holder(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process that has only just started"


def _release(handle: int) -> None:
    """Empty the file and let go; a forked child no longer has the handle and must not touch its parent's."""
    if handle not in _held:
        return
    _held.discard(handle)
    try:
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _drop_in_child() -> None:
    """A forked child would keep the lock alive after its parent's death."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)
