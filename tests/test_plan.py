"""The plan counts what is really computed and held, allows what the trainer allows, and is quick for thousands."""

import json
import math
import time
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from parallel_ranks import launch
from plan_ranks import LAYOUTS, bytes_of_each
from small_recipe import recipe
from tandem.config import Run, load
from tandem.config.layout import Layout
from tandem.config.sections import Model
from tandem.engine import EmbeddedEngine, Request, SamplingParams, embedded
from tandem.engine.cache import Room
from tandem.errors import ConfigError
from tandem.learner import Actor
from tandem.model import LanguageModel, token_logprobs, tokenizer_of
from tandem.model import load as load_model
from tandem.model.new import new_tokenizer
from tandem.model.parallel.fit import check_fit
from tandem.model.parallel.schedule import Schedule
from tandem.train import footprint
from tandem.train.plan import work
from tandem.train.plan.axes import ALONE, Axes, Rules, layouts
from tandem.train.plan.device import assumed, find
from tandem.train.plan.engine import Engine, engines
from tandem.train.plan.link import links
from tandem.train.plan.measure import measured, typical
from tandem.train.plan.plan import Plan, plan
from tandem.train.plan.report import axes_keys, text
from tandem.train.plan.request import lengths_of
from tandem.train.plan.training import Trainer
from tandem.train.plan.work import Tokens
from tandem.types import Experience
from tiny_models import SHAPE, language_model

LARGE = {
    "dense": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ),
    "mixture": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
    ),
}


def large(tmp_path: Path, name: str, *overrides: str) -> Run:
    """A run of a model of which there is only a config.json."""
    LARGE[name].save_pretrained(tmp_path / name)
    path = recipe(
        tmp_path,
        model={"new": None, "path": str(tmp_path / name), "dtype": "bf16"},
        data={"max_prompt_tokens": 512},
        sampling={"prompts_per_step": 1024, "answers_per_prompt": 16, "max_answer_tokens": 4096},
        learner={"tokens_per_forward": 8192, "checkpointing": True},
    )
    return load(path, overrides)


def planned(run: Run, device: str, count: int, top: int = 5) -> Plan:
    rates = assumed(find(device), run.model.dtype)
    return plan(run, rates, count=count, per_node=min(8, count), lengths=lengths_of(run, None, None), top=top)


