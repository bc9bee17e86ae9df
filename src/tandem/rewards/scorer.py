"""Answers in, scores out: the functions of `reward.functions`, run in workers, and the weighted sum of the reward."""

import itertools
import json
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

from tandem.config.reward import OVERLONG, Reward
from tandem.errors import SamplingError
from tandem.rewards.answer import Answer
from tandem.rewards.channel import HEADER
from tandem.rewards.function import digest, locate
from tandem.rewards.pool import Pool
from tandem.rewards.process import Task
from tandem.rewards.range import fits
from tandem.types import Score, ScoredBy

logger = logging.getLogger("tandem.rewards")

ASYNC_GRACE_S = 1.0
"""An async function is stopped at the deadline by its event loop; one that blocks is killed so much later."""

Place = tuple[int, int]


def overlong(tokens: int, max_answer_tokens: int, buffer: int, penalty: float) -> float:
    """DAPO's soft penalty: 0 up to the buffer before the limit, then linear to `-penalty` at the limit."""
    over = tokens - (max_answer_tokens - buffer)
    return min(-over / buffer * penalty, 0.0)


def _row_json(row: Mapping[str, Any]) -> str:
    """The row without columns that JSON cannot hold."""
    columns = []
    for name, value in row.items():
        try:
            columns.append(f"{json.dumps(str(name))}: {json.dumps(value)}")
        except (TypeError, ValueError):
            continue
    return "{" + ", ".join(columns) + "}"


def _answer_json(answer: Answer, row: str) -> str:
    fields = {
        "answer": answer.text,
        "truth": answer.truth,
        "question": answer.question,
        "tokens": answer.tokens,
        "finish": answer.finish,
    }
    return f'{json.dumps(fields)[:-1]}, "row": {row}}}'


class Scorer:
    """Workers start in the background at once. An unknown name, or arguments that do not fit a built-in,
    raise ConfigError here; one that cannot be imported or filled does so in `ready` or the first `score`."""

    def __init__(self, config: Reward, max_answer_tokens: int) -> None:
        self._config = config
        self._max_answer_tokens = max_answer_tokens
        self._weights: dict[ScoredBy | None, dict[str, float]] = {
            scored_by: {term.name: term.weight for term in config.terms_of(scored_by)}
            for scored_by in (None, "rule", "model")
        }
        functions = [
            {"name": f.name, "located": locate(f.name, f.args), "args": f.args} for f in config.functions
        ]
        self.digests = {f["name"]: digest(f["located"]) for f in functions}
        """What the files of the functions said when the run began, by name."""
        setup = {"functions": functions, "memory_mb": config.memory_mb, "timeout_s": config.timeout_s}
        self._numbers = itertools.count()
        self._pool = Pool(setup, config.workers)
        # Workers die with the thread that starts them, so it is one for all calls.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scoring")

    def compare(self, digests: Mapping[str, str | None]) -> None:
        """Warn of functions that were others when a run that goes on was saved."""
        for name, before in digests.items():
            if name in self.digests and self.digests[name] != before:
                logger.warning(
                    "reward.functions: the file of %s is not as it was when the checkpoint was saved; the steps from "
                    "here on are scored by what it says now. Restore the file if that is not meant",
                    name,
                )

    def ready(self) -> None:
        """Wait until the functions are imported; ConfigError if one cannot be."""
        self._pool.kinds()

    def score(self, groups: Sequence[Sequence[Answer]]) -> list[list[Score]]:
        """A score for each answer, in the same places, of a configuration without a model."""
        with self.scoring() as scoring:
            for place, group in enumerate(groups):
                scoring.add(place, group)
            scores = scoring.finish({})
        return [scores[place] for place in range(len(groups))]

    def scoring(self) -> "Scoring":
        """Begin to score groups that come one by one."""
        self._pool.check_open()
        return Scoring(self, self._pool, self._thread)

    def scores(
        self,
        groups: Mapping[int, Sequence[Answer]],
        tasks: Sequence[tuple[Task, list[Place]]],
        judged: Mapping[int, Sequence[float]],
    ) -> dict[int, list[Score]]:
        """What the outcomes of the tasks, and what the reward model said, mean for the answers of the groups, which
        are named by their places."""
        parts: dict[Place, dict[str, float]] = {}
        failures: dict[Place, tuple[str, str]] = {}
        for task, places in tasks:
            assert task.outcomes is not None
            for place, outcome in zip(places, task.outcomes, strict=True):
                if "failure" in outcome:
                    failures.setdefault(place, (outcome["failure"], outcome["detail"]))
                else:
                    parts.setdefault(place, {}).update(outcome["parts"])
        for place, value in (
            ((g, i), value) for g, values in judged.items() for i, value in enumerate(values)
        ):
            model = self._config.model
            assert model is not None
            if fits(value):
                parts.setdefault(place, {})[model.name] = value
            else:
                detail = f"{model.name}: the score is {value}; reward.model.path={model.path}"
                failures.setdefault(place, ("invalid", detail))
        return {
            g: [
                self._score(answer, parts.get((g, i), {}), failures.get((g, i)))
                for i, answer in enumerate(groups[g])
            ]
            for g in sorted(groups)
        }

    def tasks(self, place: int, group: Sequence[Answer]) -> Iterator[tuple[Task, list[Place]]]:
        """One task for each answer under all plain functions, one for the group under each other one; none for answers
        that the model alone scores."""
        kinds = self._pool.kinds()
        single = [i for i, kind in enumerate(kinds) if kind == "answer"]
        together = [i for i, kind in enumerate(kinds) if kind != "answer"]
        rows = {id(answer.row): answer.row for answer in group}
        row_texts = {key: _row_json(row) for key, row in rows.items()}
        places = [(place, i) for i, answer in enumerate(group) if answer.scored_by != "model"]
        texts = [_answer_json(group[i], row_texts[id(group[i].row)]) for _, i in places]
        for answer_place, text in zip(places, texts) if single else ():
            yield self._task(single, [text], self._config.timeout_s), [answer_place]
        for function in together if places else ():
            grace = ASYNC_GRACE_S if kinds[function] == "async" else 0.0
            yield self._task([function], texts, self._config.timeout_s + grace), places

    def _task(self, functions: Sequence[int], answers: Sequence[str], seconds: float) -> Task:
        number = next(self._numbers)
        body = f'{{"task": {number}, "functions": {list(functions)}, "answers": [{", ".join(answers)}]}}'
        data = body.encode("ascii")
        return Task(
            number=number,
            message=len(data).to_bytes(HEADER, "big") + data,
            size=len(answers),
            names=", ".join(self._config.functions[i].name for i in functions),
            seconds=seconds,
        )

    def _score(self, answer: Answer, parts: Mapping[str, float], failure: tuple[str, str] | None) -> Score:
        if failure is not None:
            return self._failed(answer, *failure)
        # In the order of the configuration, so that the sum does not depend on which worker was first.
        weights = self._weights[answer.scored_by]
        parts = {name: parts[name] for name in weights}
        terms = [weight * parts[name] for name, weight in weights.items()]
        config, penalty = self._config, 0.0
        if config.overlong_buffer:
            penalty = parts[OVERLONG] = overlong(
                answer.tokens, self._max_answer_tokens, config.overlong_buffer, config.overlong_penalty
            )
        if not all(map(fits, [*terms, sum(terms) + penalty])):
            return self._failed(answer, "invalid", f"the weighted sum of {parts} is beyond 32-bit numbers")
        merit = math.fsum(terms)
        if not config.overlong_buffer:
            return Score(reward=merit, parts=parts)
        return Score(reward=merit + penalty, merit=merit, parts=parts)

    def _failed(self, answer: Answer, kind: str, detail: str) -> Score:
        """A failure under the configured policy; one that counts as zero keeps its kind in the detail."""
        if self._config.on_failure == "raise":
            raise SamplingError(
                f"a reward failed ({kind}): {detail}. The question begins {answer.question[:80]!r}. "
                "With reward.on_failure=mask such answers are left out instead"
            )
        if self._config.on_failure == "zero":
            return Score(reward=0.0, detail=f"{kind}: {detail}")
        return Score(failure=kind, detail=detail)

    def close(self) -> None:
        """End the workers."""
        self._pool.close()
        self._thread.shutdown()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Dropped(Exception):
    """The scores are no longer wanted."""


