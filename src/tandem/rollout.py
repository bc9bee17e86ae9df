"""From a prompt to a scored group, and the stream of groups that training takes from."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol

from torch import Tensor

from tandem.config.run import Run
from tandem.config.sections import Sampling
from tandem.data.cursor import Cursor
from tandem.data.prompts import PromptSet
from tandem.engine import Completion, Request, SamplingParams, decode
from tandem.engine.random import key
from tandem.rewards.answer import Answer
from tandem.rewards.scorer import Scorer
from tandem.rewards.watch import FailureWatch
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
            judged = {} if judging is None else self._judged(judging)
            waiting = time.monotonic()
            scores = scoring.finish(judged)
        with self._counting:
            # Where several are sampled side by side, time is counted once.
            self._seconds["timing/rollout"] += max(0.0, generated - max(began, self._generated))
            self._generated = max(generated, self._generated)
            self._seconds["timing/reward"] += scoring.busy_s
            self._seconds["timing/non_overlap_reward"] += time.monotonic() - waiting
        return [with_scores(groups[place], scores[place]) for place in range(len(prompts))]

    def take_seconds(self) -> dict[str, float]:
        """Time spent since the last call, by phase."""
        with self._counting:
            taken, self._seconds = self._seconds, dict.fromkeys(self._timed, 0.0)
        return taken

    def _judging(self, prompts: Sequence[Prompt], answers: int) -> Judging | None:
        if self.reward_model is None:
            return None
        places = [place for place, prompt in enumerate(prompts) if prompt.scored_by != "rule"]
        return Judging(self.reward_model, places, self.run.unit(len(places), answers), answers)

    def _judged(self, judging: Judging) -> dict[int, list[float]]:
        """What the reward model says; the reward functions work meanwhile."""
        began = time.monotonic()
        scores = judging.finish()
        with self._counting:
            self._seconds["timing/reward_model"] += judging.busy_s
            self._seconds["timing/non_overlap_reward_model"] += time.monotonic() - began
        return scores

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


def mixed(group: Group) -> bool:
    """The group's rewards are not all equal: it has something to say."""
    return len(set(group.rewards)) > 1


KEEP: dict[str, Callable[[Group], bool]] = {"all": lambda group: True, "mixed": mixed}


Asked = tuple[Sequence[int], range]
"""Places of prompts in the data, and the serial numbers of their groups."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One step's groups, the scores of all that were sampled for it, and what there is to say of that."""

    groups: list[Group]
    scores: list[Score]
    figures: dict[str, float]


def lag_figures(groups: Sequence[Group], version: int, sampling: Sampling) -> dict[str, float]:
    """How old the groups of a step are, in steps; no token of them may be older than allowed."""
    rollouts = [r for g in groups for r in g.rollouts]
    lags = [version - r.oldest_version for r in rollouts]
    assert all(lag <= sampling.max_lag for lag in lags)
    if not lags:
        return {}
    figures = {"rollout/lag_mean": fmean(lags), "rollout/lag_max": max(lags)}
    if sampling.in_flight:
        carried = [r.newest_version > r.oldest_version for r in rollouts]
        token_lags = [version - v for r in rollouts for v in r.versions[r.prompt_length :]]
        figures |= {"rollout/carried_share": fmean(carried), "rollout/token_lag_mean": fmean(token_lags)}
    return figures


