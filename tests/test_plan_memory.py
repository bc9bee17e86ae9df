"""The plan counts the bytes that are really held."""

import json
import math
from dataclasses import fields, replace
from functools import reduce
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from parallel_ranks import launch
from plan_ranks import ANSWER, ANSWERS, EXCHANGES, LAYOUTS, OTHERS, PROMPT, asked, bytes_of_each
from plan_runs import large, planned, trainer
from small_recipe import recipe
from tandem.config import load
from tandem.config.layout import Layout
from tandem.config.sections import Model
from tandem.engine import EmbeddedEngine, Request, SamplingParams, embedded
from tandem.engine.cache import Room
from tandem.model import LanguageModel, token_logprobs, tokenizer_of
from tandem.model import load as load_model
from tandem.model.new import new_tokenizer
from tandem.model.parallel.schedule import Schedule
from tandem.train import footprint
from tandem.train.plan import report, work
from tandem.train.plan.axes import Axes, Rules
from tandem.train.plan.device import Cost, Exchanges, assumed, find
from tandem.train.plan.engine import engines
from tandem.train.plan.link import links
from tandem.train.plan.plan import plan
from tandem.train.plan.ranks import ranks_of
from tandem.train.plan.request import lengths_of
from tandem.train.plan.stages import Stages, stages_of
from tandem.train.plan.training import Trainer
from tandem.train.plan.work import Lengths
from tiny_models import SHAPE

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
        samplers=0,
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
            engines(run, shape, lengths, rates, links(rates, 1, 1), rules, free, whole=True, samplers=0)
        )
        assert engine.slots == int(answers)
        # As if the logits had been there already.
        monkeypatch.setattr(embedded, "free_bytes", lambda _, answers=answers: answers * 32 * token / 0.8 + 1)
        asked = embedded.room_for(requests, SamplingParams(max_tokens=12), 64, model.max_positions)
        room = embedded.fitting(asked, model)
        assert room.slots == engine.slots
        assert sum(t.nbytes for t in embedded.cache(room, model).caches) == engine.cache


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, int]]]]:
    """Where some models are, and what each of two processes has of them in each layout."""
    folder = tmp_path_factory.mktemp("plan")
    for name, model in {"model": dense(False), "tied": dense(True), "mixture": mixture()}.items():
        model.save(folder / name)
    launch(bytes_of_each, 2, folder)
    return folder, json.loads((folder / "held.json").read_text())


def dense(tied: bool) -> LanguageModel:
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5}
    config = Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    return LanguageModel(Qwen2ForCausalLM(config).eval(), new_tokenizer(), "dense")


