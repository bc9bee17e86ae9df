"""A guard for the test suite: Tandem's engine stays well ahead of Transformers' `generate` on a small model.

    python benchmarks/regression.py

Both sample the same number of tokens in this process, by turns; each one's fastest of several turns counts, because
what else a machine does can only slow a turn down. It is the ratio that is held, never a time.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import machine
from contenders import tandem_engine, transformers_generate
from contenders.stopwatch import Generate
from job import Job
from shape import FIRST_WORD, small

LEAST = 1.5
TURNS = 3


def speed_ratio(folder: Path, turns: int = TURNS) -> float:
    """How many times as fast as `generate` the engine samples 8 prompts x 8 answers x 32 tokens."""
    import torch

    shape = small(128, 4)
    shape.write(folder)
    rng = random.Random(0)
    job = Job(
        folder=str(folder),
        prompts=[[rng.randrange(FIRST_WORD, shape.vocab) for _ in range(80 + 5 * i)] for i in range(8)],
        answers=8,
        max_tokens=32,
        end_tokens=[],
        setting="log-probabilities",
        repeats=turns,
        seed=0,
        threads=machine.cores(),
        device="cpu",
        dtype=shape.dtype,
    )
    torch.set_num_threads(job.threads)
    ours = tandem_engine.generator(job, tandem_engine.loaded(job))
    theirs = transformers_generate.generator(job, transformers_generate.loaded(job))
    wanted = len(job.prompts) * job.answers * job.max_tokens
    best = {"ours": float("inf"), "theirs": float("inf")}
    for turn in range(1 + turns):
        for name, generate in (("ours", ours), ("theirs", theirs)):
            seconds = timed(generate, turn, wanted)
            if turn:  # the first one warms up
                best[name] = min(best[name], seconds)
    return best["theirs"] / best["ours"]


def timed(generate: Generate, seed: int, wanted: int) -> float:
    began = time.perf_counter()
    answers = generate(seed)
    seconds = time.perf_counter() - began
    made = sum(len(answer.logp) for answer in answers)
    if made != wanted:
        raise ValueError(f"{made} tokens with log-probabilities instead of {wanted}")
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = speed_ratio(Path(folder))
    print(f"{found:.2f} times as fast as generate; at least {LEAST} is held")
    sys.exit(found < LEAST)


if __name__ == "__main__":
    main()
