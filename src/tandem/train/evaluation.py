"""Accuracy on held-out questions: the mean over several sampled answers, and greedy beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from tandem.config.run import Run
from tandem.data.prompts import PromptSet, load_prompts
from tandem.engine import SamplingParams
from tandem.errors import ConfigError
from tandem.rollout import EVAL, Sampler
from tandem.types import Group, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures by metric name, and the greedy answers for display."""

    figures: dict[str, float]
    greedy: list[Group]


def held_out_prompts(run: Run, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """The questions of `data.eval`; ConfigError where there is none to take the accuracy of."""
    assert run.data.eval is not None
    column = run.reward.column
    held_out = load_prompts(
        run.data, run.data.eval, tokenizer, limit=run.eval.questions, reward_column=column
    )
    if not any(marked(run, prompt) for prompt in held_out.prompts):
        others = [term.name for term in run.reward.terms_of(held_out.prompts[0].scored_by)]
        raise ConfigError(
            f"eval.correct: {run.correct} scores none of the {len(held_out.prompts):,} questions of data.eval="
            f"{run.data.eval}, as reward.column={column} says; set eval.correct to one of {others}, or hold out "
            "questions that it scores"
        )
    return held_out


def evaluate(run: Run, sampler: Sampler, prompts: Sequence[Prompt]) -> Evaluation:
    """The same questions and the same random draws every time, so that two evaluations differ by the weights alone."""
    serials = range(len(prompts))
    params = eval_params(run, sampler.params)
    sampled = sampler.sample(prompts, serials, answers=run.eval.answers, params=params, domain=EVAL)
    greedy = sampler.sample(prompts, serials, answers=1, params=replace(params, temperature=0.0), domain=EVAL)
    rollouts = [r for g in sampled for r in g.rollouts]
    rewards = [reward for g in sampled for reward in g.rewards]
    return Evaluation(
        figures={
            "eval/accuracy": accuracy(run, sampled),
            "eval/greedy_accuracy": accuracy(run, greedy),
            "eval/reward": mean(rewards),
            "eval/response_length": mean([r.answer_length for r in rollouts]),
            "eval/truncated_share": mean([r.finish == "length" for r in rollouts]),
        },
        greedy=greedy,
    )


def eval_params(run: Run, params: SamplingParams) -> SamplingParams:
    """The policy itself at the evaluation's temperature; where an answer ends is as in training."""
    return replace(
        params, temperature=run.eval.temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
    )


def marked(run: Run, prompt: Prompt) -> bool:
    """Whether the term of the reward that says what is correct scores the answers to a question."""
    return any(term.name == run.correct for term in run.reward.terms_of(prompt.scored_by))


def accuracy(run: Run, groups: Sequence[Group]) -> float:
    """Share of answers that the term `run.correct` of the reward is above 0 for; questions that it does not score, and
    answers whose scoring failed, are left out."""
    marks = [
        r.score.parts.get(run.correct)
        for g in groups
        if marked(run, g.prompt)
        for r in g.rollouts
        if r.score and r.score.failure is None
    ]
    return mean([mark is not None and mark > 0 for mark in marks])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