@pytest.mark.parametrize("name", [*LAYOUTS, *OTHERS])
def test_what_a_layout_takes_is_what_each_of_its_processes_holds(held, name):
    """And what waits for the backward passes, probabilities of the tokens among it."""
    folder, found = held
    run = asked(folder, name)
    shape, learner, axes = footprint.shape_of(run.model, None), run.learner, Axes.of(run.learner.layout, 2)
    # Of what the choice of tokens takes for a moment, so much is kept.
    copies, stay = (footprint.GRAPH_COPIES, 2) if axes.tensor > 1 else (footprint.LOGIT_COPIES, 1)
    size = ANSWERS * ANSWER * shape.vocabulary * 4 / (axes.tensor * axes.context)
    every = stages_of(axes, shape.layers) * (2 // axes.pipeline)
    for rank, stages in zip(found[name], every, strict=True):
        made = footprint.learning_at(run, shape, learner.layout, learner.optimizer, PROMPT, stages)
        assert made.lasting["weights"] == pytest.approx(rank["weights"], rel=0.01)
        assert made.lasting["optimizer"] == pytest.approx(rank["optimizer"], rel=0.01)
        assert made.update["gradients"] == pytest.approx(rank["gradients"], rel=0.01)
        passing = (copies - stay) * size * stages.last
        kept = made.update["activations"] + made.update["logits"] - passing
        assert kept == pytest.approx(rank["kept"], rel=0.2 if axes.pipeline > 1 else 0.1)


@pytest.mark.parametrize("name", [*LAYOUTS, *OTHERS])
def test_the_exchanges_that_are_counted_are_those_that_processes_make(held, name):
    """Where one of its kind takes a second and nothing else takes any time, the seconds are their number."""
    folder, found = held
    run = asked(folder, name)
    shape, layout = footprint.shape_of(run.model, None), run.learner.layout
    bare = Exchanges(**{kind.name: Cost(message_s=0.0, rate=math.inf) for kind in fields(Exchanges)})
    for kind in EXCHANGES:
        one = replace(bare, **{kind: Cost(message_s=1.0, rate=math.inf)})
        rates = replace(assumed(find("h200"), "fp32"), bandwidth=math.inf, exchanges=one)
        made = Trainer(
            run=run,
            shape=shape,
            lengths=Lengths(prompt=PROMPT, answer=ANSWER, longest_prompt=PROMPT, longest_answer=ANSWER),
            axes=Axes.of(layout, 2),
            rates=rates,
            links=links(rates, 2, 2),
            layout=layout,
            optimizer=run.learner.optimizer,
        ).update()
        assert [made.exposed] * 2 == pytest.approx([rank[kind] for rank in found[name]]), kind


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "axes",
    [
        Axes(shard=2, tensor=2),
        Axes(pipeline=2, shard=2),
        Axes(pipeline=5),
        Axes(pipeline=2, pipeline_chunks=2, tensor=2),
        Axes(pipeline=3, pipeline_layers=(1, 3, 1), context=2),
    ],
)
def test_the_weights_of_all_processes_are_those_of_the_model(tmp_path, axes, tied):
    """And a head that is the embedding once more, where the two ends are not one process."""
    model = dense(tied)
    model.save(tmp_path)
    shape = footprint.shape_of(Model(path=str(tmp_path)), None)
    every = stages_of(axes, 5)
    assert sum(stages.layers for stages in every) == 5
    weights = sum(footprint.held(shape, stages)[0] * axes.cut * axes.tensor for stages in every)
    more = shape.embedding if tied and axes.pipeline > 1 else 0
    assert weights == pytest.approx(footprint.count(model.network) + more, abs=axes.world)


def test_a_plan_says_what_each_process_of_a_pipeline_takes(tmp_path):
    """In a row of its own, or of many in as many rows as there are numbers of layers, and both ends."""
    made = planned(large(tmp_path, "dense", "algorithm.kl.coef=0.1"), "h200", 64, top=10**6)
    few, many = (next(offer for offer in made.offers if offer.axes.pipeline == size) for size in (4, 40))
    rows = [ranks for ranks in ranks_of(few) if ranks.role == "actor"]
    each = few.axes.world // 4
    assert [ranks.learners for ranks in rows] == [f"{i * each}-{(i + 1) * each - 1}" for i in range(4)]
    assert [ranks.holds for ranks in rows] == ["20, embedding", "20", "20", "20, head"]
    first, second, *_, last = (ranks.memory.update for ranks in rows)
    assert first["activations"] > second["activations"] > last["activations"] > 0
    assert last["logits"] and not first["logits"]
    said = report.roles(made, few)
    wanted = [["actor", ranks.learners, ranks.holds.partition(" ")[0]] for ranks in rows]
    wanted += [["reference", f"0-{few.axes.world - 1}", "a"]]
    assert [line.split()[:3] for line in said.splitlines()[2:7]] == wanted
    assert [ranks.holds for ranks in ranks_of(many) if ranks.role == "actor"] == [
        "2, embedding",
        "2",
        "2, head",
    ]
    assert max(ranks.memory.learner for ranks in rows) == few.places["actor"].memory.learner


