"""What a worker may use, and that it does not outlive its parent."""

import ctypes
import resource
import signal
import sys
from contextlib import suppress

FILE_BYTES = 256 << 20
OPEN_FILES = 256
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """On Linux the kernel kills this process when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _lower(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
    # macOS refuses to bound the address space; the deadline still holds there.
    with suppress(ValueError, OSError):
        resource.setrlimit(what, (limit, limit))


def confine(memory_mb: int) -> None:
    """Bound address space, file size and open files, and leave no core files."""
    _lower(resource.RLIMIT_AS, memory_mb << 20)
    _lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    _lower(resource.RLIMIT_CORE, 0)
