"""From prompts to scored groups."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from tandem.config.run import Run
from tandem.engine import Completion, Request, SamplingParams, decode
from tandem.engine.random import key
from tandem.rewards.answer import Answer
from tandem.rewards.scorer import Scorer
from tandem.types import Group, Prompt, Rollout, Score

TRAIN, EVAL = 0, 1
"""Domains of the random keys: training and evaluation never share a draw."""
SECONDS = ("timing/rollout", "timing/reward", "timing/non_overlap_reward")
JUDGING = ("timing/reward_model", "timing/non_overlap_reward_model")
"""What the sampler keeps the time of, without a reward model and with one."""


class Engine(Protocol):
    """Tokens in, tokens out."""

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        poll: Callable[[int, int], None],
        on_done: Callable[[int, Completion], None],
    ) -> list[Completion]:
        """One completion per request, in order; `on_done(index, completion)` sees each as soon as it is there."""
        ...


class RewardModel(Protocol):
    """Scores answers, a few groups together."""

    def begin(self, unit: Sequence[Group]) -> Callable[[], tuple[Tensor, float]]:
        """Start on some groups, if that can be done while others are sampled; what is returned waits for the score of
        each answer, one after the other, and the seconds that these took."""
        ...


class Units:
    """Collects groups, which come in any order, into units of `size` neighbours; the last of `total` groups may make
    up a smaller one."""

    def __init__(self, size: int, total: int) -> None:
        self.size, self.total = size, total
        self._waiting: dict[int, dict[int, Group]] = {}

    def add(self, place: int, group: Group) -> list[Group]:
        """The groups of the unit, in order, that this one completes; none where others of it are missing."""
        unit = place // self.size
        groups = self._waiting.setdefault(unit, {})
        groups[place] = group
        if len(groups) < min(self.size, self.total - unit * self.size):
            return []
        return [group for _, group in sorted(self._waiting.pop(unit).items())]


class Judging:
    """The groups of one call of `sample` before the reward model, each unit as soon as its answers are there. `places`
    are those that it scores; units of `size` are made up of these alone, so none has nothing in it."""

    def __init__(self, model: RewardModel, places: Sequence[int], size: int, answers: int) -> None:
        self._model, self._places, self._answers = model, places, answers
        self._units = Units(size, len(places))
        self._ranks = {place: rank for rank, place in enumerate(places)}
        self._begun: dict[int, Callable[[], tuple[Tensor, float]]] = {}
        self.busy_s = 0.0
        """Once finished: seconds that the model took."""

    def add(self, place: int, group: Group) -> None:
        rank = self._ranks.get(place)
        if rank is not None and (unit := self._units.add(rank, group)):
            self._begun[rank // self._units.size] = self._model.begin(unit)

    def finish(self) -> dict[int, list[float]]:
        """The scores of the answers of each group that it scores, by place."""
        scores: dict[int, list[float]] = {}
        for number, result in self._begun.items():
            score_B, seconds = result()
            self.busy_s += seconds
            places = self._places[number * self._units.size :][: self._units.size]
            scores |= dict(zip(places, score_B.view(-1, self._answers).tolist(), strict=True))
        return scores


class Sampler:
    """Answers prompts with the engine and scores them meanwhile; `version` is that of the engine's weights."""

    def __init__(
        self,
        engine: Engine,
        scorer: Scorer,
        tokenizer: Any,
        run: Run,
        params: SamplingParams,
        stop_tokens: frozenset[int],
        reward_model: RewardModel | None = None,
    ) -> None:
        self.engine, self.scorer, self.tokenizer, self.run = engine, scorer, tokenizer, run
        self.reward_model = reward_model
        self.params = params
        self.stop_tokens = stop_tokens
        self.version = 0
        self.poll: Callable[[int, int, int], None] = lambda answers, tokens, total: None
        """Called while answers are sampled, with those done, tokens so far, and answers wanted; may raise."""
        self.on_group: Callable[[int, Group], None] = lambda place, group: None
        """Called in the thread that samples with each group of answers to train on as soon as these are complete, in
        whichever order that is and still without scores; `place` is that of its prompt in the call of `sample`."""
        self._timed = SECONDS if reward_model is None else SECONDS + JUDGING
        self._seconds = dict.fromkeys(self._timed, 0.0)
        self._generated = 0.0
        self._counting = threading.Lock()

    def sample(
        self,
        prompts: Sequence[Prompt],
        serials: Sequence[int],
        *,
        answers: int,
        params: SamplingParams | None = None,
        domain: int = TRAIN,
    ) -> list[Group]:
        """One scored group per prompt. A serial number keys the group's draws with the run's seed, so that neither
        batch order nor resume changes an answer. A group is scored while others are still being answered."""
        began = time.monotonic()
        requests = [
            Request(
                tokens=prompt.tokens,
                key=key(self.run.seed, domain, serial, prompt.id, i),
                version=self.version,
                keep=domain == TRAIN,
            )
            for prompt, serial in zip(prompts, serials)
            for i in range(answers)
        ]
        rollouts: list[dict[int, Rollout]] = [{} for _ in prompts]
        groups: dict[int, Group] = {}
        judging = self._judging(prompts, answers)
        with self.scorer.scoring() as scoring:

            def on_done(index: int, completion: Completion) -> None:
                place, number = divmod(index, answers)
                prompt, mine = prompts[place], rollouts[place]
                mine[number] = self._rollout(prompt, completion)
                if len(mine) == answers:
                    groups[place] = Group(prompt=prompt, rollouts=tuple(mine[i] for i in range(answers)))
                    scoring.add(place, to_score(groups[place]))
                    if judging is not None:
                        judging.add(place, groups[place])
                    if domain == TRAIN:
                        self.on_group(place, groups[place])

            self.engine.generate(
                requests,
                params or self.params,
                poll=lambda done, tokens: self.poll(done, tokens, len(requests)),
                on_done=on_done,
            )
            generated = time.monotonic()
            judged = {} if judging is None else judging.finish()
            waiting = time.monotonic()
            scores = scoring.finish(judged)
        seconds = {"timing/reward": scoring.busy_s, "timing/non_overlap_reward": time.monotonic() - waiting}
        if judging is not None:
            seconds["timing/reward_model"] = judging.busy_s
            seconds["timing/non_overlap_reward_model"] = waiting - generated
        self._count(began, generated, seconds, counts=domain == TRAIN)
        return [with_scores(groups[place], scores[place]) for place in range(len(prompts))]

    def take_seconds(self) -> dict[str, float]:
        """Time spent on answers to train on since the last call, by phase."""
        with self._counting:
            taken, self._seconds = self._seconds, dict.fromkeys(self._timed, 0.0)
        return taken

    def _count(self, began: float, generated: float, seconds: Mapping[str, float], *, counts: bool) -> None:
        """Where several are sampled side by side, time is counted once, and that of an evaluation never."""
        with self._counting:
            if counts:
                self._seconds["timing/rollout"] += max(0.0, generated - max(began, self._generated))
                for name, value in seconds.items():
                    self._seconds[name] += value
            self._generated = max(generated, self._generated)

    def _judging(self, prompts: Sequence[Prompt], answers: int) -> Judging | None:
        if self.reward_model is None:
            return None
        places = [place for place, prompt in enumerate(prompts) if prompt.scored_by != "rule"]
        return Judging(self.reward_model, places, self.run.unit(len(places), answers), answers)

    def _rollout(self, prompt: Prompt, done: Completion) -> Rollout:
        silent = len(prompt.tokens)
        visible = done.tokens[:-1] if done.tokens[-1] in self.stop_tokens else done.tokens
        return Rollout(
            tokens=prompt.tokens + done.tokens,
            sampled=(False,) * silent + (True,) * len(done.tokens),
            logp=(0.0,) * silent + done.logp,
            policy_logp=(0.0,) * silent + done.policy_logp,
            text=decode(self.tokenizer, visible),
            finish=done.finish,
            versions=(-1,) * silent + done.versions,
        )


def to_score(group: Group) -> list[Answer]:
    """The group's answers as reward functions see them."""
    return [
        Answer(
            text=r.text,
            truth=group.prompt.truth,
            question=group.prompt.question,
            row=group.prompt.row,
            tokens=r.answer_length,
            finish=r.finish,
            scored_by=group.prompt.scored_by,
        )
        for r in group.rollouts
    ]


def with_scores(group: Group, scores: Iterable[Score]) -> Group:
    return replace(group, rollouts=tuple(replace(r, score=s) for r, s in zip(group.rollouts, scores)))
