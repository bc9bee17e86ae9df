"""The keys that a plan prints: with them the recipe loads, lies as the plan says, and has nothing left to change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plan_runs import LARGE, large, planned
from small_recipe import recipe
from tandem.config import Run, load
from tandem.train.layouts import check_layouts
from tandem.train.plan.axes import Axes
from tandem.train.plan.keys import changes, kind_of
from tandem.train.plan.plan import Offer, Plan
from tandem.train.plan.report import keys

RECIPES = Path(__file__).parents[1] / "recipes" / "runs"
COLOCATED = {"kind": "colocated", "learners": 2, "engines": 2}
APART = {"kind": "apart", "learners": 2, "engines": 1}
MODEL = {"model": {"new": {"hidden_size": 64, "layers": 4, "heads": 4, "kv_heads": 2, "max_positions": 1024}}}
SMALL: dict[str, dict[str, Any]] = {
    "one process that compiles": {"learner": {"compile": True}, "profile": True},
    "engines of another type": {"engine": {"dtype": "bf16"}, "placement": APART, "sampling": {"max_lag": 2}},
    "tokens in flight": {
        "placement": {**APART, "address": "auto", "spread": True, "cpus": 2},
        "sampling": {"max_lag": 1, "in_flight": True},
        "engine": {"transfer": "broadcast"},
    },
    "colocated and asleep": {"placement": COLOCATED, "learner": {"sleep": True}},
    "colocated by ipc": {"placement": COLOCATED, "engine": {"kind": "vllm", "transfer": "ipc"}},
    "split by tensor": {"placement": COLOCATED, "learner": {"layout": {"tensor": 2}}},
    "split by shard": {"placement": COLOCATED, "learner": {"layout": {"shard": 2}}},
    "a pipeline of unequal stages": {
        "placement": COLOCATED,
        "learner": {"layout": {"pipeline": 2, "pipeline_layers": [3, 1]}},
    },
    "gradients on the host": {
        "placement": COLOCATED,
        "learner": {"layout": {"offload_gradients": True}},
        "algorithm": {"kl": {"coef": 0.1}},
    },
}
"""By what is special in a recipe, its sections."""


def holds(path: Path, overrides: list[str], plan: Plan) -> set[str]:
    """Every offer's keys make of the recipe what was offered; which keys there were."""
    seen = set()
    for offer in plan.offers:
        head, _, said = keys(plan, offer).partition(": ")
        assert head == "keys of the first"
        printed = [] if said == "none, the recipe as it is" else said.split(" ")
        run = load(path, [*overrides, *printed])
        check_layouts(run, None)
        assert_laid_out(run, offer, plan)
        assert not changes(run, offer, plan.rates.usable)
        assert run.engine.kind == "embedded" or has_room(run, offer, plan)
        seen |= {key.partition("=")[0] for key in printed}
    return seen


def has_room(run: Run, offer: Offer, plan: Plan) -> bool:
    """vLLM may take what the plan gives it, weights and cache, and no more than a part in a hundred more."""
    cache, share = run.engine.kv_cache_mb << 20, run.engine.gpu_memory_utilization
    memory, engine = plan.rates.usable / 0.9, offer.engine
    return (
        0 <= cache - engine.cache < 1 << 20
        and engine.bytes <= share * memory + 1 <= engine.bytes + memory / 100 + 2
    )


def assert_laid_out(run: Run, offer: Offer, plan: Plan) -> None:
    axes, place, layout = offer.axes, run.placement, run.learner.layout
    assert Axes.of(layout, axes.world) == axes
    assert layout.sizes(axes.world) == (axes.replicate, axes.shard, axes.context, axes.tensor)
    kinds = ("apart",) if offer.samplers else ("colocated",) if plan.count > 1 else ("inline", "colocated")
    assert place.kind in kinds and (place.kind == "colocated" or not run.learner.sleep)
    assert place.learners == plan.count - offer.samplers
    assert place.engines == offer.engine.count and run.engine.tensor_parallel == offer.engine.tensor
    assert run.engine.sleep or run.engine.kind == "embedded" or offer.samplers
    assert place.engines * run.engine.tensor_parallel == (offer.samplers or plan.count)
    assert run.learner.sleep == offer.variant.run.learner.sleep
    assert run.learner.sleep or not offer.load.asleep
    assert on_host(run) == on_host(offer.variant.run)
    for role in offer.variant.roles:
        assert run.model_dump()[role.name]["layout"] == role.layout.model_dump()
    assert run.sampling.max_lag == (0 if place.kind == "colocated" else plan.run.sampling.max_lag)