def whole(axes: Axes) -> Stages:
    """What a process without a pipeline has of the mixture."""
    return Stages(axes=axes, layers=3)


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
    assert footprint.held(shape, whole(both))[0] == pytest.approx(shape.parameters / 8, abs=1)
    assert footprint.gathered(shape, whole(both), 2) < footprint.gathered(shape, whole(Axes(shard=8)), 2)
    # A tensor group's processes have the same experts.
    split = Axes(shard=4, tensor=2, expert=2)
    assert footprint.held(shape, whole(split))[0] == math.ceil(
        ((shape.parameters - experts) / 2 + experts) / 4
    )


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
    estimate = 8 * 64 * shape.layers * shape.kept(Axes(), True, 4)
    assert 0.9 < estimate / measured_bytes < 1.1, (measured_bytes, estimate)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(
    ("ranks", "chunks", "parts"), [(2, 1, 8), (4, 1, 3), (2, 2, 8), (4, 2, 16), (4, 4, 2), (4, 2, 6)]
)
def test_a_pipeline_keeps_and_waits_as_its_schedule_says(tmp_path, schedule, ranks, chunks, parts):
    """Passes that each process has not gone back through, and ticks in which a process has nothing to do."""
    played = Schedule(kind=schedule, ranks=ranks, chunks=chunks).ticks(parts, train=True)
    held, most = [0] * ranks, [0] * ranks
    for tick in played:
        for rank, action in enumerate(tick):
            if action is not None:
                held[rank] += -1 if action.backward else 1
            most[rank] = max(most[rank], held[rank])
    run = large(tmp_path, "dense", f"learner.layout.pipeline_schedule={schedule}")
    axes = Axes(pipeline=ranks, pipeline_chunks=chunks)
    layers = 80 / (ranks * chunks)
    kept = [stages.kept(schedule, parts) for stages in stages_of(axes, 80)]
    assert kept == pytest.approx([passes * layers for passes in most], rel=0.15)
    waiting = len(played) / (2 * parts * chunks) - 1
    made = trainer(run, axes, ranks)
    tokens = replace(work.share(run, made.lengths, 1), forwards=parts)
    bubble = made._pass(tokens, [1.0] * ranks, 3, gathers=0).bubble
    alone = made._pass(replace(tokens, line=0.0), [1.0] * ranks, 3, gathers=0).bubble
    assert bubble >= alone
    # Going back as soon as it can, a process fills a part of the gap behind an incomplete round.
    assert waiting - 1e-9 <= alone <= 1.3 * waiting


def test_uneven_stages_cost_what_the_fullest_process_has(tmp_path):
    run = large(tmp_path, "dense")
    shape = footprint.shape_of(run.model, None)
    even, uneven = Axes(pipeline=2), Axes(pipeline=2, pipeline_chunks=2, pipeline_layers=(30, 20, 20, 10))
    assert [[s.layers for s in stages_of(axes, 80)] for axes in (even, uneven)] == [[40, 40], [50, 30]]
    layer = (shape.parameters - shape.embedding - shape.head) / 80
    more = (footprint.held(shape, stages_of(axes, 80)[0])[0] for axes in (uneven, even))
    assert next(more) - next(more) == pytest.approx(10 * layer)
    slower, equal = (trainer(run, axes, 2).update() for axes in (uneven, even))
    tokens = work.share(run, lengths_of(run, None, None), 1)
    whole, inside = (work.update(run, part, tokens).total for part in (shape, replace(shape, head=0)))
    # The last process has the output head besides.
    last = inside * 40 / 80 + whole - inside
    assert slower.products / equal.products == pytest.approx(inside * 50 / 80 / last)
    layout = Layout(pipeline=2, pipeline_chunks=2, pipeline_layers=[30, 20, 20, 10], tensor=2)
    assert Axes.of(layout, 8) == replace(uneven, tensor=2, shard=2)


