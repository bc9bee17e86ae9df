"""Sampler and stream: every group in its turn, none older than allowed, and all of it again after a resume.

The networks are scripted chains (a letter leads to a digit, a digit to the end), so that what an answer must be is
known; engine, scorer and data are the real ones.
"""

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from tandem.config import Run
from tandem.data.cursor import Cursor
from tandem.data.prompts import load_prompts
from tandem.engine import EmbeddedEngine
from tandem.errors import RunError
from tandem.placement.inline import sampling_params
from tandem.rewards.scorer import Scorer
from tandem.rewards.watch import FailureWatch
from tandem.rollout import EVAL, Sampler, Stream, group_from, group_record, mixed, permuted
from tandem.types import Score
from tiny_models import chain, rewrite, spelled

END = 258
QUESTIONS = 12
DIGITS = [15 + digit for digit in range(10)]
COIN, SURE = "?", "!"
"""A question that ends in ? is answered 0 or 1 by a coin, one that ends in ! always 1. The truth is 1."""


def rules(heads: str = "1", tails: str = "0") -> dict[int, dict[int, float]]:
    """For a chain over the byte vocabulary."""
    token = dict(zip("0123456789", DIGITS))
    table = {30: {token[tails]: 0.5, token[heads]: 0.5}, 0: {token[heads]: 1.0}}
    return table | {digit: {END: 1.0} for digit in DIGITS}


@pytest.fixture(scope="module")
def model():
    made = chain(rules())
    assert spelled(made, "0123456789?!") == [*DIGITS, 30, 0]
    return made


@pytest.fixture
def chain_model(model):
    yield model
    rewrite(model, rules())


def settings(folder, **sections) -> Run:
    return Run.model_validate(
        {
            "run_dir": "unused",
            "seed": 3,
            "model": {"new": {}},
            "data": {"train": str(folder / "q.jsonl"), "template": "plain"},
            "reward": {
                "functions": [{"name": "answer_number", "args": {"tag": None}}],
                **sections.get("reward", {}),
            },
            "sampling": {
                "prompts_per_step": 4,
                "answers_per_prompt": 6,
                "max_answer_tokens": 3,
                **sections.get("sampling", {}),
            },
            "algorithm": {"kl": {"coef": 0.0}, **sections.get("algorithm", {})},
            "placement": sections.get("placement", {}),
            "steps": sections.get("steps", 100),
        }
    )


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    run = settings(tmp_path_factory.mktemp("scorer"))
    with Scorer(run.reward, run.sampling.max_answer_tokens) as scorer:
        scorer.ready()
        yield scorer


@pytest.fixture
def make(tmp_path, model, scorer):
    """A fresh stream over questions with the given endings."""

    def stream(endings: str = COIN * QUESTIONS, **sections) -> Stream:
        rows = [{"question": f"q{i}{end}", "answer": "1"} for i, end in enumerate(endings)]
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = settings(tmp_path, **sections)
        prompts = load_prompts(run.data, run.data.train, model.tokenizer)
        params = sampling_params(run, prompts.template, model.tokenizer)
        engine = EmbeddedEngine(model, slots=16)
        sampler = Sampler(engine, scorer, model.tokenizer, run, params, model.stop_tokens)
        cursor = Cursor(len(prompts.prompts), run.seed, shuffle=True)
        return Stream(sampler=sampler, prompts=prompts, cursor=cursor, watch=FailureWatch(0.2))

    return stream


def publish(stream: Stream, version: int) -> None:
    """New weights: those of version v answer every question with the digit v."""
    rewrite(stream.sampler.engine.model, rules(heads=str(version), tails=str(version)))
    stream.sampler.version = version


def steps(stream: Stream, versions):
    """Groups of each step, the weights standing still."""
    for version in versions:
        stream.sampler.version = version
        yield stream.take(version)


def texts(groups):
    return [[r.text for r in g.rollouts] for g in groups]