@dataclass(slots=True)
class Stream:
    """Hands out groups in the order of their prompts, none sampled more than `max_lag` steps before.

    With `max_lag` 0 each step's groups come from the weights of that step. `keep` is dynamic sampling: groups that it
    refuses are replaced by fresh ones, at most `max_refills` times per step.
    """

    sampler: Sampler
    prompts: PromptSet
    cursor: Cursor
    watch: FailureWatch
    ahead: deque[list[Group]] = field(default_factory=deque)
    """Steps sampled but not handed out."""
    newest: list[Group] = field(default_factory=list)
    """The groups sampled last, whose weights are the sampler's present ones."""
    last: dict[str, float] = field(default_factory=dict)
    """Figures of the newest sampling: refills and dropped groups."""

    def take(self, version: int) -> list[Group]:
        """The groups of the next step; `version` counts the steps whose weights were published."""
        run = self.sampler.run
        while len(self.ahead) <= run.sampling.max_lag:
            self.ahead.append(self._fresh())
        groups = self.ahead.popleft()
        self.last |= lag_figures(groups, version, run.sampling)
        return groups

    def _fresh(self) -> list[Group]:
        drawn = self.draw()
        self.watch.observe(drawn.scores)
        self.last = dict(drawn.figures)
        self.newest = drawn.groups
        return self.newest

    def ask(self, count: int | None = None) -> Asked:
        """The next prompts, a step's unless a `count` is given; the place in the data moves."""
        first = self.cursor.epoch * self.cursor.size + self.cursor.index
        rows = self.cursor.take(self.sampler.run.sampling.prompts_per_step if count is None else count)
        return rows, range(first, first + len(rows))

    def draw(self, asked: Asked | None = None) -> Drawn:
        """One step's groups, sampled now, of the prompts that were asked for before if any were; nothing but the place
        in the data moves."""
        run = self.sampler.run
        keep, wanted = KEEP[run.algorithm.keep], run.sampling.prompts_per_step
        kept: list[Group] = []
        scores: list[Score] = []
        rounds = dropped = 0
        while len(kept) < wanted and rounds <= run.algorithm.max_refills:
            rows, serials = asked if asked and not rounds else self.ask(wanted - len(kept))
            groups = self.sampler.sample(
                [self.prompts.prompts[i] for i in rows], serials, answers=run.sampling.answers_per_prompt
            )
            scores += [r.score for g in groups for r in g.rollouts if r.score is not None]
            if run.reward.permute:
                groups = permuted(groups, seed=key(run.seed, serials.start))
            good = [g for g in groups if keep(g)]
            dropped += len(groups) - len(good)
            kept += good
            rounds += 1
        # A step without any kept group trains on the last ones, whose equal rewards change nothing.
        return Drawn(
            kept or groups, scores, {"rollout/refills": rounds - 1, "rollout/dropped_groups": dropped}
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: the cursor, and groups sampled ahead."""
        return {
            "cursor": self.cursor.state(),
            "ahead": [[group_record(g) for g in groups] for groups in self.ahead],
        }

    def mark(self) -> Callable[[], dict[str, Any]]:
        """The state as it is at this moment, for whoever may want it later."""
        state = self.state()
        return lambda: state

    def restore(self, state: Mapping[str, Any]) -> None:
        self.cursor.restore(state["cursor"])
        self.ahead = deque([group_from(r, self.prompts) for r in groups] for groups in state["ahead"])


def permuted(groups: Sequence[Group], seed: int) -> list[Group]:
    """The same groups with their scores dealt out at random: the control in which nothing can be learned."""
    scores = [r.score for g in groups for r in g.rollouts if r.score is not None]
    random.Random(seed).shuffle(scores)
    deal = iter(scores)
    return [with_scores(g, [next(deal) for _ in g.rollouts]) for g in groups]


def group_record(group: Group) -> dict[str, Any]:
    """A group as plain JSON values; floats survive exactly."""
    names = ("tokens", "sampled", "logp", "policy_logp", "versions", "text", "finish")
    rollouts = []
    for r in group.rollouts:
        assert r.score is not None
        score = {
            "reward": r.score.reward,
            "failure": r.score.failure,
            "detail": r.score.detail,
            "parts": dict(r.score.parts),
        }
        rollouts.append({**{n: getattr(r, n) for n in names}, "score": score})
    return {"prompt": group.prompt.id, "rollouts": rollouts}


def group_from(record: Mapping[str, Any], prompts: PromptSet) -> Group:
    by_id = {p.id: p for p in prompts.prompts}
    rollouts = []
    for entry in record["rollouts"]:
        columns = {n: tuple(entry[n]) for n in ("tokens", "sampled", "logp", "policy_logp", "versions")}
        rollouts.append(Rollout(**{**entry, **columns, "score": Score(**entry["score"])}))
    return Group(prompt=by_id[record["prompt"]], rollouts=tuple(rollouts))