@pytest.mark.parametrize("family", ["qwen2_grouped", "qwen2_untied", "qwen3", "llama"])
def test_operations_are_those_that_are_counted_while_a_model_computes(tmp_path, family):
    model = language_model(family)
    model.save(tmp_path)
    run = load(recipe(tmp_path, model={"new": None, "path": str(tmp_path)}))
    shape = footprint.shape_of(run.model, None)
    rows, length, answers = 3, 24, 10
    tokens_BT = torch.randint(0, 200, (rows, length))
    mask_BT = (torch.arange(length) >= length - answers).expand(rows, -1)
    # The plain kernel computes all pairs, and its backward pass twice as much as forward.
    tokens = Tokens(line=rows * length, predicted=rows * answers, pairs=rows * length**2)

    def logprobs() -> torch.Tensor:
        lengths_B = torch.full((rows,), length)
        return token_logprobs(
            model, tokens_BT, mask_BT, lengths_B, temperature=1.0, logits_bytes=footprint.MIB
        )[0]

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        logp_BT = logprobs()
    once = work.forward(shape, tokens)
    # Some versions of Transformers make the angles of the positions by a product, which is no part of the formula.
    assert counted.get_total_flops() == pytest.approx(once.total, rel=1e-3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        logprobs().sum().backward()
    updated = work.update(run, shape, tokens).products + 3 * once.attention
    assert counted.get_total_flops() == pytest.approx(updated, rel=1e-3)
    assert logp_BT.shape == mask_BT.shape


def test_a_frozen_weight_costs_no_gradient_and_what_is_not_kept_is_computed_again(tmp_path):
    tokens = Tokens(line=1000, predicted=800, pairs=10000)
    full = load(recipe(tmp_path, model={"new": {"hidden_size": 32, "layers": 4, "heads": 2, "kv_heads": 1}}))
    adapted = load(recipe(tmp_path), ["model.lora={rank: 2}", "model.new.layers=4"])
    shape, with_adapter = (footprint.shape_of(run.model, None) for run in (full, adapted))
    once, whole = work.forward(shape, tokens), work.update(full, shape, tokens)
    assert whole.products == 3 * once.products
    extra = 3 * 2 * with_adapter.adapter * tokens.line
    assert work.update(adapted, with_adapter, tokens).products == 2 * once.products + extra
    again = load(recipe(tmp_path), ["learner.checkpointing=true", "model.new.layers=4"])
    more = work.update(again, shape, tokens)
    assert more.products - whole.products == 2 * shape.used * tokens.line
    chunks = load(recipe(tmp_path), ["learner.logits_mb=1", "model.new.layers=4"])
    assert work.update(chunks, shape, replace(tokens, predicted=1000)).products == 3 * work.forward(
        shape, replace(tokens, predicted=1000)
    ).products + (2 * shape.head * 1000 if 1000 * shape.vocabulary * 4 > 2**20 else 0)


def test_a_share_has_the_tokens_that_the_learner_computes(tmp_path):
    """4 groups of 4 answers: on one process each prompt once, on 16 each answer with its own."""
    run = load(recipe(tmp_path), ["data.max_prompt_tokens=24"])
    lengths = lengths_of(run, 20, 10)
    assert work.share(run, lengths, 1).line == 4 * (20 + 4 * 10)
    assert work.share(run, lengths, 2).line == 2 * (20 + 4 * 10)
    assert work.share(run, lengths, 16).line == 20 + 10
    small = load(recipe(tmp_path), ["data.max_prompt_tokens=24", "learner.tokens_per_forward=40"])
    assert work.share(small, lengths, 1).line == 4 * (2 * 20 + 4 * 10)
    assert work.share(small, lengths, 1).forwards == 8


ASKED = {
    "as many slots as answers": ["data.eval=null", "sampling.slots=16"],
    "answers wait": ["data.eval=null", "sampling.slots=3"],
    "evaluations have more prompts": ["sampling.slots=12"],
    "evaluations have more answers": ["sampling.slots=64", "eval.questions=5", "eval.answers=9"],
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("asked", ASKED)
def test_the_engines_cache_is_what_it_allocates(tmp_path, monkeypatch, asked, count):
    """The tensors of the cache that serves both a step and an evaluation, of the busiest of `count` engines."""
    shares = pytest.importorskip("tandem.placement.cluster.engines", exc_type=ImportError).shares
    run = load(recipe(tmp_path), ["data.max_prompt_tokens=20", *ASKED[asked]])
    model, rooms = load_model(run.model, tokenizer_of(run.model), torch.device("cpu")), []

    class Watched(embedded.Slots):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            rooms.append(self.room)

    monkeypatch.setattr(embedded, "Slots", Watched)
    evaluated = [(run.eval.questions, run.eval.answers), (run.eval.questions, 1)] if run.data.eval else []
    for questions, answers in [(4, 4), *evaluated]:
        prompts = [tuple(range(i, i + 20)) for i in range(questions)]
        requests = [Request(tokens=p, key=k) for p in prompts for k in range(answers)]
        for mine in shares(requests, count):
            some = [requests[i] for i in mine]
            EmbeddedEngine(model, run.sampling.slots).generate(some, SamplingParams(max_tokens=12))
    room = reduce(Room.joined, rooms)
    allocated = sum(t.nbytes for t in embedded.cache(room, model).caches)
    shape, lengths = footprint.shape_of(run.model, None), lengths_of(run, None, None)
    here = links(assumed(find("h200"), "fp32"), count, 8)
    found = engines(
        run,
        shape,
        lengths,
        assumed(find("h200"), "fp32"),
        here,
        Rules(model.network.config, 0, 8),
        1e9,
        whole=True,
        apart=False,
    )
    engine = next(found)
    assert engine.slots == room.slots
    assert engine.cache == allocated


def test_where_memory_is_short_the_cache_has_the_slots_that_the_engine_takes(tmp_path, monkeypatch):
    run = load(recipe(tmp_path), ["data.eval=null", "data.max_prompt_tokens=20"])
    model = load_model(run.model, tokenizer_of(run.model), torch.device("cpu"))
    requests = [Request(tokens=tuple(range(i, i + 20)), key=k) for i in range(4) for k in range(4)]
    shape, lengths = footprint.shape_of(run.model, None), lengths_of(run, None, None)
    rates = assumed(find("h200"), "fp32")
    token, rules = shape.key_value * 4, Rules(model.network.config, 0, 8)
    for answers in (1.5, 5.5, 9.0):
        free = answers * (32 * token + footprint.drawing(run, shape))
        engine = next(
            engines(run, shape, lengths, rates, links(rates, 1, 1), rules, free, whole=True, apart=False)
        )
        assert engine.slots == int(answers)
        # As if the logits had been there already.
        monkeypatch.setattr(embedded, "free_bytes", lambda _, answers=answers: answers * 32 * token / 0.8 + 1)
        room = embedded.room_for(requests, SamplingParams(max_tokens=12), 64, model)
        assert room.slots == engine.slots
        assert sum(t.nbytes for t in embedded.cache(room, model).caches) == engine.cache


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """What each of two processes has in each layout."""
    folder = tmp_path_factory.mktemp("plan")
    language_model("qwen2_untied").save(folder / "model")
    launch(bytes_of_each, 2, folder)
    return json.loads((folder / "held.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_gradients_and_optimizer_of_a_layout_are_what_its_processes_hold(held, tmp_path, name):
    language_model("qwen2_untied").save(tmp_path / "model")
    run = load(recipe(tmp_path, model={"new": None, "path": str(tmp_path / "model")}))
    shape = footprint.shape_of(run.model, None)
    axes = Axes(**LAYOUTS[name])
    memory = footprint.memory(run, shape, 24, None, axes)
    fullest = {part: max(rank[part] for rank in held[name]) for part in held[name][0]}
    assert memory.lasting["weights"] == pytest.approx(fullest["weights"], rel=0.1)
    assert memory.lasting["optimizer"] == pytest.approx(fullest["optimizer"], rel=0.1)
    assert memory.update["gradients"] == pytest.approx(fullest["gradients"], rel=0.1)


def mixture(**sizes: int) -> LanguageModel:
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    config = Qwen3MoeConfig(
        **{**shape, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2, **sizes},
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    return LanguageModel(Qwen3MoeForCausalLM(config).eval(), new_tokenizer(), "mixture")


def test_the_sizes_of_a_mixture_are_read_from_its_config(tmp_path):
    model = mixture()
    model.save(tmp_path)
    shape = footprint.shape_of(Model(path=str(tmp_path)), None)
    experts = 3 * 8 * 3 * 64 * 48
    assert shape.parameters == footprint.count(model.network)
    assert (shape.experts, shape.active, shape.expert_parameters) == (8, 2, experts)
    assert shape.used == shape.dense + experts / 4
    both = Axes(shard=8, expert=4)
    assert footprint.held(shape, both)[0] == pytest.approx(shape.parameters / 8, abs=1)
    assert footprint.gathered(shape, both, 2) < footprint.gathered(shape, Axes(shard=8), 2)
    # A tensor group's processes have the same experts.
    split = Axes(shard=4, tensor=2, expert=2)
    assert footprint.held(shape, split)[0] == math.ceil(((shape.parameters - experts) / 2 + experts) / 4)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 4},
        {"num_experts_per_tok": 4, "hidden_size": 128, "moe_intermediate_size": 16},
        {"num_experts_per_tok": 4, "moe_intermediate_size": 128},
    ],
)
def test_the_estimate_of_a_mixtures_activations_is_near_what_the_backward_pass_keeps(tmp_path, sizes):
    model = mixture(**sizes)
    model.save(tmp_path)
    shape = footprint.shape_of(Model(path=str(tmp_path)), None)
    kept, held = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
    tokens_BT, mask_BT = torch.randint(0, 200, (8, 64)), torch.zeros(8, 64, dtype=torch.bool)
    mask_BT[:, -1] = True
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(model, tokens_BT, mask_BT, torch.full((8,), 64), temperature=1.0, logits_bytes=2**30)
    measured_bytes = sum(size for place, size in kept.items() if place not in weights)
    estimate = 8 * 64 * shape.layers * shape.activations * 4
    assert 0.9 < estimate / measured_bytes < 1.1, (measured_bytes, estimate)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(
    ("ranks", "chunks", "parts"), [(2, 1, 8), (4, 1, 3), (2, 2, 8), (4, 2, 16), (4, 4, 2), (4, 2, 6)]
)
def test_a_pipeline_keeps_and_waits_as_its_schedule_says(tmp_path, schedule, ranks, chunks, parts):
    """Passes that the first process has not gone back through, and ticks in which a process has nothing to do."""
    played = Schedule(kind=schedule, ranks=ranks, chunks=chunks).ticks(parts, train=True)
    held = most = 0
    for tick in played:
        if tick[0] is not None:
            held += -1 if tick[0].backward else 1
        most = max(most, held)
    run = large(tmp_path, "dense", f"learner.layout.pipeline_schedule={schedule}")
    axes = Axes(pipeline=ranks, pipeline_chunks=chunks)
    shape = footprint.shape_of(run.model, None)
    layers = 80 / (ranks * chunks)
    assert footprint.kept_layers(schedule, shape, axes, parts) == pytest.approx(most * layers, rel=0.15)
    waiting = len(played) / (2 * parts * chunks) - 1
    made = trainer(run, axes, ranks)
    tokens = replace(work.share(run, made.lengths, 1), forwards=parts)
    bubble = made._pass(tokens, 1.0, 3, gathers=0).bubble
    alone = made._pass(replace(tokens, line=0.0), 1.0, 3, gathers=0).bubble
    assert bubble >= alone
    # Going back as soon as it can, a process fills a part of the gap behind an incomplete round.
    assert waiting - 1e-9 <= alone <= 1.3 * waiting


def test_uneven_stages_cost_what_the_fullest_process_has(tmp_path):
    run = large(tmp_path, "dense")
    shape = footprint.shape_of(run.model, None)
    even, uneven = Axes(pipeline=2), Axes(pipeline=2, pipeline_chunks=2, pipeline_layers=(30, 20, 20, 10))
    assert (even.layers(80), uneven.layers(80)) == (40, 50)
    layer = (shape.parameters - shape.embedding - shape.head) / 80
    assert footprint.held(shape, uneven)[0] - footprint.held(shape, even)[0] == pytest.approx(10 * layer)
    slower = trainer(run, uneven, 2).update().products / trainer(run, even, 2).update().products
    assert slower == pytest.approx(50 / 40)
    layout = Layout(pipeline=2, pipeline_chunks=2, pipeline_layers=[30, 20, 20, 10], tensor=2)
    assert Axes.of(layout, 8) == replace(uneven, tensor=2, shard=2)


def test_a_reference_lies_as_its_own_layout_says(tmp_path):
    """On 8 learners in every layout; with as many shards the reference takes an eighth, and as a pipeline it waits."""
    pulled = "algorithm.kl.coef=0.1"
    made = {}
    for name, keys in {"shard": [], "pipeline": ["reference.layout.pipeline=8"]}.items():
        offers = planned(large(tmp_path, "dense", pulled, *keys), "b200", 8, top=10**6).offers
        made[name] = {(str(o.axes), o.offloaded): o for o in offers if not o.samplers}
    both = made["shard"].keys() & made["pipeline"].keys()
    assert both
    shape = footprint.shape_of(large(tmp_path, "dense").model, None)
    for key in both:
        sharded, staged = made["shard"][key], made["pipeline"][key]
        where = "host" if "parameters" in sharded.offloaded else "lasting"
        held = sharded.memory.host if where == "host" else sharded.memory.lasting
        assert held["reference"] == pytest.approx(2 * shape.parameters / 8, rel=0.01)
        assert sharded.seconds["reference"] != staged.seconds["reference"]
        assert sharded.seconds["update"] == staged.seconds["update"]
    said = text(planned(large(tmp_path, "dense", pulled, "reference.layout.tensor=8"), "b200", 8))
    assert "the reference lies as reference.layout says: tensor=8" in said
    refused = planned(large(tmp_path, "dense", pulled, "reference.layout.shard=3"), "b200", 8).refused
    assert any("shard=3" in reason for reason in refused)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["learner.layout.tensor=3", "placement.learners=3"], "learner.layout.tensor=3 does not divide"),
        (["learner.layout.shard=3"], "learner.layout: .* does not give 2 processes"),
        (["algorithm.kl.coef=0.1", "reference.layout.expert=2"], "reference.layout.expert=2: the model"),
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


@pytest.mark.parametrize("world", [8, 12])
def test_layouts_are_those_that_the_trainer_allows(world):
    config: PreTrainedConfig = LARGE["dense"]
    rules = Rules(config, 0, world)
    found = [axes for axes in layouts(world, rules, 10**6) if isinstance(axes, Axes)]
    assert len(set(found)) == len(found)
    for axes in found:
        assert axes.world == world
        check_fit(Layout(**axes_keys(axes)), config, world, "layout")
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


@pytest.mark.parametrize(("name", "device", "count"), [("dense", "h200", 8192), ("mixture", "h100", 512)])
def test_thousands_of_devices_are_planned_in_seconds_from_a_config_alone(tmp_path, name, device, count):
    run = large(tmp_path, name)
    began = time.monotonic()
    made = planned(run, device, count)
    assert time.monotonic() - began < 10
    assert made.fitting + made.missed == made.tried > 500
    assert [o.step_s for o in made.offers] == sorted(o.step_s for o in made.offers)
    for offer in made.offers:
        assert offer.peak <= made.rates.usable
        assert offer.axes.world + offer.samplers == count
        assert Layout.model_validate(axes_keys(offer.axes)).sizes(offer.axes.world)
    said = text(made)
    assert "these are estimates" in said and "update 40%" in said and "actor" in said
    keys = next(line for line in said.splitlines() if line.startswith("keys of the first"))
    assert f"placement.learners={made.offers[0].axes.world}" in keys


def test_what_does_not_fit_is_told_with_what_it_lacks(tmp_path):
    made = planned(large(tmp_path, "dense"), "FLOPS=1e14,BANDWIDTH=1e12,MEMORY=40e9", 8)
    assert not made.offers and made.missed == made.tried
    said = text(made)
    assert "no layout fits into 36.0 GB a device" in said
    assert " lacks " in said and "for the update, most of it gathered weights" in said
    assert "cannot be; most often" in said
    more = planned(large(tmp_path, "dense"), "FLOPS=1e14,BANDWIDTH=1e12,MEMORY=40e9", 256)
    assert more.offers


def test_optimizer_states_wait_on_the_host_only_where_they_must(tmp_path):
    run = large(tmp_path, "dense", "sampling.max_answer_tokens=1024")
    few, many = (planned(run, "a100", count, top=10**6).offers for count in (16, 256))
    assert few and all(offer.offloaded for offer in few)
    assert any(not offer.offloaded for offer in many)


def test_where_the_device_is_the_host_nothing_is_gained_by_offloading(tmp_path):
    run, away = (load(recipe(tmp_path), [f"learner.optimizer.offload={x}"]) for x in ("false", "true"))
    rates = replace(assumed(find("h200"), "fp32"), host_memory=0.0)
    lengths = lengths_of(load(recipe(tmp_path), ["data.max_prompt_tokens=24"]), None, None)
    peaks = [
        plan(each, rates, count=1, per_node=1, lengths=lengths, top=1, offload=False).offers[0].peak
        for each in (run, away)
    ]
    assert peaks[1] > peaks[0]


def test_sampling_ahead_takes_the_longer_of_both(tmp_path):
    now = planned(large(tmp_path, "dense"), "h200", 64, top=10**6)
    ahead = planned(large(tmp_path, "dense", "sampling.max_lag=1"), "h200", 64, top=10**6)
    apart = next(o for o in ahead.offers if o.samplers)
    others = [o for o in now.offers if (o.axes, o.samplers) == (apart.axes, apart.samplers)]
    rollout = apart.seconds["rollout"]
    learning = sum(apart.seconds.values()) - rollout - apart.seconds["transfer"]
    assert apart.step_s == pytest.approx(max(rollout, learning) + apart.seconds["transfer"])
    assert apart.step_s < others[0].step_s


def trainer(run: Run, axes: Axes, count: int, per_node: int = 8) -> Trainer:
    rates = assumed(find("h200"), "bf16")
    return Trainer(
        run=run,
        shape=footprint.shape_of(run.model, None),
        lengths=lengths_of(run, None, None),
        axes=axes,
        rates=rates,
        links=links(rates, count, per_node),
        offloads=False,
    )


def test_one_process_has_nobody_to_talk_to_and_each_axis_has_its_price(tmp_path):
    run = large(tmp_path, "dense")
    alone = trainer(run, ALONE, 1).update()
    assert alone.layers == alone.weights == alone.bubble == 0
    sharded = trainer(run, Axes(shard=8), 8).update()
    assert sharded.products == pytest.approx(alone.products / 8) and sharded.weights > 0
    # Two gathers in bf16 and a sum in float32 of 7/8 of the weights, for each micro-batch.
    tokens = work.share(run, lengths_of(run, None, None), 8)
    moved = tokens.forwards * 7 / 8 * footprint.shape_of(run.model, None).parameters * 8
    assert sharded.weights == pytest.approx(moved / (0.7 * 450e9), rel=0.01)
    across = trainer(run, Axes(shard=8), 8, per_node=4).update()
    assert across.weights > 2 * sharded.weights
    split = trainer(run, Axes(tensor=8), 8).update()
    wide = 80 * 2 * 3 * 2 * 7 / 8 * work.share(run, lengths_of(run, None, None), 1).line * 8192 * 2
    assert split.layers == pytest.approx(wide / (0.7 * 450e9), rel=0.02)
    stages = trainer(run, Axes(pipeline=8), 8).update()
    forwards = work.share(run, lengths_of(run, None, None), 1).forwards
    assert stages.bubble == pytest.approx(7 / forwards * (stages.products + stages.layers))


def test_decoding_reads_weights_once_a_step_and_the_longest_answer_sets_the_steps(tmp_path):
    run = large(tmp_path, "dense", "sampling.prompts_per_step=1", "learner.updates_per_step=1")
    shape, lengths = footprint.shape_of(run.model, None), lengths_of(run, 512, 100)
    one = work.decoding(run, shape, lengths, 16, 16, joined=True)
    assert one.steps == 4096 and one.slots == pytest.approx(16 * 100 / 4096)
    assert one.weights == 2 * (shape.parameters - shape.embedding - 161 * 8192)
    waiting = work.decoding(run, shape, replace(lengths, longest_answer=100), 64, 16, joined=True)
    assert waiting.steps == 400
    entries = 64 * (100 * 512 / 16 + 100**2 / 2)
    assert waiting.cache == entries * shape.key_value * 2
    rates = assumed(find("h200"), "bf16")
    rules = Rules(LARGE["dense"], 0, 8)
    found = engines(
        run,
        shape,
        lengths,
        rates,
        links(rates, 8, 8),
        rules,
        120e9,
        whole=False,
        apart=True,
    )
    seconds = {e.tensor: e.seconds for e in found if isinstance(e, Engine)}
    assert list(seconds) == [2, 4, 8] and seconds[8] < seconds[2]
    assert seconds[8] > 4096 * one.weights / 8 / 4.8e12


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


def test_the_times_of_a_step_on_this_machine_are_near_those_expected(tmp_path):
    """Medians, in the best of a few tries, each with rates taken right before: other work on the machine disturbs."""
    changes = {
        "model": {"new": {"hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 2, "max_positions": 256}},
        "sampling": {"prompts_per_step": 4, "answers_per_prompt": 8, "max_answer_tokens": 64},
        "data": {"max_prompt_tokens": 48, "eval": None},
        "algorithm": {"kl": {"coef": 0.1}},
        "learner": {"tokens_per_forward": 2560},
    }
    run, tokenizer = load(recipe(tmp_path, **changes)), new_tokenizer()
    model = load_model(run.model, tokenizer, torch.device("cpu"))
    prompts = [tuple(range(i, i + 48)) for i in range(4)]
    requests = [Request(tokens=p, key=8 * i + k) for i, p in enumerate(prompts) for k in range(8)]
    params = SamplingParams(max_tokens=64, min_tokens=64)
    engine = EmbeddedEngine(model, run.sampling.slots, run.learner.tokens_per_forward)
    actor, part = Actor(model, run), full_step(prompts, 8, 64)
    phases = {
        "rollout": lambda: engine.generate(requests, params),
        "reference": lambda: actor.logprobs(part),
        "update": lambda: actor.update([part], 0.0),
    }
    lengths, tries = lengths_of(run, None, None), []
    for _ in range(5):
        rates = measured(run, lengths)
        expected = (
            plan(run, rates, count=1, per_node=1, lengths=lengths, top=1, offload=False).offers[0].seconds
        )
        tries.append({name: expected[name] / typical(act) for name, act in phases.items()})
        if all(0.8 < ratio < 1.2 for ratio in tries[-1].values()):
            return
    raise AssertionError(f"expected over measured seconds: {tries}")


def full_step(prompts: list[tuple[int, ...]], answers: int, length: int) -> Experience:
    """A step in which every answer has this length."""
    rows, columns = len(prompts) * answers, len(prompts[0]) + length
    tokens_BT = torch.randint(0, 200, (rows, columns))
    tokens_BT[:, : columns - length] = torch.tensor(prompts).repeat_interleave(answers, 0)
    mask_BT = (torch.arange(columns) >= columns - length).expand(rows, -1)
    ones_BT = mask_BT.float()
    return Experience(
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        rollout_logp_BT=-ones_BT,
        policy_logp_BT=-ones_BT,
        reward_B=torch.ones(rows).double(),
        group_B=torch.arange(len(prompts)).repeat_interleave(answers),
        length_B=torch.full((rows,), columns),
        prompt_length_B=torch.full((rows,), columns - length),
        truncated_B=torch.zeros(rows, dtype=torch.bool),
        version_B=torch.zeros(rows, dtype=torch.long),
        old_logp_BT=None,
        advantage_BT=ones_BT,
        correction_BT=ones_BT,
        weight_BT=ones_BT / rows,
        ref_logp_BT=None,
    )
