"""Accuracy on held-out questions: the mean over several sampled answers, and greedy beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tandem.config.run import Run
from tandem.rollout import EVAL, Sampler
from tandem.types import Group, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures by metric name, and the greedy answers for display."""

    figures: dict[str, float]
    greedy: list[Group]


def evaluate(run: Run, sampler: Sampler, prompts: Sequence[Prompt]) -> Evaluation:
    """The same questions and the same random draws every time, so that two evaluations differ by the weights alone."""
    serials = range(len(prompts))
    params = replace(
        sampler.params,
        temperature=run.eval.temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
    )
    sampled = sampler.sample(prompts, serials, answers=run.eval.answers, params=params, domain=EVAL)
    greedy = sampler.sample(prompts, serials, answers=1, params=replace(params, temperature=0.0), domain=EVAL)
    rollouts = [r for g in sampled for r in g.rollouts]
    rewards = [reward for g in sampled for reward in g.rewards]
    return Evaluation(
        figures={
            "eval/accuracy": accuracy(sampled, run.correct),
            "eval/greedy_accuracy": accuracy(greedy, run.correct),
            "eval/reward": mean(rewards),
            "eval/response_length": mean([r.answer_length for r in rollouts]),
            "eval/truncated_share": mean([r.finish == "length" for r in rollouts]),
        },
        greedy=greedy,
    )


def accuracy(groups: Sequence[Group], term: str) -> float:
    """Share of answers that this term of the reward is above 0 for; answers whose scoring failed are left out."""
    marks = [
        r.score.parts.get(term) for g in groups for r in g.rollouts if r.score and r.score.failure is None
    ]
    return mean([mark is not None and mark > 0 for mark in marks])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
