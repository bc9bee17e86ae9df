"""Messages between the parent and a worker: JSON behind a four-byte length, over a socket pair of their own.

JSON, because a reply from a process that ran a stranger's code must be able to do no worse than be wrong.
"""

import json
from collections.abc import Iterator
from typing import Any

HEADER = 4
MAX_REPLY = 16 << 20
"""A longer reply is a broken worker."""


def frame(message: Any) -> bytes:
    body = json.dumps(message).encode("ascii")
    return len(body).to_bytes(HEADER, "big") + body


class Inbox:
    """Bytes in, whole messages out. Raises ValueError at bytes that are no message."""

    def __init__(self, limit: int | None = None) -> None:
        self._bytes = bytearray()
        self._limit = limit

    def feed(self, data: bytes) -> Iterator[Any]:
        self._bytes += data
        start = 0
        while len(self._bytes) - start >= HEADER:
            size = int.from_bytes(self._bytes[start : start + HEADER], "big")
            if self._limit is not None and size > self._limit:
                raise ValueError(f"a message of {size} bytes")
            end = start + HEADER + size
            if len(self._bytes) < end:
                break
            yield json.loads(self._bytes[start + HEADER : end])
            start = end
        del self._bytes[:start]
