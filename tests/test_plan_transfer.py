"""What the plan says of weights on their way to the engines, and of learners that sleep meanwhile."""

from dataclasses import replace

import pytest
import torch

import tandem.engine.ipc
import tandem.engine.roads
import tandem.engine.weights
from near import assert_near
from plan_ranks import full_step
from plan_runs import large, trainer
from small_recipe import recipe
from tandem.config import load
from tandem.config.run import Run
from tandem.learner import Actor
from tandem.model import load as load_model
from tandem.model.asleep import Asleep
from tandem.model.new import new_tokenizer
from tandem.train import footprint
from tandem.train.plan.axes import Axes
from tandem.train.plan.device import Sending, assumed, find
from tandem.train.plan.link import links
from tandem.train.plan.measure import measured
from tandem.train.plan.plan import plan
from tandem.train.plan.request import lengths_of
from tandem.train.plan.transfer import Transfer
from tandem.train.plan.typical import typical
from tandem.train.plan.way import Way
from tiny_models import language_model

VLLM = ["engine.kind=vllm", "placement.kind=colocated"]
UNPROVED = "engine.verify_every=1000000"


def transfer(run: Run, axes: Axes, sending: Sending | None = None) -> Transfer:
    rates = replace(assumed(find("h200"), "bf16"), sending=sending)
    shape = footprint.shape_of(run.model, None)
    place, gathering = links(rates, 8, 8), trainer(run, axes, 8).gathering()
    return Transfer(run=run, shape=shape, axes=axes, rates=rates, links=place, gathering=gathering)


def test_every_device_of_an_engine_takes_all_of_the_weights_that_travel(tmp_path):
    """It keeps its part. What several learners hold together is gathered before; of a model with an adapter that alone
    is sent, in float32."""
    transfers = {}
    for name, more in {"whole": [], "adapter": ["model.lora={rank: 8}"]}.items():
        run = large(tmp_path, "dense", *VLLM, UNPROVED, *more)
        lengths = lengths_of(run, None, None)
        rates = replace(assumed(find("b200"), "bf16"), near=1e9, far=1e9)
        place = links(rates, 16, 8)
        offers = plan(run, rates, count=16, per_node=8, lengths=lengths, top=10**6).offers
        shape = footprint.shape_of(run.model, None)
        sent = 4 * shape.adapter or 2 * shape.parameters
        assert {offer.engine.tensor for offer in offers} > {8}
        for offer in offers:
            size = offer.axes.tensor * offer.axes.cut * offer.axes.pipeline
            messages = shape.tensors * place.all_gather(0.0, size, 1)
            wanted = sent * ((size - 1) / size + 1) / 1e9 + messages
            assert offer.moving["transfer"] == pytest.approx(wanted, rel=1e-3)
        transfers[name] = offers[0].moving["transfer"]
    assert transfers["adapter"] < transfers["whole"] / 100


def test_handles_of_memory_move_nothing_but_what_is_gathered(tmp_path):
    by_handles = transfer(large(tmp_path, "dense", *VLLM, UNPROVED, "engine.transfer=ipc"), Axes(shard=8))
    sent = transfer(large(tmp_path, "dense", *VLLM, UNPROVED), Axes(shard=8))
    whole = 2 * by_handles.shape.parameters
    assert sent.seconds - by_handles.seconds == pytest.approx(whole / (0.7 * 450e9), rel=1e-4)
    # Of 80 layers nine tensors each, embedding, norm and head, in seven messages of 2 microseconds.
    messages = (80 * 9 + 3) * 7 * 2e-6
    assert by_handles.seconds == pytest.approx(whole * 7 / 8 / (0.7 * 450e9) + messages, rel=1e-3)


def test_weights_of_another_type_are_so_much_more(tmp_path):
    half, whole = (
        large(tmp_path, "dense", *VLLM, UNPROVED, f"engine.dtype={dtype}") for dtype in ("bf16", "fp32")
    )
    sent = [transfer(run, Axes(shard=8)).seconds for run in (half, whole)]
    assert sent[1] == pytest.approx(2 * sent[0], rel=0.01)


