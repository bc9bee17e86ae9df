"""The plan allows what the trainer allows, tells what does not fit, and is quick for thousands of devices."""

import time
from dataclasses import asdict

import pytest
from transformers import Olmo2Config, OlmoeConfig, PreTrainedConfig

from plan_runs import LARGE, large, planned
from small_recipe import recipe
from tandem.config import load
from tandem.config.layout import Layout
from tandem.errors import ConfigError
from tandem.model.parallel.fit import check_fit
from tandem.train import footprint
from tandem.train.plan.axes import Axes, Rules, layouts
from tandem.train.plan.device import find
from tandem.train.plan.report import text
from tandem.train.plan.request import lengths_of
from tandem.train.plan.request import planned as answer
from tandem.train.plan.stages import stages_of


def test_a_reference_lies_as_its_own_layout_says(tmp_path):
    """On 8 learners in every layout; with as many shards the reference takes an eighth, and as a pipeline it waits."""
    pulled = "algorithm.kl.coef=0.1"
    made = {}
    for name, keys in {"shard": [], "pipeline": ["reference.layout.pipeline=8"]}.items():
        offers = planned(large(tmp_path, "dense", pulled, *keys), "b200", 8, top=10**6).offers
        made[name] = {(str(o.axes), o.variant.away): o for o in offers if not o.samplers}
    both = made["shard"].keys() & made["pipeline"].keys()
    assert both
    shape = footprint.shape_of(large(tmp_path, "dense").model, None)
    for key in both:
        sharded, staged = made["shard"][key], made["pipeline"][key]
        where = "host" if "parameters" in sharded.variant.away else "lasting"
        held = sharded.load.together.host if where == "host" else sharded.load.together.lasting
        assert held["reference"] == pytest.approx(2 * shape.parameters / 8, rel=0.01)
        assert sharded.seconds["reference"] != staged.seconds["reference"]
        assert sharded.seconds["update"] == staged.seconds["update"]
    said = text(planned(large(tmp_path, "dense", pulled, "reference.layout.tensor=8"), "b200", 8))
    assert "the reference lies as reference.layout says: tensor=8" in said
    refused = planned(large(tmp_path, "dense", pulled, "reference.layout.shard=3"), "b200", 8).refused
    assert any("shard=3" in reason for reason in refused)


def test_a_critic_lies_as_its_own_layout_says_and_reads_and_learns_each_step(tmp_path):
    """On 32 learners in every layout, against the same run without one."""
    keys = ["algorithm.preset=ppo", "algorithm.kl.coef=0", "critic.layout.tensor=8"]
    made = {}
    for name, more in {"alone": ["algorithm.preset=reinforce_pp", *keys[1:2]], "critic": keys}.items():
        offers = planned(large(tmp_path, "dense", *more), "b200", 64, top=10**6).offers
        made[name] = {(str(o.axes), o.variant.away): o for o in offers if o.samplers == 32}
    both = [(made["critic"][key], made["alone"][key]) for key in made["critic"].keys() & made["alone"].keys()]
    both = [pair for pair in both if not pair[0].variant.away]
    assert both
    layers = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    parameters = layers + 161 * 8192 + 128256 * 8192 + 8192
    # A quarter is 4,096 answers, each in a forward of its own with its prompt.
    tokens = 4096 * (512 + 4096)
    pairs = 4096 * (512**2 / 2 + 512 * 4096 + 4096**2 / 2)
    reading = (2 * layers * tokens + 4 * 80 * 8192 * pairs) / 8 / (0.5 * 2250e12)
    for offer, alone in both:
        place = offer.places["critic"]
        assert place.axes == Axes(shard=4, tensor=8)
        held = offer.load.together.lasting
        for part, each in {"critic": 2, "critic's optimizer": 8, "critic's master weights": 4}.items():
            assert held[part] == pytest.approx(each * parameters / 32, rel=1e-3)
        assert held | alone.load.together.lasting == held
        head = offer.places["actor"].at(stages_of(offer.axes, 80)[-1])
        assert place.memory.update["logits"] < head.update["logits"] / 1e3
        assert place.passes["values"].products == pytest.approx(reading, rel=1e-3)
        more = offer.seconds["values"] + offer.seconds["critic update"]
        assert offer.learning_s == pytest.approx(alone.learning_s + more) and more > 0
    said = text(planned(large(tmp_path, "dense", *keys), "b200", 64))
    assert "the critic lies as critic.layout says: shard=" in said
    refused = planned(large(tmp_path, "dense", *keys, "critic.layout.shard=3"), "b200", 64).refused
    assert any(reason.startswith("critic.layout: ") for reason in refused)