def test_rollouts_are_complete_scored_and_without_their_end_token(make):
    groups = make(COIN * 4).take(0)
    rollouts = [r for g in groups for r in g.rollouts]
    assert len(groups) == 4 and len(rollouts) == 24
    for group in groups:
        silent = len(group.prompt.tokens)
        for r in group.rollouts:
            assert r.tokens[:silent] == group.prompt.tokens and r.prompt_length == silent
            assert r.sampled == (False,) * silent + (True, True) and r.answer_length == 2
            assert r.text in ("0", "1") and r.tokens[-1] == END and r.finish == "stop"
            assert r.score.parts == {"answer_number": r.score.reward}
            assert r.score.reward == (1.0 if r.text == "1" else -1.0)
            assert r.policy_logp[silent:] == r.logp[silent:] and set(r.logp[:silent]) == {0.0}
            assert r.logp[silent] == pytest.approx(torch.tensor(0.5).log().item(), abs=1e-4)
    assert 4 < sum(r.text == "1" for r in rollouts) < 20, "both sides of the coin"


def test_an_answer_that_runs_into_the_limit_says_so(make):
    stream = make(COIN, sampling={"max_answer_tokens": 1, "prompts_per_step": 1})
    for r in stream.take(0)[0].rollouts:
        assert (r.finish, r.answer_length) == ("length", 1) and r.text in ("0", "1")


@pytest.mark.parametrize("max_lag", [0, 1, 2])
def test_no_group_is_older_than_the_lag_and_says_which_weights_made_it(make, chain_model, max_lag):
    stream = make(sampling={"max_lag": max_lag})
    for version in range(8):
        publish(stream, version)
        groups = stream.take(version)
        lag = min(version, max_lag)
        for r in (r for g in groups for r in g.rollouts):
            assert r.text == str(r.oldest_version) == str(r.newest_version), (
                "labelled by the weights that made it"
            )
            assert version - r.oldest_version == lag
        assert stream.last["rollout/lag_max"] == stream.last["rollout/lag_mean"] == lag
        assert len(stream.ahead) == max_lag


def test_groups_of_weights_that_are_too_old_are_never_handed_out(make):
    stream = make(sampling={"max_lag": 1})
    stream.take(0)
    with pytest.raises(
        RunError, match=r"weights of 3 steps before, and sampling\.max_lag=1 allows 1: an engine"
    ):
        stream.take(3)


@pytest.mark.parametrize("max_lag", [0, 2, 5])
def test_nothing_is_sampled_beyond_the_last_step(make, max_lag):
    whole, bounded = (make(steps=steps, sampling={"max_lag": max_lag}) for steps in (100, 4))
    for version in range(4):
        for stream in (whole, bounded):
            stream.sampler.version = version
        assert bounded.take(version) == whole.take(version) and bounded.last == whole.last
        assert len(bounded.ahead) == min(max_lag, 3 - version)
    assert bounded.cursor.take(1) == Cursor(QUESTIONS, seed=3, shuffle=True).take(17)[-1:]


@pytest.mark.parametrize("max_lag", [0, 2])
def test_groups_come_in_the_order_of_the_prompts_and_epochs(make, max_lag):
    stream = make(sampling={"max_lag": max_lag})
    taken = [g.prompt.id for groups in steps(stream, range(7)) for g in groups]
    cursor = Cursor(QUESTIONS, seed=3, shuffle=True)
    assert taken == cursor.take(28)
    assert sorted(taken[:12]) == sorted(taken[12:24]) == list(range(12)) and taken[:12] != taken[12:24]


def test_lag_does_not_change_the_answers_while_weights_stand_still(make):
    """Draws are keyed by place in the data, not by when they happen."""
    streams = [make(sampling={"max_lag": lag}) for lag in (0, 2)]
    for now, early in zip(*(steps(stream, range(4)) for stream in streams), strict=True):
        assert [g.prompt for g in now] == [g.prompt for g in early] and texts(now) == texts(early)
        assert [g.rewards for g in now] == [g.rewards for g in early]


def test_a_question_is_answered_anew_in_each_epoch_and_by_other_draws_in_evaluation(make):
    stream = make(COIN * 2, sampling={"prompts_per_step": 2, "answers_per_prompt": 40})
    epochs = {g.prompt.id: g for g in stream.take(0)}, {g.prompt.id: g for g in stream.take(0)}
    assert texts([epochs[0][0]]) != texts([epochs[1][0]])
    sampler, prompts = stream.sampler, stream.prompts.prompts
    train, again = (sampler.sample(prompts, [0, 1], answers=40) for _ in range(2))
    held_out = sampler.sample(prompts, [0, 1], answers=40, domain=EVAL)
    assert train == again and texts(train) != texts(held_out)
    one = sampler.sample(prompts[1:], [1], answers=3)
    assert texts(one)[0] == texts(train)[1][:3], "a group does not depend on its neighbours or its size"


