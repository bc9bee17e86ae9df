"""Reference and critic work on groups while others are sampled, and say what they say of all of them afterwards."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tandem.config.placement import Placement
from tandem.errors import RunError
from tandem.journal import read_metrics
from tandem.learner import Reference, Role, units
from tandem.placement.inline import critic_of, reward_model_of
from tandem.rewards.scorer import Scorer
from tandem.rollout import Sampler
from tandem.train.run import train
from tandem.types import collate, take
from test_meanwhile import Staged
from test_stream import COIN, make, model, scorer  # noqa: F401
from tiny_models import classifier, language_model
from tiny_step import batch, run

NAP_S = 0.3
"""Between two groups, and of each unit's work."""


class SlowLearners:
    """One learner that takes long: the role itself, in a thread of its own as in a process."""

    def __init__(self, reference: Reference, **methods: Callable) -> None:
        self.run, self.reference = reference.run, reference
        self.methods = {"reference_logprobs": reference.logprobs, **methods}
        self.thread = ThreadPoolExecutor(1)
        self.asked = 0

    def begin(self, method: str, unit) -> list[Future]:
        self.asked += 1
        return [self.thread.submit(self._work, self.methods[method], unit)]

    def _work(self, method, unit):
        time.sleep(NAP_S)
        return method(unit), NAP_S

    def finish(self, calls: list[Future]):
        return calls[0].result()

    def compute(self, method: str, whole):
        return self.finish(self.begin(method, whole))


@pytest.fixture
def beside(make):  # noqa: F811
    """A stream of four groups a step that come one by one, not in their order; and the reference beside it."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    from tandem.placement.cluster.learners import Meanwhile, RemoteReference

    stream = make(COIN * 4)
    whole = stream.sampler.run
    changes = {
        "placement": Placement(kind="apart"),
        "learner": whole.learner.model_copy(update={"tokens_per_forward": 18}),
    }
    stream.sampler.run = own = whole.model_copy(update=changes)
    assert own.step_unit == 1 and Meanwhile.helps(own)
    order = [index for place in (2, 0, 3, 1) for index in range(6 * place, 6 * place + 6)]
    naps = {order[i] for i in (5, 11, 17)}
    stream.sampler.engine = Staged(
        stream.sampler.engine, order, lambda index: time.sleep(NAP_S * (index in naps))
    )
    learners = SlowLearners(Reference(stream.sampler.engine.engine.model, own, adapter_off=False))
    reference = RemoteReference(learners)
    stream.sampler.on_group = Meanwhile(own, [reference.work])
    yield stream, reference, learners
    learners.thread.shutdown()


@pytest.fixture(params=["reference", "critic"])
def helped(request, beside, tmp_path):
    """The stream, with one role beside it: its work, what it says of a batch, and what it says in one process."""
    from tandem.placement.cluster.learners import Meanwhile, RemoteCritic

    stream, reference, learners = beside
    if request.param == "reference":
        return stream, learners, reference.work, reference.logprobs, learners.reference.logprobs
    own = stream.sampler.run
    given = own.critic.model_copy(update={"path": str(classifier(tmp_path / "critic"))})
    inline = critic_of(own.model_copy(update={"critic": given}), stream.sampler.engine.engine.model)
    learners.methods["values"], critic = inline.values, RemoteCritic(learners)
    stream.sampler.on_group = Meanwhile(own, [critic.work])
    return stream, learners, critic.work, critic.values, inline.values


@pytest.mark.alone
def test_only_the_last_group_is_waited_for(helped):
    stream, learners, work, said, said_in_one_process = helped
    began = time.monotonic()
    groups = stream.take(0)
    sampled = time.monotonic() - began
    made_BT = said(collate(groups))
    waited = time.monotonic() - began - sampled
    assert sampled >= 3 * NAP_S and waited < 2 * NAP_S < work.take_seconds(), "four units took four naps"
    assert learners.asked == 4
    assert torch.equal(made_BT, said_in_one_process(collate(groups)))
    assert made_BT[collate(groups).mask_BT].ne(0).any()


def test_the_reward_model_scores_meanwhile_and_bit_for_bit_the_same(beside, tmp_path):
    from tandem.placement.cluster.learners import RemoteRewardModel

    stream, _, learners = beside
    own, sampler = stream.sampler.run, stream.sampler
    term = {"path": str(classifier(tmp_path / "judge")), "name": "judge"}
    reward = own.reward.model_validate({**own.reward.model_dump(), "model": term})
    own = own.model_copy(update={"reward": reward})
    inline = reward_model_of(own, sampler.engine.engine.model)
    learners.methods["reward_scores"] = inline.scores
    sampler.on_group = lambda place, group: None
    takes = []
    with Scorer(reward, own.sampling.max_answer_tokens) as scorer:  # noqa: F811
        scorer.ready()
        for model in (RemoteRewardModel(learners, None), inline):
            place = (sampler.engine, scorer, sampler.tokenizer, own, sampler.params, sampler.stop_tokens)
            one = Sampler(*place, model)
            takes.append(one.sample(stream.prompts.prompts, range(4), answers=6))
            seconds = one.take_seconds()
            if model is not inline:
                assert seconds["timing/non_overlap_reward_model"] < 2 * NAP_S < seconds["timing/reward_model"]
    assert learners.asked == 4 and takes[0] == takes[1]
    assert len({r.score.parts["judge"] for g in takes[0] for r in g.rollouts}) >= 8, (
        "two answers to each question"
    )


def test_a_call_has_its_time_from_the_end_of_the_one_before(monkeypatch):
    """Whoever asked for that: learners that train may be asked for scores by the thread that samples."""
    room = pytest.importorskip("tandem.placement.cluster.learners")
    clock = [0.0]

    class Call:
        def __init__(self, worker, method: str, seconds: float) -> None:
            self.worker, self.method = worker, method
            worker.free = self.end = worker.free + seconds

        def done(self) -> bool:
            return clock[0] >= self.end

        def result(self, limit) -> str:
            return self.method

    class Worker:
        free, log = 0.0, Path("its log")

        def call(self, method: str, seconds: float = 0.0) -> Call:
            return Call(self, method, seconds)

    def first_done(calls, timeout_s):
        clock[0] = min(clock[0] + timeout_s, max(clock[0], min(call.end for call in calls)))
        return [call for call in calls if call.done()]

    monkeypatch.setattr(room.port, "first_done", first_done)
    monkeypatch.setattr(room.time, "monotonic", lambda: clock[0])
    own = run().model_copy(update={"placement": Placement(kind="apart", learner_timeout_s=10)})
    learners = room.Learners([Worker()], own, room.time.sleep)
    begun = [learners.begin(method, 8.0) for method in ("reward_scores", "update", "values")]
    assert learners.finish(begun[2]) == "values" and clock[0] == 24
    assert [learners.finish(early) for early in begun[:2]] == ["reward_scores", "update"]
    slow = [learners.begin(method, seconds) for method, seconds in (("update", 12.0), ("reward_scores", 1.0))]
    with pytest.raises(
        RunError, match=r"did not finish `update` within 10 s \(placement\.learner_timeout_s;"
    ):
        learners.finish(slow[1])


@pytest.mark.parametrize(("hanging", "said"), [
    ({0}, r"learner 1 failed in `update`: Timed out\nstill without an answer: learner 0\nA lost learner ends"),
    ({0, 1}, r"learner 0 and learner 1 did not finish `update` within 3600 s \(placement\.learner_timeout_s;"),
], ids=["neighbour", "both"])  # fmt: skip
def test_a_learner_that_hangs_is_named_whoever_is_the_first_to_fail(monkeypatch, hanging, said):
    """What learners do together may fail long before the time of a call is up, and first where nothing hangs."""
    room = pytest.importorskip("tandem.placement.cluster.learners")
    clock = [0.0]

    class Call:
        def __init__(self, worker, method: str) -> None:
            self.worker, self.method = worker, method

        def result(self, limit) -> None:
            raise room.WorkerLost(f"{self.worker} failed in `{self.method}`: Timed out")

    class Worker:
        log = Path("its log")

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def __str__(self) -> str:
            return f"learner {self.rank}"

        def call(self, method: str) -> Call:
            return Call(self, method)

    def first_done(calls, timeout_s):
        done = [call for call in calls if call.worker.rank not in hanging]
        clock[0] += 0.0 if done else timeout_s
        return done

    monkeypatch.setattr(room.port, "first_done", first_done)
    monkeypatch.setattr(room.time, "monotonic", lambda: clock[0])
    own = run().model_copy(update={"placement": Placement(kind="apart", learner_timeout_s=3600)})
    with pytest.raises(RunError, match=f"^{said}"):
        room.Learners([Worker(0), Worker(1)], own, room.time.sleep).call("update")


def test_what_was_not_begun_is_computed_and_nothing_is_left_over(beside):
    """Groups that others stand in the place of, as after a checkpoint."""
    stream, reference, learners = beside
    groups = stream.take(0)
    other = make_other(collate(groups))
    assert torch.equal(reference.logprobs(other), learners.reference.logprobs(other))
    assert learners.asked == 5, "one of four units was another"
    reference.logprobs(other)
    assert learners.asked == 6, "all of them in one call"


def make_other(whole):
    """One group's answers are others."""
    tokens_BT = whole.tokens_BT.clone()
    tokens_BT[:6][whole.mask_BT[:6]] = 16
    return replace(whole, tokens_BT=tokens_BT)