def test_a_reward_model_is_read_in_a_layout_of_its_own(tmp_path):
    judge = large(
        tmp_path, "dense", "reward.model={path: " + str(tmp_path / "dense") + ", layout: {tensor: 8}}"
    )
    with_one, without = (planned(run, "b200", 64) for run in (judge, large(tmp_path, "dense")))
    offer = with_one.offers[0]
    place = offer.places["reward.model"]
    assert place.axes == Axes(shard=place.axes.shard, tensor=8)
    block = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672
    parameters = 80 * block + 161 * 8192 + 128256 * 8192 + 8192
    assert place.memory.lasting == pytest.approx({"weights": 2 * parameters / 8 / place.axes.shard}, rel=1e-3)
    assert not place.memory.update
    assert offer.load.together.lasting["reward.model"] == place.memory.lasting["weights"]
    axes = offer.places["actor"].axes
    alike = next(other for other in without.offers if other.places["actor"].axes == axes)
    assert offer.learning_s == pytest.approx(alike.learning_s + offer.seconds["reward model"])
    assert "the reward.model lies as reward.model.layout says: shard=" in text(with_one)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["learner.layout.tensor=3", "placement.learners=3"], "learner.layout.tensor=3 does not divide"),
        (["learner.layout.shard=3"], "learner.layout: .* does not give 2 processes"),
        (["algorithm.kl.coef=0.1", "reference.layout.expert=2"], "reference.layout.expert=2: the model"),
        (["algorithm.preset=ppo", "critic.layout.tensor=3"], "critic.layout.*tensor=3"),
        (
            ["learner.layout.tensor=2", "model.lora={dropout: 0.1}"],
            "model.lora.dropout=0.1 needs learner.layout.tensor=1",
        ),
        (
            ["learner.layout.tensor=2", "model.lora={targets: [lm_head]}"],
            "leave lm_head out of model.lora.targets",
        ),
    ],
)
def test_a_recipes_layout_that_does_not_fit_its_model_ends_the_plan(tmp_path, keys, said):
    run = large(tmp_path, "dense", "placement.kind=apart", "placement.learners=2", *keys)
    with pytest.raises(ConfigError, match=said):
        planned(run, "h200", 8)


def test_one_learner_is_offered_no_layout(tmp_path):
    """Alone, and beside an engine on the other of two devices."""
    run = large(tmp_path, "dense", "algorithm.kl.coef=0.1", "learner.layout.offload_gradients=true")
    for count in (1, 2):
        made = planned(run, "FLOPS=1e14,BANDWIDTH=1e12,MEMORY=1e12", count, top=10**6)
        alone = [found for found in (*made.offers, *made.misses) if found.axes.world == 1]
        assert {"", "optimizer"} >= {found.variant.away for found in alone} and alone
        assert not any(role.layout.offload_parameters for found in alone for role in found.variant.roles)
    split = planned(large(tmp_path, "dense", "algorithm.kl.coef=0.1", "reference.layout.tensor=2"), "h200", 1)
    assert not split.tried
    assert [why.partition(",")[0] for why in split.refused] == [
        "reference.layout.tensor=2 needs placement.learners above 1"
    ]