class Scoring:
    """Groups that are scored from the moment they come, while their giver does other work.

    Example: `with scorer.scoring() as scoring: scoring.add(0, answers); scores = scoring.finish({})`. Who leaves it
    before `finish` drops what has no score yet.
    """

    def __init__(self, scorer: Scorer, pool: Pool, thread: ThreadPoolExecutor) -> None:
        self._scorer, self._pool = scorer, pool
        self._groups: dict[int, Sequence[Answer]] = {}
        self._tasks: list[tuple[Task, list[Place]]] = []
        self._arrived: deque[int] = deque()
        self._ended = self._dropped = False
        self.busy_s = 0.0
        """Once finished: seconds in which there was something to score."""
        self._work = thread.submit(pool.run, self._more)

    def add(self, place: int, group: Sequence[Answer]) -> None:
        """Score a group; raises what ended the scoring of others, if something did."""
        if self._work.done():
            self._work.result()
        self._groups[place] = group
        self._arrived.append(place)
        self._pool.ring()

    def finish(self, judged: Mapping[int, Sequence[float]]) -> dict[int, list[Score]]:
        """The scores by place; waits for those that are missing. `judged` is what the reward model, where the
        configuration has one, says of each answer of a place."""
        self._end(dropped=False)
        self.busy_s = self._work.result()
        return self._scorer.scores(self._groups, self._tasks, judged)

    def _more(self) -> list[Task] | None:
        """In the thread that scores."""
        if self._dropped:
            raise Dropped
        ended, first = self._ended, len(self._tasks)
        while self._arrived:
            place = self._arrived.popleft()
            self._tasks.extend(self._scorer.tasks(place, self._groups[place]))
        fresh = [task for task, _ in self._tasks[first:]]
        return None if ended and not fresh else fresh

    def _end(self, *, dropped: bool) -> None:
        self._ended, self._dropped = True, dropped
        self._pool.ring()

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._work.done():
            self._end(dropped=True)
            wait([self._work])