@pytest.mark.parametrize("prompts", [4, 24])
def test_a_unit_alone_is_bit_for_bit_the_unit_among_others(prompts):
    config = run(tokens_per_forward=64)
    sampling = config.sampling.model_copy(update={"prompts_per_step": prompts, "answers_per_prompt": 3})
    config = config.model_copy(update={"sampling": sampling})
    whole = batch(groups=5)
    assert config.step_unit == {4: 1, 24: 3}[prompts]
    reference = Reference(language_model(), config, adapter_off=False)
    logp_BT = reference.logprobs(whole)
    for rows in units(whole, config.step_unit):
        alone_BT = reference.logprobs(take(whole, rows))
        assert torch.equal(alone_BT, logp_BT[rows, : alone_BT.shape[1]])
    torch.testing.assert_close(logp_BT, Role(reference.model, config).logprobs(whole), atol=1e-5, rtol=1e-5)


def test_in_one_process_everything_is_waited_for(random_folder, make_run, quiet):
    config = make_run(random_folder, steps=1, algorithm={"kl": {"coef": 0.1}})
    train(config, quiet)
    (row,) = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    for stage in ("rollout", "reference_model", "adv"):
        assert row[f"timing/non_overlap_{stage}"] == row[f"timing/{stage}"] > 0
    assert "timing/resharding_to_infer" not in row


def test_dynamic_sampling_and_lag_leave_the_reference_for_afterwards(beside):
    """A group that is dropped would be work for nothing; learners that train have none to give."""
    from tandem.placement.cluster.learners import Meanwhile

    own = beside[0].sampler.run
    for section, key, value in (
        ("algorithm", "keep", "mixed"),
        ("sampling", "max_lag", 1),
        ("placement", "kind", "colocated"),
    ):
        changed = getattr(own, section).model_copy(update={key: value})
        assert not Meanwhile.helps(own.model_copy(update={section: changed}))