def test_optimizer_states_wait_on_the_host_only_where_they_must(tmp_path):
    run = large(tmp_path, "dense", "sampling.max_answer_tokens=1024")
    few, many = (planned(run, "a100", count, top=10**6).offers for count in (16, 256))
    assert few and all(offer.variant.away for offer in few)
    assert any(not offer.variant.away for offer in many)


def test_where_the_device_is_the_host_nothing_is_gained_by_offloading(tmp_path):
    run, away = (load(recipe(tmp_path), [f"learner.optimizer.offload={x}"]) for x in ("false", "true"))
    rates = replace(assumed(find("h200"), "fp32"), host_memory=0.0)
    lengths = lengths_of(load(recipe(tmp_path), ["data.max_prompt_tokens=24"]), None, None)
    peaks = [
        plan(each, rates, count=1, per_node=1, lengths=lengths, top=1, offload=False).offers[0].peak
        for each in (run, away)
    ]
    assert peaks[1] > peaks[0]


ASLEEP = ["placement={kind: colocated, learners: 2, engines: 2}", "algorithm.kl.coef=0.1"]


def test_a_learner_sleeps_where_engine_and_learner_do_not_fit_at_once(tmp_path):
    """70 billion weights on 16 devices: a learner keeps 70 GB, an engine alone takes 141 of the 162 that there are."""
    offers = planned(large(tmp_path, "dense", *ASLEEP), "b200", 16, top=10**6).offers
    asleep = [offer for offer in offers if offer.load.asleep]
    shape = footprint.shape_of(large(tmp_path, "dense").model, None)
    assert asleep and not any(offer.samplers for offer in asleep)
    for offer in asleep:
        update = offer.load.together.update
        lasting = sum(place.lasting for place in offer.places.values())
        assert offer.load.asleep == lasting and offer.engine.bytes > 2 * shape.parameters
        assert lasting + offer.engine.bytes > offer.peak
        assert offer.peak == max(lasting + sum(update.values()), offer.engine.bytes)
        assert offer.seconds["sleep and wake"] == pytest.approx(2 * lasting / (0.7 * 64e9))
        learning = sum(seconds for phase, seconds in offer.seconds.items())
        assert offer.step_s == pytest.approx(learning)
    whole = next(offer for offer in asleep if not offer.variant.run.learner.optimizer.offload)
    # Weights, moments, masters and the reference, in equal parts.
    assert whole.load.asleep == pytest.approx((2 + 8 + 4 + 2) * shape.parameters / 16, rel=0.05)
    assert "learner.sleep=true" in whole.variant.keys


def test_a_recipe_that_sleeps_is_planned_so_where_it_can(tmp_path):
    run = large(tmp_path, "dense", *ASLEEP, "learner.sleep=true")
    for offer in planned(run, "b200", 64, top=10**6).offers:
        assert bool(offer.load.asleep) == (not offer.samplers)
        assert ("sleep and wake" in offer.seconds) == (not offer.samplers)
    apart = next(offer for offer in planned(run, "b200", 64, top=10**6).offers if offer.samplers)
    assert "learner.sleep=false" in report.keys(planned(run, "b200", 64), apart)
    short = planned(run, "FLOPS=2e15,BANDWIDTH=8e12,MEMORY=180e9,HOST_MEMORY=10e9", 64, top=10**6)
    assert not any(offer.load.asleep for offer in short.offers)
    # On a CPU what sleeps lies in the same memory: nothing is gained, and the copies take time.
    rates = replace(assumed(find("b200"), "bf16"), host_memory=0.0)
    lengths = lengths_of(run, None, None)
    here = plan(run, rates, count=64, per_node=8, lengths=lengths, top=10**6, offload=False).offers
    for offer in here:
        assert bool(offer.load.asleep) == (not offer.samplers)
        assert offer.samplers or offer.peak >= offer.load.asleep + offer.engine.bytes