@pytest.mark.parametrize(("road", "sums"), [("auto", 3), ("broadcast", 2)])
def test_the_proof_is_the_checksums_of_both_ends_and_two_passes_that_read_the_weights(tmp_path, road, sums):
    """Of 70 billion weights in bf16, each of which becomes an integer of 8 bytes that is read twice."""
    keys = ["placement.kind=apart", f"engine.transfer={road}"]
    bare = transfer(large(tmp_path, "dense", *keys, UNPROVED), Axes(shard=8)).seconds
    run = large(tmp_path, "dense", *keys)
    shape, rate = footprint.shape_of(run.model, None), 0.7 * 4.8e12
    wanted = sums * shape.parameters * (2 + 3 * 8) / rate
    # The learners gather what they hold, layer by layer.
    wanted += 2 * shape.parameters * 7 / 8 / (0.7 * 450e9) + (80 + 1) * 7 * 2e-6
    wanted += 2 * (2 * (shape.parameters - shape.embedding - 161 * 8192) / rate + 1e-3 + 80 * 10e-6)
    assert transfer(run, Axes(shard=8)).seconds - bare == pytest.approx(wanted, rel=1e-4)
    seldom = transfer(large(tmp_path, "dense", *keys, "engine.verify_every=10"), Axes(shard=8)).seconds
    assert seldom - bare == pytest.approx(wanted / 10, rel=1e-4)


@pytest.mark.parametrize(("road", "sums"), [("memory", 3), ("ipc", 3), ("files", 3), ("broadcast", 2)])
def test_each_tensor_is_summed_as_often_as_the_plan_counts(road, sums, monkeypatch):
    counted: list[int] = []
    checksum = tandem.engine.weights.checksum

    def counting(tensor: torch.Tensor) -> int:
        counted.append(tensor.nbytes)
        return checksum(tensor)

    for module in (tandem.engine.weights, tandem.engine.roads, tandem.engine.ipc):
        monkeypatch.setattr(module, "checksum", counting)
    sender, receiver = language_model("qwen2_grouped"), language_model("qwen2_grouped")
    with torch.no_grad():
        for weight in sender.network.parameters():
            weight.add_(torch.randn_like(weight) / 100)
    way = Way(road, sender, receiver)
    try:
        way.send(True)
        assert sum(counted) == sums * way.nbytes
        way.probe()
        way.send(False)
        assert sum(counted) == sums * way.nbytes
    finally:
        way.close()


def test_what_was_measured_counts_for_each_byte_and_for_each_pass_over_the_probe(tmp_path):
    """With an adapter its bytes alone travel; the learner says of the probe what it does without it too."""
    measured_here = Sending(byte_s=1e-9, probe_s=1e-10)
    run = large(tmp_path, "dense", *VLLM)
    shape = footprint.shape_of(run.model, None)
    alone = transfer(run, Axes(replicate=8), measured_here).seconds
    assert alone == pytest.approx(shape.parameters * (2e-9 + 2 * 1e-10))
    gathered = transfer(run, Axes(shard=8), measured_here).seconds - alone
    # To be sent tensor by tensor, and once more layer by layer for the probe.
    messages = (shape.tensors + 80 + 1) * 7 * 2e-6
    assert gathered == pytest.approx(2 * 2 * shape.parameters * 7 / 8 / (0.7 * 450e9) + messages)
    adapted = large(tmp_path, "dense", *VLLM, "model.lora={rank: 8}")
    small = footprint.shape_of(adapted.model, None)
    wanted = small.adapter * 4e-9 + 3 * 1e-10 * small.parameters
    assert transfer(adapted, Axes(replicate=8), measured_here).seconds == pytest.approx(wanted)


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_the_times_of_a_transfer_and_of_sleep_on_this_machine_are_near_those_expected(tmp_path):
    """Of twice as many weights as are measured; the learner that sleeps has its optimizer's states too."""
    new = {"hidden_size": 512, "layers": 16, "heads": 8, "kv_heads": 2, "max_positions": 256}
    sections = {
        "data": {"max_prompt_tokens": 24},
        "placement": {"kind": "colocated"},
        # No reference, which would sleep too.
        "algorithm": {"kl": {"coef": 0.0}},
        # Little of all else that is measured.
        "sampling": {"prompts_per_step": 1, "answers_per_prompt": 2, "max_answer_tokens": 4},
        "learner": {"sleep": True, "tokens_per_forward": 32},
    }
    run = load(recipe(tmp_path, model={"new": new}, **sections))
    sender, receiver = (load_model(run.model, new_tokenizer(), torch.device("cpu")) for _ in range(2))
    actor, way = Actor(sender, run), Way("files", sender, receiver)
    actor.update([full_step(1, 4, 2, 4)], 0.0)
    lengths = lengths_of(run, None, None)

    def sent() -> None:
        way.send(True)
        way.probe()

    def slept() -> None:
        Asleep(actor.tensors, torch.device("cpu")).wake()

    def expected() -> dict[str, float]:
        rates = measured(run, lengths, run.threads)
        offers = plan(run, rates, count=1, per_node=1, lengths=lengths, top=1, offload=False).offers
        return offers[0].seconds

    try:
        assert_near(expected, lambda: {"transfer": typical(sent), "sleep and wake": typical(slept)})
    finally:
        way.close()