def test_dynamic_sampling_replaces_groups_with_nothing_to_say_by_fresh_ones(make):
    stream = make((COIN + SURE * 2) * 8, algorithm={"keep": "mixed", "max_refills": 20})
    seen = []
    for version in range(2):
        stream.sampler.version = version
        before = stream.cursor.epoch * stream.cursor.size + stream.cursor.index
        groups = stream.take(version)
        drawn = stream.cursor.epoch * stream.cursor.size + stream.cursor.index - before
        assert len(groups) == 4 and all(mixed(g) and g.prompt.text.endswith(COIN) for g in groups)
        assert stream.last["rollout/refills"] > 0
        assert stream.last["rollout/dropped_groups"] == drawn - 4, "every prompt drawn is kept or counted"
        seen += [g.prompt.id for g in groups]
    order = [row for row in Cursor(24, seed=3, shuffle=True).take(48) if row % 3 == 0]
    assert seen == [row for row in order if row in seen][: len(seen)], "in the order of the prompts"


def test_a_penalty_of_length_alone_makes_no_group_worth_training_on(make):
    group = make().take(0)[0]
    assert (-1.0 + -0.15) + 0.15 != -1.0, "what was added cannot be taken away again"
    wrong = [
        Score(reward=-1.0 + p, merit=-1.0, parts={"right": -1.0, "overlong": p}) for p in (0.0, -0.15, -0.75)
    ]
    right = Score(reward=0.5, merit=1.0, parts={"right": 1.0, "overlong": -0.5})

    def scored(scores):
        return replace(group, rollouts=tuple(replace(group.rollouts[0], score=s) for s in scores))

    assert not mixed(scored(wrong)) and mixed(scored([*wrong, right]))
    assert not mixed(scored([*wrong, Score(failure="timeout")])), "a failure says nothing"


def test_dynamic_sampling_gives_up_after_the_bound_with_a_step_that_teaches_nothing(make):
    stream = make(SURE * QUESTIONS, algorithm={"keep": "mixed", "max_refills": 2})
    groups = stream.take(0)
    assert stream.cursor.index == 12, "three rounds of four"
    assert len(groups) == 4 and not any(mixed(g) for g in groups)
    assert stream.last["rollout/refills"] == 2 and stream.last["rollout/dropped_groups"] == 12


@pytest.fixture
def rambling(make, chain_model):
    """A stream whose answers to some questions, all wrong, differ in length alone, and the model that gives them."""
    overlong = {"overlong_buffer": 7, "overlong_penalty": 1.0}
    zero = DIGITS[0]
    table = {30: {zero: 0.5, DIGITS[1]: 0.5}, 0: {zero: 1.0}, zero: {END: 0.5, zero: 0.5}}
    rewrite(chain_model, rules() | table)

    def stream(endings: str, **sections) -> Stream:
        made = make(endings, reward=overlong, sampling={"max_answer_tokens": 8}, **sections)
        made.sampler.scorer = opened.enter_context(Scorer(made.sampler.run.reward, 8))
        return made

    with ExitStack() as opened:
        yield stream


def test_a_step_of_equally_wrong_answers_teaches_nothing_of_their_length(rambling):
    stream = rambling(SURE * QUESTIONS, algorithm={"keep": "mixed", "max_refills": 1})
    groups = stream.take(0)
    assert len(groups) == 4 and stream.last["rollout/dropped_groups"] == 8
    penalties = {r.score.parts["overlong"] for g in groups for r in g.rollouts}
    assert len(penalties) > 3, "there was something to learn of length"
    assert {reward for g in groups for reward in g.rewards} == {-1.0}


def test_groups_that_are_kept_have_their_penalties_of_length(rambling):
    groups = rambling(COIN * QUESTIONS, algorithm={"keep": "mixed"}).take(0)
    scores = [r.score for g in groups for r in g.rollouts]
    assert all(s.reward == s.merit + s.parts["overlong"] for s in scores)
    assert all(s.merit == s.parts["answer_number"] for s in scores) and any(
        s.reward != s.merit for s in scores
    )


