"""The reward functions on real rows before the run: do they work, are they quick, do they tell right from wrong?"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from tandem.config.run import Run
from tandem.data import tasks
from tandem.journal import visible
from tandem.rewards.answer import Answer
from tandem.rewards.scorer import Scorer
from tandem.train.finding import Line, Status
from tandem.types import Prompt, Score

ROWS = 4
"""Rows tried, spread over the data."""
SECONDS = 15.0
"""After so long no further row is tried: the check is to be quick even where a reward is not."""

FORMS = {
    "the truth": "{truth}",
    "<answer>": "<think>x</think><answer>{truth}</answer>",
    "\\boxed": "\\boxed{{truth}}",
    "<answer>\\boxed": "<think>x</think><answer>\\boxed{{truth}}</answer>",
    "Answer:": "Answer: {truth}",
}
"""Ways in which an answer may present the truth; a reward that reads one of them scores it above nonsense."""
WRONG = {"empty": "", "nonsense": "qwertz zxcvb"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The scores of every form of answer, one per row tried."""

    scores: dict[str, list[Score]]
    rows: int
    seconds: float
    """Mean time of one answer."""

    @property
    def count(self) -> int:
        return sum(map(len, self.scores.values()))

    @property
    def failures(self) -> list[tuple[str, Score]]:
        return [(form, s) for form, scores in self.scores.items() for s in scores if s.failure is not None]

    def mean(self, form: str) -> float | None:
        rewards = [s.reward for s in self.scores[form] if s.reward is not None]
        return fmean(rewards) if rewards else None

    def best(self, *, wrong: bool) -> float | None:
        """Highest mean of the wrong forms, or of the others; None where nothing was scored."""
        means = [self.mean(form) for form in self.scores if (form in WRONG) is wrong]
        return max((m for m in means if m is not None), default=None)

    def constant_parts(self) -> dict[str, float]:
        """Reward functions that gave every answer the same, with that value."""
        parts: dict[str, set[float]] = {}
        for scores in self.scores.values():
            for score in scores:
                for name, value in score.parts.items():
                    parts.setdefault(name, set()).add(value)
        return {name: next(iter(values)) for name, values in parts.items() if len(values) == 1}


def try_rewards(
    run: Run, scorer: Scorer, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> Trial:
    """Score every form of answer to a few prompts. `scorer` must mask failures, so that they can be counted."""
    chosen = prompts[:: max(1, len(prompts) // ROWS)][:ROWS]
    scores: dict[str, list[Score]] = {}
    began = time.monotonic()
    tried = 0
    for prompt in chosen:
        texts = answers(run, prompt)
        group = [answer(prompt, text, tokenizer) for text in texts.values()]
        for form, score in zip(texts, scorer.score([group])[0]):
            scores.setdefault(form, []).append(score)
        tried += 1
        if time.monotonic() - began > SECONDS:
            break
    total = sum(map(len, scores.values()))
    return Trial(scores=scores, rows=tried, seconds=(time.monotonic() - began) / total)


def answers(run: Run, prompt: Prompt) -> dict[str, str]:
    """Answers to try, by what they are: the truth in its forms, a task's own demonstration, and wrong ones."""
    if prompt.truth is not None:
        texts = {form: text.replace("{truth}", prompt.truth) for form, text in FORMS.items()}
    else:
        texts = {"the question": prompt.question}
    if run.data.train.startswith("tandem:"):
        name = run.data.train.removeprefix("tandem:").partition(":")[0]
        texts["worked"] = tasks.find(name).right(dict(prompt.row))
    return texts | WRONG


def answer(prompt: Prompt, text: str, tokenizer: PreTrainedTokenizerBase) -> Answer:
    return Answer(
        text=text,
        truth=prompt.truth,
        question=prompt.question,
        row=prompt.row,
        tokens=len(tokenizer.encode(text, add_special_tokens=False)) + 1,
        finish="stop",
    )


def verdict(run: Run, trial: Trial) -> list[Line]:
    """Status and text of each finding."""
    failures = trial.failures
    share = len(failures) / trial.count
    step_s = trial.seconds * run.rollouts_per_step / run.reward.workers
    means = {form: trial.mean(form) for form in trial.scores}
    said = ", ".join(f"{form} {mean:g}" for form, mean in means.items() if mean is not None)
    lines: list[Line] = [
        (
            "ok",
            f"{trial.count} answers to {trial.rows} rows, {1000 * trial.seconds:.1f} ms each, "
            f"about {step_s:.2g} s a step; {said or 'no score at all'}",
        )
    ]
    if failures:
        form, score = failures[0]
        status: Status = "problem" if share > run.reward.max_failure_share else "warning"
        lines.append(
            (
                status,
                f"{len(failures)} of {trial.count} answers failed, the first ({form}): "
                f"{score.failure}, {visible(score.detail)}; failed answers are left out of training",
            )
        )
    return lines + flatness(trial)


def flatness(trial: Trial) -> list[Line]:
    """Warnings about rewards that cannot teach."""
    rewards = {s.reward for scores in trial.scores.values() for s in scores if s.reward is not None}
    if len(rewards) == 1:
        value = next(iter(rewards))
        return [
            (
                "warning",
                f"the reward is {value:g} for every answer, right, empty or nonsense: it teaches nothing",
            )
        ]
    lines: list[Line] = [
        ("warning", f"{name} is {value:g} for every answer") for name, value in trial.constant_parts().items()
    ]
    truth, wrong = trial.best(wrong=False), trial.best(wrong=True)
    if truth is not None and wrong is not None and truth <= wrong:
        lines.append(
            (
                "warning",
                f"no form of the truth scores above an empty or nonsense answer ({truth:g} against {wrong:g}): "
                "look at data.columns.truth, data.truth_after and the answer format that the reward expects",
            )
        )
    return lines