def on_host(run: Run) -> tuple[bool, ...]:
    layout = run.learner.layout
    return run.learner.optimizer.offload, layout.offload_parameters, layout.offload_gradients


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("special", SMALL)
def test_keys_give_the_layout_that_was_offered(tmp_path, special, count):
    path = recipe(tmp_path, **MODEL, **SMALL[special])
    made = planned(load(path), "h200", count, top=10**6)
    # With less memory than the least of them takes, more is on the host. A learner that sleeps has no copy of its
    # weights for engines that take them by handles.
    memory = 0.97 * min(offer.peak for offer in made.offers) / 0.9
    tight = planned(load(path), f"FLOPS=1e13,BANDWIDTH=1e11,MEMORY={memory}", count, top=10**6)
    enough = "all of it" if made.run.engine.transfer == "ipc" and count > 1 else "optimizer"
    assert tight.offers
    assert all("optimizer" in o.variant.away or enough in o.variant.away for o in tight.offers)
    made.offers = made.offers[:: 1 + len(made.offers) // 8]
    for plan in (made, tight):
        holds(path, [], plan)


def test_a_sleeping_learner_does_not_hand_out_its_memory(tmp_path):
    path = recipe(tmp_path, **MODEL, **SMALL["colocated by ipc"])
    made = planned(load(path), "h200", 2, top=10**6)
    offer = next(offer for offer in made.offers if not offer.samplers)
    asleep = replace(offer, variant=offer.variant.sleeping(True))
    wanted = changes(made.run, asleep, made.rates.usable)
    assert wanted["engine.transfer"] == "auto" and wanted["learner.sleep"]


def test_an_adapter_with_dropout_on_a_new_model_is_split_by_no_tensor_axis(tmp_path):
    """Parts of a layer would each drop their own, and vLLM would need the model's folder."""
    path = recipe(tmp_path, **MODEL, placement=APART)
    given = ["model.lora={dropout: 0.1}"]
    made = planned(load(path, given), "h200", 8, top=10**6)
    assert {(offer.axes.tensor, offer.engine.tensor) for offer in made.offers} == {(1, 1)}
    made.offers = made.offers[:: 1 + len(made.offers) // 8]
    holds(path, given, made)


def test_an_adapter_does_not_go_to_vllm_by_broadcast(tmp_path):
    """The recipe's embedded engine takes it so; one that is split over devices is vLLM."""
    given = ["placement.kind=apart", "engine.transfer=broadcast", "model.lora={rank: 4}"]
    made = planned(large(tmp_path, "dense", *given), "h200", 8, top=10**6)
    made.offers = [offer for offer in made.offers if offer.samplers and offer.engine.tensor > 1][:2]
    assert made.offers
    assert {"engine.kind", "engine.transfer"} <= holds(tmp_path / "small.yaml", given, made)


@pytest.mark.parametrize("special", [["engine.transfer=ipc"], ["placement.gpus=2"], ["model.lora={rank: 4}"]])
def test_keys_lay_wide_engines_on_the_learners_devices(tmp_path, special):
    """Each on those of learners with a device each, whatever the recipe's place for vLLM is."""
    given = ["engine.kind=vllm", "placement.kind=colocated", *special]
    made = planned(large(tmp_path, "dense", *given), "h200", 16, top=10**6)
    wide = [offer for offer in made.offers if not offer.samplers and offer.engine.tensor > 1]
    made.offers = [*wide[:: 1 + len(wide) // 6], *wide[-1:]]
    assert made.offers
    seen = holds(tmp_path / "small.yaml", given, made)
    assert {"placement.learners", "placement.engines", "engine.tensor_parallel"} <= seen
    assert ("placement.gpus" in seen) == (special == ["placement.gpus=2"])


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("name", ["quickstart", "node", "cluster", "decoupled"])
def test_keys_of_the_recipes_give_the_layout_that_was_offered(tmp_path, name, count):
    LARGE["dense"].save_pretrained(tmp_path)
    given = [f"model.path={tmp_path}", "data.train=train.jsonl"] if name == "cluster" else []
    path = RECIPES / f"{name}.yaml"
    made = planned(load(path, given), "FLOPS=1e14,BANDWIDTH=1e12,MEMORY=4e12", count, top=10**6)
    kinds = {kind_of(offer): offer for offer in reversed(made.offers)}
    assert kinds.keys() == ({"inline"} if count == 1 else {"apart", "colocated"})
    made.offers = [*made.offers[:3], *kinds.values()]
    seen = holds(path, given, made)
    if name == "node" and count == 1:
        assert seen == {"placement.kind"}
    assert ("sampling.max_lag" in seen) == (name != "quickstart" and count > 1)
