"""A small run and its answers, for the tests of the journal."""

import random
from pathlib import Path

from tandem.config import Run, load
from tandem.types import Group, Prompt, Rollout, Score


def run_of(folder: Path, *overrides: str) -> Run:
    path = folder / "run.yaml"
    text = (
        'model: {new: {}}\ndata: {train: "tandem:addition"}\nreward: {functions: [{name: answer_number}]}\n'
    )
    path.write_text(text, encoding="utf-8")
    return load(path, ["steps=10", "journal.sinks=[jsonl]", *overrides])


def groups(seed: int = 0) -> list[Group]:
    """Two prompts with two answers each: scored, failed, unscored, cut off."""
    draw = random.Random(seed)

    def rollout(text: str, finish: str, score: Score | None) -> Rollout:
        logp = (0.0, 0.0, -draw.random(), -draw.random())
        return Rollout(
            tokens=(5, 6, 9, 2),
            sampled=(False, False, True, True),
            logp=logp,
            policy_logp=tuple(2 * x for x in logp),
            text=text,
            finish=finish,
            versions=(-1, -1, 3, 4),
            score=score,
        )

    def prompt(row: int, question: str, truth: str | None) -> Prompt:
        return Prompt(id=row, tokens=(5, 6), text=f"<q>{question}", question=question, truth=truth, row={})

    right = Score(reward=1.0, parts={"answer_number": 1.0, "overlong": -0.25})
    failed = Score(failure="timeout", detail="10 s")
    return [
        Group(
            prompt=prompt(7, "1+1?", "2"),
            rollouts=(rollout("2\n", "stop", right), rollout("", "stop", failed)),
        ),
        Group(
            prompt=prompt(8, "ü?", None),
            rollouts=(
                rollout("\x1b[2J\ud800", "length", None),
                rollout("x", "stop", Score(reward=-1.0, parts={"answer_number": -1.0})),
            ),
        ),
    ]
