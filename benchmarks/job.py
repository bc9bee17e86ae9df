"""What one contender is to do, as a file that its process reads; and what it says when it is done."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Sample `answers` answers to each prompt, or make a GRPO step of them; once to warm up, then `repeats` times."""

    folder: str
    """The model, as a Hugging Face folder."""
    prompts: list[list[int]]
    """Token ids; a step takes `prompts_per_step` of them, in order."""
    answers: int
    """Answers to each prompt."""
    max_tokens: int
    """Length at which an answer ends."""
    end_tokens: list[int]
    """Ids that end an answer before; none where every answer has the full length."""
    setting: str
    """Which of the contender's settings."""
    repeats: int
    seed: int
    threads: int
    device: str
    dtype: str
    prompts_per_step: int = 0
    beta: float = 0.0
    """Coefficient of the KL term; 0 for no reference."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Job":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A sampled answer, its end token included."""

    prompt: int
    """Index of its prompt."""
    tokens: list[int]
    logp: list[float]
    """Log-probability of each token; empty where the contender was not asked for it."""


def answers_from(values: list[dict[str, Any]]) -> list[Answer]:
    return [Answer(**value) for value in values]
