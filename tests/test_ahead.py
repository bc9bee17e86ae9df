"""Sampling beside training: the same groups as without it, at the time of the slower of the two."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

import pytest

from tandem.errors import RunError
from tandem.placement.cluster.ahead import AheadStream, Line, SamplerInLine
from tandem.rollout import EVAL
from test_stream import COIN, QUESTIONS, SURE, chain_model, make, model, publish, scorer, settings  # noqa: F401

STAGE_S = 0.5
STEPS = 8


class Stop(Exception):
    """As a signal would."""


class Sleeping:
    """An engine that takes its time; the answers are those of the engine inside."""

    def __init__(self, engine, seconds: float) -> None:
        self.engine, self.seconds, self.model = engine, seconds, engine.model
        self.threads: set[int] = set()
        self.took: list[float] = []
        """Seconds of each call: the sleep, and what the engine inside needs on this machine."""

    def generate(self, requests, params, *, poll, on_done):
        self.threads.add(threading.get_ident())
        began = time.monotonic()
        time.sleep(self.seconds)
        answers = self.engine.generate(requests, params, poll=poll, on_done=on_done)
        self.took.append(time.monotonic() - began)
        return answers


@pytest.fixture
def ahead(make):  # noqa: F811
    """A stream beside its training, and the line of its sampler."""
    lines = []

    def stream(*endings: str, seconds: float = 0.0, **sections):
        inner = make(*endings, **sections)
        inner.sampler.engine = Sleeping(inner.sampler.engine, seconds)
        lines.append(Line())
        return AheadStream(inner, lines[-1]), inner, lines[-1]

    yield stream
    for line in lines:
        line.close()


def serve(inner, line: Line, version: int) -> None:
    """New weights, after what was asked for before: as the engines take them."""
    line.submit(lambda: publish(inner, version))


@pytest.mark.parametrize("max_lag", [0, 1, 2])
def test_groups_are_those_of_one_process(ahead, make, chain_model, max_lag):  # noqa: F811
    sections = {"sampling": {"max_lag": max_lag}}
    plain = make(**sections)
    expected, epochs = [], []
    for version in range(6):
        publish(plain, version)
        expected.append(plain.take(version))
        epochs.append(plain.last["epoch"])
    beside, inner, line = ahead(**sections)
    for version in range(6):
        serve(inner, line, version)
        assert beside.take(version) == expected[version]
        assert beside.last["rollout/lag_max"] == min(version, max_lag)
        assert beside.last["epoch"] == epochs[version] == (version + 1) * 4 / QUESTIONS


@pytest.mark.alone
def test_a_step_takes_as_long_as_the_slower_stage(ahead):
    beside, inner, line = ahead(seconds=STAGE_S, sampling={"max_lag": 1})
    beside.take(0)
    began = time.monotonic()
    for version in range(1, STEPS + 1):
        time.sleep(STAGE_S)  # trains on the groups taken last
        line.submit(lambda version=version: setattr(inner.sampler, "version", version))
        beside.take(version)
    per_step, stage_s = (time.monotonic() - began) / STEPS, mean(inner.sampler.engine.took)
    assert STAGE_S <= stage_s < 1.5 * STAGE_S, "most of it is sleep"
    assert per_step <= 1.15 * stage_s, f"{per_step:.3f} s, the slower stage takes {stage_s:.3f} s"


def test_without_lag_nothing_overlaps_and_nothing_is_stale(ahead):
    beside, inner, line = ahead(seconds=STAGE_S, sampling={"max_lag": 0})
    began = time.monotonic()
    for version in range(3):
        line.submit(lambda version=version: setattr(inner.sampler, "version", version))
        groups = beside.take(version)
        assert {r.oldest_version for g in groups for r in g.rollouts} == {version}
        assert beside.last["timing/non_overlap_rollout"] >= STAGE_S
        time.sleep(STAGE_S)
    assert time.monotonic() - began >= 6 * STAGE_S


def test_groups_that_are_too_old_are_never_handed_out(ahead):
    beside, _, _ = ahead(sampling={"max_lag": 1})
    beside.take(0)
    with pytest.raises(
        RunError, match=r"weights of 3 steps before, and sampling\.max_lag=1 allows 1: an engine"
    ):
        beside.take(3)


def test_nothing_is_asked_for_beyond_the_last_step(ahead):
    beside, inner, line = ahead(steps=4, sampling={"max_lag": 2})
    for version in range(4):
        line.submit(lambda version=version: setattr(inner.sampler, "version", version))
        beside.take(version)
    line.submit(lambda: None).result()
    assert len(inner.sampler.engine.took) == 4 and beside.mark()()["ahead"] == []
    assert beside.cursor.state() == inner.cursor.state()


@pytest.mark.parametrize("sections", [
    {"sampling": {"max_lag": 0}},
    {"sampling": {"max_lag": 2}},
    {"sampling": {"max_lag": 1}, "algorithm": {"keep": "mixed", "max_refills": 3}},
])  # fmt: skip
def test_a_mark_is_the_moment_it_was_made(ahead, sections):
    endings = (COIN + SURE) * 6

    def advance(stream, inner, line, versions):
        taken = []
        for version in versions:
            line.submit(lambda version=version: setattr(inner.sampler, "version", version))
            tokens = [r.tokens for g in stream.take(version) for r in g.rollouts]
            taken.append((stream.last["epoch"], tokens))
        return taken

    whole = ahead(endings, **sections)
    advance(*whole, range(2))
    mark = whole[0].mark()
    expected = advance(*whole, range(2, 6))
    second = ahead(endings, **sections)
    second[0].restore(mark())
    assert advance(*second, range(2, 6)) == expected


def test_what_was_interrupted_is_drawn_anew_after_a_resume(ahead):
    beside, inner, _ = ahead(sampling={"max_lag": 1})
    beside.take(0)
    place = beside.cursor.state()
    beside._ahead[0].result()

    def stop(answers: int, tokens: int, total: int) -> None:
        raise Stop

    inner.sampler.poll = stop
    inner.sampler.version = 1
    groups = beside.take(1)
    state = beside.mark()()
    assert state["ahead"] == [] and state["cursor"] == beside.cursor.state() != place
    assert groups and all(g.rollouts for g in groups)
    with pytest.raises(Stop):
        beside.take(2)


def test_the_line_keeps_order_and_repeats_an_error():
    line, seen = Line(), []
    for i in range(20):
        line.submit(lambda i=i: seen.append(i))

    def fail() -> None:
        raise ValueError("the weights did not arrive")

    line.submit(fail)
    late = line.submit(lambda: seen.append("late"))
    with pytest.raises(ValueError, match="did not arrive"):
        late.result()
    assert seen == list(range(20))
    line.close()


def test_evaluation_waits_its_turn_and_runs_where_training_samples(ahead):
    beside, inner, line = ahead(sampling={"max_lag": 1}, seconds=0.1)
    sampler = SamplerInLine(inner.sampler, line)
    beside.take(0)
    with ThreadPoolExecutor(3) as crowd:
        prompts = beside.prompts.prompts[:2]
        asked = [crowd.submit(sampler.sample, prompts, [0, 1], answers=2, domain=EVAL) for _ in range(3)]
        groups = [future.result() for future in asked]
    assert groups[0] == groups[1] == groups[2]
    assert len(inner.sampler.engine.threads) == 1, "an engine has one user at a time"
