"""The groups that training takes, in the order of their prompts and at most so old."""

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from tandem.config.run import Run
from tandem.config.sections import Sampling
from tandem.data.cursor import Cursor
from tandem.data.prompts import PromptSet
from tandem.engine.random import key
from tandem.errors import RunError
from tandem.rewards.watch import FailureWatch
from tandem.rollout.sampler import Sampler, with_scores
from tandem.types import Group, Rollout, Score


def mixed(group: Group) -> bool:
    """The group's rewards, but for penalties of length, are not all equal: it has something to say of the task."""
    return len(set(on_merit(group).rewards)) > 1


def on_merit(group: Group) -> Group:
    """The group with its rewards before penalties of length."""
    scores = [r.score for r in group.rollouts if r.score is not None]
    return with_scores(group, [s if s.merit is None else replace(s, reward=s.merit) for s in scores])


KEEP: dict[str, Callable[[Group], bool]] = {"all": lambda group: True, "mixed": mixed}


Asked = tuple[Sequence[int], range]
"""Places of prompts in the data, and the serial numbers of their groups."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One step's groups, the scores of all that were sampled for it, and what there is to say of that."""

    groups: list[Group]
    scores: list[Score]
    figures: dict[str, float]

    def record(self) -> dict[str, Any]:
        """As JSON values, without the scores of groups that were not kept."""
        return {"groups": [group_record(g) for g in self.groups], "figures": self.figures}


def ahead_of(state: Mapping[str, Any], prompts: PromptSet, run: Run) -> list[Drawn]:
    """The steps of a checkpoint that were sampled but not handed out; RunError where there are more than may be."""
    steps, limit = state["ahead"], run.sampling.max_lag
    if len(steps) > limit:
        raise RunError(
            f"the checkpoint holds answers of {len(steps)} steps ahead, and sampling.max_lag={limit} allows {limit}; "
            f"go on with sampling.max_lag={len(steps)}, or begin anew with --fresh"
        )
    found = []
    for step in steps:
        groups = [group_from(record, prompts) for record in step["groups"]]
        scores = [r.score for g in groups for r in g.rollouts if r.score is not None]
        found.append(Drawn(groups, scores, step["figures"]))
    return found


def due(run: Run, version: int) -> int:
    """Steps whose groups are there or under way when the next is taken, itself among them: none beyond the last."""
    return min(run.sampling.max_lag + 1, max(1, run.steps - version))


def lag_figures(groups: Sequence[Group], version: int, sampling: Sampling) -> dict[str, float]:
    """How old the groups of a step are, in steps; RunError where a token of them is older than allowed."""
    rollouts = [r for g in groups for r in g.rollouts]
    lags = [version - r.oldest_version for r in rollouts]
    if not lags:
        return {}
    if max(lags) > sampling.max_lag:
        raise RunError(
            f"answers came that were sampled from weights of {max(lags)} steps before, and sampling.max_lag="
            f"{sampling.max_lag} allows {sampling.max_lag}: an engine did not take the weights that were published. "
            "Nothing was trained on them; go on from the last checkpoint"
        )
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
    ahead: deque[Drawn] = field(default_factory=deque)
    """Steps sampled but not handed out."""
    newest: list[Group] = field(default_factory=list)
    """The groups sampled last, whose weights are the sampler's present ones; none where all that is left of the run was
    sampled before."""
    last: dict[str, float] = field(default_factory=dict)
    """Figures of the groups handed out last: epoch, refills, dropped groups, lag."""

    def take(self, version: int) -> list[Group]:
        """The groups of the next step; `version` counts the steps whose weights were published."""
        run = self.sampler.run
        while len(self.ahead) < due(run, version):
            self.ahead.append(self._fresh())
        drawn = self.ahead.popleft()
        self.last = drawn.figures | lag_figures(drawn.groups, version, run.sampling)
        return drawn.groups

    def _fresh(self) -> Drawn:
        drawn = self.draw()
        self.watch.observe(drawn.scores)
        self.newest = drawn.groups
        return drawn

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
        # As the last prompt of this step sees it: those of later steps may have been asked for meanwhile.
        epoch = serials.stop / self.cursor.size
        figures = {"epoch": epoch, "rollout/refills": rounds - 1, "rollout/dropped_groups": dropped}
        # A step needs groups: where none was kept it has the last ones, with the rewards by which they were refused.
        # These are equal and set no answer above another; penalties of length would, and for nothing else.
        return Drawn(kept or [on_merit(g) for g in groups], scores, figures)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: the cursor, and groups sampled ahead."""
        return {
            "cursor": self.cursor.state(),
            "ahead": [drawn.record() for drawn in self.ahead],
        }

    def mark(self) -> Callable[[], dict[str, Any]]:
        """The state as it is at this moment, for whoever may want it later."""
        state = self.state()
        return lambda: state

    def restore(self, state: Mapping[str, Any]) -> None:
        self.cursor.restore(state["cursor"])
        self.ahead = deque(ahead_of(state, self.prompts, self.sampler.run))


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
            "merit": r.score.merit,
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
