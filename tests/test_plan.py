"""The plan counts what is really computed and held, allows what the trainer allows, and is quick for thousands."""

import json
import time
from dataclasses import replace
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
from tandem.errors import ConfigError
from tandem.learner import Actor
from tandem.model import LanguageModel, token_logprobs, tokenizer_of
from tandem.model import load as load_model
from tandem.model.new import new_tokenizer
from tandem.model.parallel.fit import check_fit
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
    assert counted.get_total_flops() == once.total
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        logprobs().sum().backward()
    assert counted.get_total_flops() == work.update(run, shape, tokens).products + 3 * once.attention
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


def test_the_engines_cache_is_what_it_allocates(tmp_path, monkeypatch):
    run = load(recipe(tmp_path), ["data.max_prompt_tokens=20", "sampling.slots=8"])
    model, made = load_model(run.model, tokenizer_of(run.model), torch.device("cpu")), []

    class Watched(embedded.Slots):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            made.append(sum(t.nbytes for t in self.caches))

    monkeypatch.setattr(embedded, "Slots", Watched)
    prompts = [tuple(range(i, i + 20)) for i in range(4)]
    requests = [Request(tokens=p, key=k) for p in prompts for k in range(4)]
    EmbeddedEngine(model, 8).generate(requests, SamplingParams(max_tokens=12))
    found = planned(run, "h200", 1).offers[0].engine
    assert found.slots == 8
    # The engine has a lane for each prompt of the step, the plan only for those in flight.
    assert 0.6 < found.cache / made[0] <= 1.0


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


@pytest.mark.slow
def test_the_times_of_a_step_on_this_machine_are_near_those_expected(tmp_path):
    """Medians, and the best of three tries, each with rates taken right before: other work on the machine disturbs."""
    changes = {
        "model": {"new": {"hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 2, "max_positions": 256}},
        "sampling": {"prompts_per_step": 8, "answers_per_prompt": 8, "max_answer_tokens": 64},
        "data": {"max_prompt_tokens": 48},
        "learner": {"tokens_per_forward": 2560},
    }
    path = recipe(tmp_path, **changes)
    run, tokenizer = load(path), new_tokenizer()
    model = load_model(run.model, tokenizer, torch.device("cpu"))
    prompts = [tuple(range(i, i + 48)) for i in range(8)]
    requests = [Request(tokens=p, key=8 * i + k) for i, p in enumerate(prompts) for k in range(8)]
    params = SamplingParams(max_tokens=64, min_tokens=64)
    engine = EmbeddedEngine(model, run.sampling.slots, run.learner.tokens_per_forward)
    actor, part = Actor(model, run), full_step(prompts, 8, 64)
    lengths = lengths_of(run, None, None)
    tries = []
    for _ in range(3):
        rates = measured(run, lengths)
        seconds = (
            plan(run, rates, count=1, per_node=1, lengths=lengths, top=1, offload=False).offers[0].seconds
        )
        rollout = typical(lambda: engine.generate(requests, params))
        update = typical(lambda: actor.update([part], 0.0))
        tries.append((seconds["rollout"] / rollout, seconds["update"] / update))
        if all(0.8 < ratio < 1.2 for ratio in tries[-1]):
            return
    raise AssertionError(f"expected over measured seconds of rollout and update: {tries}")


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
