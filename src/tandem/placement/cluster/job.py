"""What engines are asked for, and the part of it that one of them has."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from tandem.engine import PAUSED, Completion, Request, SamplingParams
from tandem.placement.cluster import port


@dataclass(slots=True, eq=False)
class Job:
    """What is asked for in one call, and what is there of it."""

    requests: list[Request]
    params: SamplingParams
    on_done: Callable[[int, Completion], None]
    waiting: deque[list[int]] = field(default_factory=deque)
    """Shares that no engine has."""
    done: dict[int, Completion] = field(default_factory=dict)
    tokens: int = 0
    """Of calls that ended."""
    error: BaseException | None = None
    """What ended another job of the same engines, and this one with it."""

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.requests)

    def take(self, index: int, completion: Completion) -> None:
        """An answer, whole or paused, from the engine that had it last."""
        if index in self.done:
            return
        if completion.finish == PAUSED:
            self.requests[index] = replace(self.requests[index], begun=completion)
        else:
            self.done[index] = completion
            self.on_done(index, completion)

    def put_back(self, indices: Sequence[int]) -> None:
        """What of these is not done goes to whichever engine is free next."""
        left = [i for i in indices if i not in self.done]
        if left:
            self.waiting.append(left)


@dataclass(slots=True)
class Work:
    """Answers that one engine has, each by its job and its index there."""

    number: int
    answers: list[tuple[Job, int]]
    call: port.Call
    news: port.Call | None = None
    asked: float = field(default_factory=time.monotonic)
    heard: int = 0
    """Answers that it told of while it works on others."""
    tokens: int = 0
    changed: float = field(default_factory=time.monotonic)
    """When its progress was last another one."""

    @property
    def wanted(self) -> bool:
        """Something of it is not known yet."""
        return any(index not in job.done for job, index in self.answers)

    def put_back(self) -> None:
        """As `Job.put_back`, each to its job."""
        for job in dict.fromkeys(job for job, _ in self.answers):
            job.put_back([index for owner, index in self.answers if owner is job])


def shares(requests: Sequence[Request], count: int) -> Iterator[list[int]]:
    """Indices of the requests in at most `count` shares of about equal size; those with one prompt, whose computation
    is shared, stay neighbours."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        places.setdefault(request.tokens, []).append(i)
    order = [i for indices in places.values() for i in indices]
    size = -(-len(order) // count)
    for start in range(0, len(order), size):
        yield order[start : start + size]
