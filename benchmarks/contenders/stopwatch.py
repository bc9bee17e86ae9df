"""Times a contender that samples: once to warm up, then `repeats` times with other seeds."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from job import Answer, Job
from memory import Watch

Generate = Callable[[int], list[Answer]]
"""Sample all answers with the given seed."""


def timed(
    job: Job, watch: Watch, generate: Generate, prepare: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """`prepare` runs before each generation and is not timed. The last answers go into the report, for the gate."""
    prepare()
    generate(job.seed)
    seconds, tokens = [], []
    answers: list[Answer] = []
    for repeat in range(job.repeats):
        prepare()
        began = time.perf_counter()
        answers = generate(job.seed + 1 + repeat)
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(len(answer.tokens) for answer in answers))
    return {
        "seconds": seconds,
        "tokens": tokens,
        "memory": watch.report(),
        "answers": [asdict(answer) for answer in answers],
    }


def until_end(tokens: list[int], end_tokens: list[int]) -> list[int]:
    """Up to the first end token, it included."""
    ends = set(end_tokens)
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens
