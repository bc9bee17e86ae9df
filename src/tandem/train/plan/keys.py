"""The recipe's keys for a layout that was found: with them it loads, and is laid out just so."""

import math
from dataclasses import asdict
from functools import reduce
from operator import getitem
from typing import Any

from tandem.config.placement import Placement
from tandem.config.run import ROADS, Run
from tandem.train.footprint import MIB
from tandem.train.plan.device import USABLE
from tandem.train.plan.plan import Offer
from tandem.train.plan.variant import Variant


def changes(run: Run, offer: Offer, usable: float) -> dict[str, Any]:
    """By key, the values that an offer needs and the recipe has not; of a device so many bytes are used."""
    kind = kind_of(offer)
    wanted = {
        **placement_keys(run, offer, kind),
        **sampling_keys(run, kind),
        **engine_keys(run, offer, kind, usable),
        **learner_keys(run, offer, kind),
        **memory_keys(offer.variant),
    }
    recipe = run.model_dump()
    return {key: value for key, value in wanted.items() if reduce(getitem, key.split("."), recipe) != value}


def kind_of(offer: Offer) -> str:
    """One device has one process, unless the learner gives its memory away."""
    if offer.samplers:
        return "apart"
    return "colocated" if offer.axes.world > 1 or offer.variant.run.learner.sleep else "inline"


def placement_keys(run: Run, offer: Offer, kind: str) -> dict[str, Any]:
    if kind == "inline":
        return {f"placement.{name}": info.default for name, info in Placement.model_fields.items()}
    found: dict[str, Any] = {
        "placement.kind": kind,
        "placement.learners": offer.axes.world,
        "placement.engines": offer.engine.count,
    }
    if kind == "colocated" and offer.engine.tensor > 1 and run.placement.gpus not in (None, 0, 1):
        # Such an engine lies on learners with one each.
        found["placement.gpus"] = 1
    return found


def sampling_keys(run: Run, kind: str) -> dict[str, Any]:
    """Where learners and engines take turns no answer is older than a step."""
    sampling = run.sampling
    lag = 0 if kind == "colocated" else sampling.max_lag
    return {"sampling.max_lag": lag, "sampling.in_flight": sampling.in_flight and kind == "apart"}


def engine_keys(run: Run, offer: Offer, kind: str, usable: float) -> dict[str, Any]:
    """With the recipe's engine and road of the weights, where these can be."""
    engine, split = run.engine, offer.engine.tensor
    vllm = engine.kind == "vllm" or split > 1
    found: dict[str, Any] = {
        "engine.kind": "vllm" if vllm else "embedded",
        "engine.tensor_parallel": split,
    }
    if vllm:
        # Unless it is told what the plan gives it, vLLM takes nearly all of a device.
        share = USABLE * min(1.0, offer.engine.bytes / usable)
        found["engine.gpu_memory_utilization"] = math.ceil(100 * share) / 100
        found["engine.kv_cache_mb"] = math.ceil(offer.engine.cache / MIB)
    if vllm and not offer.samplers:
        found["engine.sleep"] = True
    if not vllm and kind == "inline":
        found["engine.dtype"] = None
    asleep = engine.transfer == "ipc" and offer.variant.run.learner.sleep
    adapter = engine.transfer in ("ipc", "broadcast") and vllm and run.model.lora is not None
    if engine.transfer not in ROADS[kind] or asleep or adapter:
        found["engine.transfer"] = "auto"
    return found


def learner_keys(run: Run, offer: Offer, kind: str) -> dict[str, Any]:
    """Every axis; of one process the recipe need not say that it has one part."""
    axes, layout = offer.axes, run.learner.layout
    found: dict[str, Any] = {f"learner.layout.{name}": size for name, size in asdict(axes).items()}
    if axes.world == 1 and layout.shard is None:
        del found["learner.layout.shard"]
    if axes.expert > 1 and axes.tensor > 1:
        found["learner.layout.sequence"] = True
    if axes.world > 1:
        found["learner.compile"] = False
    if kind != "inline":
        found["profile"] = False
    return found | {"learner.sleep": offer.variant.run.learner.sleep}


def memory_keys(variant: Variant) -> dict[str, Any]:
    """What waits in host memory, of all models."""
    learner, found = variant.run.learner, {}
    sections = [("learner", learner.layout, learner.optimizer)]
    sections += [(role.name, role.layout, role.optimizer) for role in variant.roles]
    for name, layout, optimizer in sections:
        if optimizer is not None:
            found[f"{name}.optimizer.offload"] = optimizer.offload
        found[f"{name}.layout.offload_parameters"] = layout.offload_parameters
        found[f"{name}.layout.offload_gradients"] = layout.offload_gradients
    return found
