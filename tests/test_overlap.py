"""The reference works on groups while others are sampled, and says what it says of all of them afterwards."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tandem.config.placement import Placement
from tandem.journal import read_metrics
from tandem.learner import Reference, Role, units
from tandem.train.run import train
from tandem.types import collate, take
from test_meanwhile import Staged
from test_stream import COIN, make, model, scorer  # noqa: F401
from tiny_models import language_model
from tiny_step import batch, run

NAP_S = 0.3
"""Between two groups, and of each unit's work."""


class SlowLearners:
    """One learner that takes long: the reference itself, in a thread of its own as in a process."""

    def __init__(self, reference: Reference) -> None:
        self.run, self.reference = reference.run, reference
        self.thread = ThreadPoolExecutor(1)
        self.asked = 0

    def begin(self, method: str, unit) -> list[Future]:
        assert method == "reference_logprobs"
        self.asked += 1
        return [self.thread.submit(self._work, unit)]

    def _work(self, unit):
        time.sleep(NAP_S)
        return self.reference.logprobs(unit), NAP_S

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
    assert own.reference_unit == 1 and Meanwhile.helps(own)
    order = [index for place in (2, 0, 3, 1) for index in range(6 * place, 6 * place + 6)]
    naps = {order[i] for i in (5, 11, 17)}
    stream.sampler.engine = Staged(
        stream.sampler.engine, order, lambda index: time.sleep(NAP_S * (index in naps))
    )
    learners = SlowLearners(Reference(stream.sampler.engine.engine.model, own, adapter_off=False))
    reference = RemoteReference(learners)
    stream.sampler.on_group = Meanwhile(reference)
    yield stream, reference, learners
    learners.thread.shutdown()


def test_only_the_last_group_is_waited_for(beside):
    stream, reference, learners = beside
    began = time.monotonic()
    groups = stream.take(0)
    sampled = time.monotonic() - began
    logp_BT = reference.logprobs(collate(groups))
    waited = time.monotonic() - began - sampled
    assert sampled >= 3 * NAP_S and waited < 2 * NAP_S < reference.take_seconds(), "four units took four naps"
    assert learners.asked == 4
    assert torch.equal(logp_BT, learners.reference.logprobs(collate(groups)))
    assert logp_BT[collate(groups).mask_BT].ne(0).any()


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
    assert config.reference_unit == {4: 1, 24: 3}[prompts]
    reference = Reference(language_model(), config, adapter_off=False)
    logp_BT = reference.logprobs(whole)
    for rows in units(whole, config.reference_unit):
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
