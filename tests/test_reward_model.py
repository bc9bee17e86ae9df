"""The reward model as a role: its score is the classifier's at the last token, a term of the reward among others, and
the same whenever it is computed."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel_ranks import CPU
from tandem.checkpoint.convert import convert
from tandem.config import Run
from tandem.config.reward import Reward
from tandem.errors import ConfigError, RunError
from tandem.model.new import new_tokenizer
from tandem.model.value import load_reward_model
from tandem.placement.inline import reward_model_of
from tandem.reward_model import RewardModel
from tandem.rewards.scorer import Scorer
from tandem.rollout import EVAL, Judging, Units
from test_stream import COIN, DIGITS, make, model, scorer  # noqa: F401
from tiny_models import classifier, language_model, row_scores, spoiled
from tiny_step import batch, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("judge") / "judge")


def settings(folder: Path, **learner: object) -> Run:
    made = run(**learner)
    judged = Reward.model_validate({"model": {"path": str(folder)}})
    return made.model_copy(update={"reward": judged})


def judge(folder: Path, **learner: object) -> RewardModel:
    made = reward_model_of(settings(folder, **learner), language_model())
    assert made is not None
    return made


def rows_of(part) -> list[list[int]]:
    return [tokens[:length] for tokens, length in zip(part.tokens_BT.tolist(), part.length_B.tolist())]


@pytest.mark.parametrize("learner", [
    {"tokens_per_forward": 100_000},
    {"tokens_per_forward": 64},
    {"tokens_per_forward": 1},
    {"tokens_per_forward": 64, "attention": "documents"},
], ids=str)  # fmt: skip
def test_a_score_is_the_classifiers_at_the_last_token_however_rows_are_packed(folder, learner):
    part = batch()
    score_B = judge(folder, **learner).scores(part)
    assert score_B.dtype == torch.float32 and score_B.std() > 0.1
    torch.testing.assert_close(score_B, torch.tensor(row_scores(folder, rows_of(part))), atol=1e-5, rtol=1e-5)


def test_a_row_longer_than_the_models_positions_is_an_error_that_names_it(folder):
    made = judge(folder)
    made.model.network.config.max_position_embeddings = 8
    with pytest.raises(RunError, match=r"the reward model has 8 positions \(reward\.model\.path=.*judge"):
        made.scores(batch())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nowhere", r"reward\.model\.path=.*nowhere does not exist"),
        (
            "headless",
            r"reward\.model\.path=.*headless has no head \(score\.weight\); give a sequence classifier",
        ),
        ("labels", r"reward\.model\.path=.*labels has a head \(score\.weight\) with 2 outputs"),
        ("bias", r"reward\.model\.path=.*bias has a head with a bias"),
        ("half", r"reward\.model\.path=.*half lacks 1 weights: model\.norm\.weight"),
        ("torn", r"reward\.model\.path=.*torn: model\.safetensors is damaged"),
        ("words", r"reward\.model\.path=.*words: its tokenizer has \d+ entries and the policy's has \d+"),
    ],
)
def test_a_folder_that_is_no_reward_model_is_refused_by_name(folder, tmp_path, change, said):
    other = tmp_path / change
    if change != "nowhere":
        spoiled(folder, other, change)
    with pytest.raises(ConfigError, match=said):
        load_reward_model(str(other), "fp32", new_tokenizer(), CPU)


def test_a_reward_model_that_was_converted_says_what_it_said(folder, tmp_path):
    there = convert(folder, tmp_path / "megatron", "megatron", tensor_parallel=2, say=lambda text: None)
    back = convert(there, tmp_path / "back", "hf", shard_gb=3e-5, say=lambda text: None)
    assert len(list(back.glob("*.safetensors"))) > 2
    assert torch.equal(judge(back).scores(batch()), judge(folder).scores(batch()))


@pytest.fixture
def judged(make, folder):  # noqa: F811
    """A stream whose rewards come from a function and a model, or from the model alone."""
    scorers = []

    def stream(*, alone: bool = False, **reward: object):
        made = make(COIN * 12)
        sampler = made.sampler
        functions = [] if alone else [{"name": "answer_number", "weight": 0.5, "args": {"tag": None}}]
        term = {"path": str(folder), "weight": -2.0, "name": "judge"}
        whole = Reward.model_validate({"functions": functions, "model": term, **reward})
        sampler.run = sampler.run.model_copy(update={"reward": whole})
        scorers.append(Scorer(whole, sampler.run.sampling.max_answer_tokens))
        # A stream with a scorer and a model of its own.
        policy = sampler.engine.model
        sampler.__init__(
            sampler.engine,
            scorers[-1],
            sampler.tokenizer,
            sampler.run,
            sampler.params,
            sampler.stop_tokens,
            reward_model_of(sampler.run, policy),
        )
        return made

    yield stream
    for each in scorers:
        each.close()


@pytest.mark.parametrize("alone", [False, True])
def test_the_reward_is_the_weighted_sum_of_functions_and_model(judged, folder, alone):
    stream = judged(alone=alone, overlong_buffer=2, overlong_penalty=0.25)
    rollouts = [r for g in stream.take(0) for r in g.rollouts]
    expected = row_scores(folder, [r.tokens for r in rollouts])
    assert len({round(value, 3) for value in expected}) > 4, "questions and answers differ"
    for r, value in zip(rollouts, expected, strict=True):
        parts = r.score.parts
        assert list(parts) == [*([] if alone else ["answer_number"]), "judge", "overlong"]
        assert parts["judge"] == pytest.approx(value, abs=1e-5)
        right = 0.0 if alone else 0.5 * (1.0 if r.text == "1" else -1.0)
        assert r.score.reward == right - 2.0 * parts["judge"] - 0.125
    seconds = stream.sampler.take_seconds()
    assert 0 < seconds["timing/reward_model"] <= seconds["timing/non_overlap_reward_model"]


def test_answers_of_an_evaluation_are_scored_too(judged, folder):
    stream = judged(alone=True)
    groups = stream.sampler.sample(stream.prompts.prompts, range(12), answers=1, domain=EVAL)
    values = row_scores(folder, [g.rollouts[0].tokens for g in groups])
    assert [g.rewards[0] for g in groups] == pytest.approx([-2.0 * value for value in values], abs=1e-4)


@pytest.mark.parametrize("policy", ["mask", "zero", "raise"])
def test_a_score_that_is_not_finite_is_a_failure_and_not_a_zero(judged, policy):
    """Of rows with a 1, whose embedding is broken."""
    stream = judged(on_failure=policy)
    with torch.no_grad():
        stream.sampler.reward_model.model.embedding[DIGITS[1]] = math.nan
    if policy == "raise":
        with pytest.raises(RunError, match=r"a reward failed \(invalid\): judge: the score is nan"):
            stream.take(0)
        return
    groups = stream.sampler.sample(stream.prompts.prompts[:4], range(4), answers=6)
    scores = {
        broken: [r.score for g in groups for r in g.rollouts if (DIGITS[1] in r.tokens) is broken]
        for broken in (True, False)
    }
    assert scores[True] and scores[False]
    for score in scores[True]:
        assert (score.failure, score.reward) == (("invalid", None) if policy == "mask" else (None, 0.0))
        assert "judge: the score is nan; reward.model.path=" in score.detail and not score.parts
    assert all(math.isfinite(score.reward) and score.failure is None for score in scores[False])


def test_a_failed_function_is_not_made_good_by_the_model(judged):
    stream = judged(functions=[{"name": "countdown"}])
    scores = [
        r.score
        for g in stream.sampler.sample(stream.prompts.prompts[:2], [0, 1], answers=2)
        for r in g.rollouts
    ]
    assert {score.failure for score in scores} == {"error"}


def by_row(stream, kinds) -> list:
    """Its prompts, so many as there are letters: `r` for the functions, `m` for the model."""
    names = {"r": "rule", "m": "model"}
    return [replace(p, scored_by=names[kind]) for p, kind in zip(stream.prompts.prompts, kinds)]


@pytest.fixture
def units_of(monkeypatch) -> list[list[int]]:
    """The questions of each unit that a reward model is given, by their ids."""
    given, begin = [], RewardModel.begin

    def watched(self, unit):
        given.append([group.prompt.id for group in unit])
        return begin(self, unit)

    monkeypatch.setattr(RewardModel, "begin", watched)
    return given


def test_each_row_is_scored_by_functions_or_model_alone(judged, folder, units_of):
    """Lengths are judged in either case."""
    stream = judged(overlong_buffer=2, overlong_penalty=0.25)
    kinds = "rmmrrmrmmmrm"
    groups = stream.sampler.sample(by_row(stream, kinds), range(12), answers=3)
    expected = iter(row_scores(folder, [r.tokens for g in groups for r in g.rollouts]))
    for kind, group in zip(kinds, groups, strict=True):
        for r in group.rollouts:
            value, parts = next(expected), r.score.parts
            if kind == "r":
                assert dict(parts) == {"answer_number": 1.0 if r.text == "1" else -1.0, "overlong": -0.125}
                assert r.score.reward == 0.5 * parts["answer_number"] - 0.125
            else:
                assert dict(parts) == {"judge": pytest.approx(value, abs=1e-5), "overlong": -0.125}
                assert r.score.reward == -2.0 * parts["judge"] - 0.125
    size = stream.sampler.run.unit(7, 3)
    rows = [i for i, kind in enumerate(kinds) if kind == "m"]
    assert sorted(units_of) == [rows[first : first + size] for first in range(0, 7, size)]


def test_where_all_rows_are_for_functions_the_model_is_not_asked(judged, units_of):
    stream = judged()
    groups = stream.sampler.sample(by_row(stream, "rrrr"), range(4), answers=2)
    assert not units_of and all(len(group.rewards) == 2 for group in groups)
    assert stream.sampler.take_seconds()["timing/reward_model"] == 0


def test_a_function_is_not_called_for_a_row_of_the_model(judged, tmp_path):
    """Neither one that scores answers alone, nor one that scores those of a question together; both would fail."""
    together = tmp_path / "together.py"
    together.write_text("def together(answers: list) -> list:\n    raise ValueError('called')\n")
    stream = judged(functions=[{"name": "countdown"}, {"name": f"{together}:together"}])
    groups = stream.sampler.sample(by_row(stream, "rmrm"), range(4), answers=2)
    assert [[r.score.failure for r in group.rollouts] for group in groups] == [["error"] * 2, [None] * 2] * 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_the_model_is_given_does_not_depend_on_who_is_answered_first(size):
    class Recorder:
        def __init__(self):
            self.given = []

        def begin(self, unit):
            self.given.append(unit)
            return lambda: (torch.tensor([float(place) for place in unit]), 1.0)

    places = [0, 2, 3, 7, 8]
    for order in (range(9), reversed(range(9)), sorted(range(9), key=lambda i: (i * 7) % 9)):
        judging = Judging(recorder := Recorder(), places, size, 1)
        for place in order:
            judging.add(place, place)
        assert sorted(recorder.given) == [places[first : first + size] for first in range(0, 5, size)]
        assert judging.finish() == {place: [float(place)] for place in places}
        assert judging.busy_s == len(recorder.given)


@pytest.mark.parametrize(("size", "total"), [(1, 3), (2, 5), (4, 4), (8, 3)])
def test_units_are_the_same_in_whichever_order_groups_come(size, total):
    expected = [list(range(first, min(first + size, total))) for first in range(0, total, size)]
    for order in (range(total), reversed(range(total)), sorted(range(total), key=lambda i: (i * 7) % 5)):
        units = Units(size, total)
        made = [unit for place in order if (unit := units.add(place, place))]
        assert sorted(made) == expected