@pytest.mark.parametrize("world", [8, 12])
@pytest.mark.parametrize(
    ("config", "experts"),
    [(LARGE["dense"], 0), (OlmoeConfig(num_experts=8), 8), (Olmo2Config(), 0)],
    ids=["llama", "olmoe", "olmo2"],
)
def test_layouts_are_those_that_the_trainer_allows(world, config: PreTrainedConfig, experts):
    """Of the second it splits neither experts nor the line of layers, of the third not the latter."""
    rules = Rules(config, experts, world)
    found = [axes for axes in layouts(world, rules, 10**6) if isinstance(axes, Axes)]
    assert len(set(found)) == len(found)
    for axes in found:
        assert axes.world == world
        check_fit(Layout(**asdict(axes)), config, world, "layout")
    wanted = set()
    for tensor in range(1, world + 1):
        for context in range(1, world + 1):
            for shard in range(1, world + 1):
                layout = Layout(tensor=tensor, context=context, shard=shard)
                try:
                    check_fit(layout, config, world, "layout")
                except ConfigError:
                    continue
                wanted.add(Axes(tensor=tensor, context=context, shard=shard))
    assert wanted == {axes for axes in found if axes.replicate == axes.pipeline == 1}


def layouts_s() -> float:
    """How fast this CPU is at Python: its seconds for a million layouts."""
    began = time.process_time()
    for _ in range(100_000):
        Axes(tensor=2, shard=4)
    return 10 * (time.process_time() - began)


@pytest.mark.parametrize(("name", "device", "count"), [("dense", "h200", 8192), ("mixture", "h100", 512)])
def test_thousands_of_devices_are_planned_in_seconds_from_a_config_alone(tmp_path, name, device, count):
    run = large(tmp_path, name)
    before, began = layouts_s(), time.process_time()
    made = planned(run, device, count)
    seconds = time.process_time() - began
    assert seconds < 8 * max(before, layouts_s()), "20 s where a layout takes 2.5 microseconds to make"
    assert made.fitting + made.missed == made.tried > 500
    assert [o.step_s for o in made.offers] == sorted(o.step_s for o in made.offers)
    for offer in made.offers:
        assert offer.peak <= made.rates.usable
        assert offer.axes.world + offer.samplers == count
        assert Layout.model_validate(asdict(offer.axes)).sizes(offer.axes.world)
    said = text(made)
    assert "these are estimates" in said and "update 40%" in said and "actor" in said
    keys = next(line for line in said.splitlines() if line.startswith("keys of the first"))
    assert f"placement.learners={made.offers[0].axes.world}" in keys


def test_what_does_not_fit_is_told_with_what_it_lacks(tmp_path):
    made = planned(large(tmp_path, "dense"), "FLOPS=1e14,BANDWIDTH=1e12,MEMORY=32e9", 8)
    assert not made.offers and made.missed == made.tried
    said = text(made)
    assert "no layout fits into 28.8 GB a device" in said
    assert " lacks " in said and "for the update, most of it activations" in said
    assert "cannot be; most often" in said
    more = planned(large(tmp_path, "dense"), "FLOPS=1e14,BANDWIDTH=1e12,MEMORY=32e9", 256)
    assert more.offers


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("h2000", "choose one of h200, h100"),
        ("FLOPS=1e12", "BANDWIDTH and MEMORY missing"),
        ("FLOPS=1e12,BANDWIDTH=x,MEMORY=1", "BANDWIDTH=x: not a positive number"),
        ("FLOPS=1e12,SPEED=1", "SPEED=1: unknown figure"),
    ],
)
def test_an_unknown_device_is_told(device, said):
    with pytest.raises(ConfigError, match=said):
        find(device)


def test_lengths_beyond_the_recipe_or_the_model_are_told(tmp_path):
    run = load(recipe(tmp_path), ["data.max_prompt_tokens=64"])
    with pytest.raises(ConfigError, match=r"--answer 13 is above sampling\.max_answer_tokens=12"):
        lengths_of(run, None, 13)
    with pytest.raises(ConfigError, match="more than the model's 128 positions"):
        planned(load(recipe(tmp_path), ["data.max_prompt_tokens=120"]), "h200", 1)


def test_lengths_beyond_the_model_are_told_before_anything_is_measured(tmp_path, monkeypatch):
    def never(*arguments: object) -> None:
        raise AssertionError("measures")

    for name in ("measured", "measured_together"):
        monkeypatch.setattr(f"tandem.train.plan.request.{name}", never)
    run = load(recipe(tmp_path), ["data.max_prompt_tokens=120"])
    for count in (1, 3):
        with pytest.raises(ConfigError, match="120 \\+ answer 12 = 132 tokens are more than"):
            answer(run, device="cpu", count=count, per_node=8, prompt=None, answer=None, top=1)
