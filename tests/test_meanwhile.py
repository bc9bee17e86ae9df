"""Answers are reported, and groups scored, while others are still being sampled."""

import time
from pathlib import Path

import pytest

from tandem.engine import EmbeddedEngine, Request, SamplingParams
from tandem.engine.random import key
from tandem.errors import ConfigError
from tandem.rewards.scorer import Scorer
from tandem.rollout import EVAL
from test_engine import PROMPTS, STOPS
from test_stream import make, model, scorer, settings  # noqa: F401
from tiny_models import language_model

SEEN = """from pathlib import Path
from time import sleep


def seen(answer: str, row: dict) -> float:
    (Path(row["folder"]) / row["question"]).touch()
    return float(answer)


def slow(answer: str, row: dict) -> float:
    sleep(0.2)
    return seen(answer, row)
"""


class Stop(Exception):
    """As a signal would."""


class Staged:
    """Gives its answers out in the order of `turns`, and calls `between` after each."""

    def __init__(self, engine, turns, between) -> None:
        self.engine, self.turns, self.between = engine, turns, between

    def generate(self, requests, params, *, poll, on_done):
        done = self.engine.generate(requests, params)
        for index in self.turns:
            on_done(index, done[index])
            poll(1, 1)
            self.between(index)
        return done


@pytest.fixture
def sampler(make, tmp_path):  # noqa: F811
    """A sampler whose rewards leave a trace: `(function, turns, between) -> (sampler, prompts)`."""
    (tmp_path / "own.py").write_text(SEEN)
    scorers = []

    def built(function: str, turns, between):
        stream = make("?" * 4)
        run = settings(tmp_path, reward={"functions": [{"name": f"{tmp_path / 'own.py'}:{function}"}]})
        scorers.append(Scorer(run.reward, run.sampling.max_answer_tokens))
        prompts = stream.prompts.prompts
        for prompt in prompts:
            prompt.row["folder"] = str(tmp_path)
        stream.sampler.scorer = scorers[-1]
        stream.sampler.engine = Staged(stream.sampler.engine, turns, between)
        return stream.sampler, prompts

    yield built
    for each in scorers:
        each.close()


def test_each_answer_is_reported_once_and_before_the_last_is_done():
    requests = [Request(tokens=p, key=key(7, i, a)) for i, p in enumerate(PROMPTS) for a in range(5)]
    params = SamplingParams(max_tokens=40, stop_tokens=STOPS)
    seen, known = {}, []

    def on_done(index, completion):
        assert index not in seen
        seen[index] = completion

    def poll(done, tokens):
        assert done == len(seen)
        known.append(done)

    engine = EmbeddedEngine(language_model("qwen3"), 10)
    done = engine.generate(requests, params, poll=poll, on_done=on_done)
    assert [seen[i] for i in range(len(requests))] == done
    assert list(seen) != sorted(seen), "in the order in which they end"
    assert len(set(known)) > 10


def test_a_group_is_scored_while_others_are_sampled(sampler, tmp_path):
    """The second group is complete first; nothing else is sampled before its reward functions were called."""
    reported = []

    def between(index):
        if index == 3 and len(reported) < 2:
            assert reported == [1]
            wait_for(tmp_path / "q1?")

    one, prompts = sampler("seen", [2, 0, 3, 1], between)
    one.on_group = lambda place, group: reported.append(place)
    groups = one.sample(prompts[:2], [0, 1], answers=2)
    assert reported == [1, 0]
    assert [g.prompt for g in groups] == list(prompts[:2])
    assert all(r.score.reward == float(r.text) for g in groups for r in g.rollouts)
    one.sample(prompts[:2], [0, 1], answers=2, domain=EVAL)
    assert reported == [1, 0], "training has no use for answers of an evaluation"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} was not scored meanwhile"
        time.sleep(0.01)


def test_only_what_scoring_is_waited_for_counts_as_not_overlapped(sampler):
    one, prompts = sampler("slow", [0, 1, 2], lambda index: time.sleep(0.4 * (index < 2)))
    one.scorer.ready()
    one.sample(prompts[:3], [0, 1, 2], answers=1)
    seconds = one.take_seconds()
    assert seconds["timing/rollout"] >= 0.8
    assert seconds["timing/reward"] >= 0.6 > 0.5 > seconds["timing/non_overlap_reward"] >= 0.2


def test_an_evaluation_takes_none_of_the_seconds_of_training(sampler):
    one, prompts = sampler("slow", [0, 1, 2], lambda index: time.sleep(0.1))
    one.scorer.ready()
    one.sample(prompts[:3], [0, 1, 2], answers=1, domain=EVAL)
    assert set(one.take_seconds().values()) == {0.0}
    one.sample(prompts[:3], [0, 1, 2], answers=1)
    one.sample(prompts[:3], [0, 1, 2], answers=1, domain=EVAL)
    seconds = one.take_seconds()
    assert seconds["timing/rollout"] >= 0.3 and seconds["timing/reward"] >= 0.6


def test_a_poll_that_raises_leaves_nothing_behind(sampler, tmp_path):
    one, prompts = sampler("slow", range(4), lambda index: None)

    def stop(answers, tokens, total):
        wait_for(tmp_path / "q0?")
        raise Stop

    one.poll = stop
    with pytest.raises(Stop):
        one.sample(prompts[:4], range(4), answers=1)
    (tmp_path / "q0?").unlink()
    one.poll = lambda answers, tokens, total: None
    groups = one.sample(prompts[1:3], [1, 2], answers=2)
    assert all(r.score.reward == float(r.text) for g in groups for r in g.rollouts)
    assert not (tmp_path / "q0?").exists(), "the scores that nobody waits for are not worked on"


def test_what_ends_the_scoring_ends_the_sampling(sampler, tmp_path):
    """A function that cannot be loaded is told before the last answer."""
    asked = []
    one, prompts = sampler("seen", range(400), asked.append)
    (tmp_path / "own.py").write_text("raise ImportError('gone')")
    one.scorer.close()
    run = settings(tmp_path, reward={"functions": [{"name": f"{tmp_path / 'own.py'}:seen"}]})
    with Scorer(run.reward, run.sampling.max_answer_tokens) as broken:
        one.scorer = broken
        one.engine.between = lambda index: (asked.append(index), time.sleep(0.05))
        with pytest.raises(ConfigError, match="gone"):
            one.sample(prompts[:4], range(4), answers=100)
    assert len(asked) < 400
