"""Bytes that a run's folder will hold, from its configuration alone. docs/cli.md says what is in them."""

from tandem.config.run import Run
from tandem.model.load import DTYPES
from tandem.train.footprint import FLOAT, Shape
from tandem.train.snapshot import keeps_reference


def folder_bytes(run: Run, shape: Shape, longest_prompt: int, critic_bytes: int = 0) -> dict[str, int]:
    """What the run folder will hold at its fullest: while a checkpoint is written the old ones are still there. Each
    has `critic_bytes` of a critic."""
    word = DTYPES[run.model.dtype].itemsize
    saved = shape.parameters if run.model.lora is None else shape.trainable
    one = saved * word + 2 * shape.trainable * FLOAT + critic_bytes
    if word != FLOAT or run.learner.optimizer.offload:
        one += shape.trainable * FLOAT
    if keeps_reference(run):
        one += shape.parameters * word
    every = run.checkpoint.every
    saves = 1 if every is None else max(1, -(-run.steps // every)) + (run.placement.kind != "inline")
    copies = min(run.checkpoint.keep + 1, saves)
    return {
        f"{copies} checkpoint{'s' * (copies > 1)}": copies * one,
        "exported model": shape.parameters * word,
        "rollout records": records(run, longest_prompt),
    }


def records(run: Run, longest_prompt: int) -> int:
    """At most so many bytes of rollout records: token ids, marks and log-probabilities are written as text."""
    if run.journal.rollouts == "none":
        return 0
    answer = run.sampling.max_answer_tokens
    one = 1000 + 16 * (longest_prompt + answer) + 46 * answer
    return run.rollouts_per_step * one * -(-run.steps // run.journal.rollouts_every)
