"""Tandem's embedded engine, as a run uses it."""

from typing import Any

from job import Answer, Job
from memory import Watch

from contenders.stopwatch import Generate, timed

SETTINGS = {"default": {}}
REQUIRES = ("tandem",)


def measure(job: Job) -> dict[str, Any]:
    model = loaded(job)
    return timed(job, Watch(job.device), generator(job, model))


def loaded(job: Job) -> Any:
    from tandem import device
    from tandem.config.sections import Model
    from tandem.model import load, tokenizer_of

    section = Model(path=job.folder, dtype=job.dtype)
    return load(section, tokenizer_of(section), device.pick(job.device))


def generator(job: Job, model: Any) -> Generate:
    from tandem.config.sections import Sampling
    from tandem.engine import EmbeddedEngine, Request, SamplingParams
    from tandem.engine.random import key

    engine = EmbeddedEngine(model, Sampling().slots)
    params = SamplingParams(max_tokens=job.max_tokens, stop_tokens=frozenset(job.end_tokens))
    rows = [(i, k) for i in range(len(job.prompts)) for k in range(job.answers)]

    def generate(seed: int) -> list[Answer]:
        requests = [Request(tokens=tuple(job.prompts[i]), key=key(seed, i, k)) for i, k in rows]
        done = engine.generate(requests, params)
        return [Answer(prompt=i, tokens=list(c.tokens), logp=list(c.logp)) for (i, _), c in zip(rows, done)]

    return generate
