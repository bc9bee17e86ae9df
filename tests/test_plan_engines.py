"""Engines of several devices: apart from the learners or on their devices, each within a node."""

import pytest

from plan_runs import LARGE, large, planned
from tandem.train import footprint
from tandem.train.plan import work
from tandem.train.plan.axes import Rules
from tandem.train.plan.device import assumed, find
from tandem.train.plan.engine import Engine, engines, times
from tandem.train.plan.link import links
from tandem.train.plan.report import text
from tandem.train.plan.request import lengths_of

VLLM = ["engine.kind=vllm", "placement.kind=colocated"]


def fitting(run, count: int, per_node: int, samplers: int = 0) -> dict[int, Engine]:
    """Engines where memory is plenty, by the devices of each."""
    rates, shape = assumed(find("h200"), "bf16"), footprint.shape_of(run.model, None)
    place, rules = links(rates, count, per_node), Rules(LARGE["dense"], 0, per_node)
    found = engines(
        run, shape, lengths_of(run, 512, 100), rates, place, rules, 1e13, whole=False, samplers=samplers
    )
    return {engine.tensor: engine for engine in found if isinstance(engine, Engine)}


def widths(run, count: int, per_node: int, samplers: int = 0) -> list[int]:
    return list(fitting(run, count, per_node, samplers))


def test_only_vllm_is_spread_over_the_devices_of_several_learners(tmp_path):
    """And, with an adapter, where the base is in a folder."""
    assert widths(large(tmp_path, "dense"), 16, 8) == [1]
    assert widths(large(tmp_path, "dense", *VLLM), 16, 8) == [1, 2, 4, 8]
    assert widths(large(tmp_path, "dense", *VLLM, "model.lora={rank: 8}"), 16, 8) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("count", "per_node", "samplers", "wanted"),
    [
        (16, 4, 0, [1, 2, 4]),
        (12, 6, 0, [1, 2]),
        (10, 8, 0, [1, 2]),
        (16, 8, 16, [1, 2, 4, 8]),
        (16, 8, 8, [1, 2, 4, 8]),
        (12, 6, 8, [1, 2, 4]),
    ],
)
def test_an_engine_lies_within_a_node(tmp_path, count, per_node, samplers, wanted):
    """Of two nodes of six, three engines of four devices would need parts of both; two of them leave learners room."""
    assert widths(large(tmp_path, "dense", *VLLM), count, per_node, samplers) == wanted


def test_wide_engines_on_the_learners_devices_take_and_last_what_their_parts_do(tmp_path):
    """140 GB of weights are on no device whole, and with vLLM on two, four or eight of them."""
    alone = planned(large(tmp_path, "dense", "placement.kind=colocated"), "h200", 16, top=10**6)
    assert not any(not offer.samplers for offer in alone.offers)
    run = large(tmp_path, "dense", *VLLM)
    made = planned(run, "h200", 16, top=10**6)
    offers = [offer for offer in made.offers if not offer.samplers]
    assert offers
    for offer in offers:
        engine = offer.engine
        assert engine.tensor > 1 and engine.tensor * engine.count == 16
        assert engine.weights == 2 * made.shape.parameters / engine.tensor
        # Eight key and value heads.
        each = (512 / 16 + 4096) * made.shape.key_value * 2 / engine.tensor
        assert engine.cache == pytest.approx(engine.slots * each)
        answers = -(-run.rollouts_per_step // engine.count)
        decoding = work.decoding(run, made.shape, made.lengths, answers, engine.slots, joined=False)
        seconds = times(decoding, made.shape, made.rates, links(made.rates, 16, 8), engine.tensor, 2)
        assert (engine.seconds, engine.communication, engine.reads) == seconds and engine.communication
        assert offer.peak <= made.rates.usable
    made.offers = offers[:1]
    assert f"{offers[0].engine.count} x tensor={offers[0].engine.tensor}" in text(made)


def test_an_engine_of_another_type_takes_and_is_sent_weights_of_that_type(tmp_path):
    """Twice as much in fp32 as in the learner's bf16, and keys and values with it."""
    runs = [large(tmp_path, "dense", *VLLM, f"engine.dtype={dtype}") for dtype in ("bf16", "fp32")]
    half, whole = (fitting(run, 16, 8) for run in runs)
    assert half.keys() == whole.keys() == {1, 2, 4, 8}
    for tensor, engine in whole.items():
        assert engine.weights == 2 * half[tensor].weights and engine.slots == half[tensor].slots
        assert engine.cache == 2 * half[tensor].cache


def test_a_wide_engine_is_vllms_whatever_the_recipe_has(tmp_path):
    """Its answers at a time are vLLM's, not the embedded engine's slots."""
    keys = ("placement.kind=apart", "sampling.slots=8")
    ours, vllm = (large(tmp_path, "dense", *keys, *more) for more in ((), VLLM[:1]))
    found, wanted = (fitting(run, 16, 8, samplers=16) for run in (ours, vllm))
    assert found.keys() == wanted.keys() == {1, 2, 4, 8}
    assert all(found[tensor] == wanted[tensor] for tensor in (2, 4, 8)) and found[1].slots == 8


def test_where_engines_take_weights_by_handles_each_learner_keeps_a_whole_copy(tmp_path):
    """Of what several hold together; a learner that sleeps gives none away."""
    by = {}
    for road in ("files", "ipc"):
        run = large(tmp_path, "dense", *VLLM, f"engine.transfer={road}", "sampling.max_answer_tokens=1024")
        made = planned(run, "FLOPS=1e15,BANDWIDTH=5e12,MEMORY=640e9", 16, top=10**6)
        by[road] = {str(o.axes): o for o in made.offers if not o.samplers and not o.variant.away}
    parameters, both = made.shape.parameters, by["files"].keys() & by["ipc"].keys()
    assert any("replicate" in axes for axes in both)
    for axes in both:
        own, copied = by["files"][axes].load, by["ipc"][axes].load
        assert copied.stays == own.stays + 2 * parameters
        assert copied.together.learner == own.together.learner + 2 * parameters
    made.offers = [by["ipc"][axes] for axes in both][:1]
    assert "for the handles of engine.transfer=ipc, all weights once more: 141.1 GB" in text(made)
    asleep = planned(large(tmp_path, "dense", *VLLM, "engine.transfer=ipc"), "h200", 16, top=10**6).offers
    assert all(o.variant.run.learner.sleep for o in asleep if not o.samplers)