def test_dynamic_sampling_goes_on_with_fewer_groups_rather_than_none(make):
    """One coin among eleven sure ones: one round more is not enough to find four."""
    stream = make(COIN + SURE * 11, algorithm={"keep": "mixed", "max_refills": 2})
    groups = stream.take(0)
    assert [g.prompt.id for g in groups] == [0] and mixed(groups[0])


@pytest.mark.parametrize("sections", [
    {"sampling": {"max_lag": 0}},
    {"sampling": {"max_lag": 2}},
    {"sampling": {"max_lag": 1}, "algorithm": {"keep": "mixed", "max_refills": 3}, "reward": {"permute": True}},
])  # fmt: skip
def test_a_restored_stream_goes_on_exactly_where_it_was(make, chain_model, sections):
    """Through JSON, with groups sampled ahead by weights that no longer exist."""
    endings = (COIN + SURE) * 6

    def advance(stream, versions):
        taken = []
        for version in versions:
            rewrite(stream.sampler.engine.model, rules("1", str(version % 2)))
            stream.sampler.version = version
            taken.append((stream.take(version), dict(stream.last)))
        return taken

    whole = make(endings, **sections)
    expected = advance(whole, range(7))
    first = make(endings, **sections)
    assert advance(first, range(3)) == expected[:3]
    state = json.loads(json.dumps(first.state()))
    second = make(endings, **sections)
    second.restore(state)
    assert [(d.groups, d.figures) for d in second.ahead] == [(d.groups, d.figures) for d in first.ahead]
    assert advance(second, range(3, 7)) == expected[3:]
    assert second.state() == whole.state()


def test_a_group_survives_json_bit_for_bit(rambling):
    stream = rambling(COIN * QUESTIONS)
    group = stream.take(0)[0]
    assert any(r.score.merit not in (None, r.score.reward) for r in group.rollouts)
    back = group_from(json.loads(json.dumps(group_record(group))), stream.prompts)
    assert back == group and back.rollouts[0].logp == group.rollouts[0].logp


def test_permuted_rewards_are_the_same_rewards_dealt_out_otherwise(make):
    honest, control = make(), make(reward={"permute": True})
    changed = 0
    for true, dealt in zip(steps(honest, range(3)), steps(control, range(3)), strict=True):
        assert texts(true) == texts(dealt)
        assert [r.tokens for g in true for r in g.rollouts] == [r.tokens for g in dealt for r in g.rollouts]
        rewards, shuffled = ([x for g in groups for x in g.rewards] for groups in (true, dealt))
        assert sorted(rewards) == sorted(shuffled) and len(rewards) == 24
        changed += rewards != shuffled
        assert all(r.score.parts == {"answer_number": r.score.reward} for g in dealt for r in g.rollouts)
    assert changed == 3
    again = make(reward={"permute": True})
    control = make(reward={"permute": True})
    assert list(steps(again, range(2))) == list(steps(control, range(2)))


def test_permuting_breaks_the_tie_between_answer_and_reward(make):
    """The control would be none if right answers still earned more."""
    stream = make(sampling={"prompts_per_step": 12, "answers_per_prompt": 40})
    groups = stream.take(0)
    dealt = permuted(groups, seed=5)
    pairs = [(r.text == "1", r.score.reward) for g in dealt for r in g.rollouts]
    earned = {right: [reward for was, reward in pairs if was == right] for right in (True, False)}
    means = {right: sum(rewards) / len(rewards) for right, rewards in earned.items()}
    # 480 rewards of +-1: the difference of the two means has a deviation of about 0.09.
    assert abs(means[True] - means[False]) < 0.4
    assert all(r.score.reward == (1.0 if r.text == "1" else -1.0) for g in groups for r in g.rollouts)


def test_time_is_split_between_sampling_and_scoring_and_taken_once(make):
    stream = make()
    stream.take(0)
    seconds = stream.sampler.take_seconds()
    assert seconds.keys() == {"timing/rollout", "timing/reward", "timing/non_overlap_reward"}
    assert min(seconds.values()) > 0
    assert set(stream.sampler.take_seconds().values()) == {0.0}
