"""The plan counts what is really computed, and how long it takes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from near import assert_near
from plan_ranks import full_step
from plan_runs import LARGE, large, planned, trainer
from small_recipe import recipe
from tandem.config import load
from tandem.config.layout import Layout
from tandem.engine import EmbeddedEngine, Request, SamplingParams
from tandem.learner import Actor
from tandem.model import load as load_model
from tandem.model import token_logprobs
from tandem.model.new import new_tokenizer
from tandem.placement.inline import critic_of
from tandem.train import footprint
from tandem.train.plan import work
from tandem.train.plan.axes import ALONE, Axes, Rules
from tandem.train.plan.device import assumed, find
from tandem.train.plan.engine import Engine, engines, times
from tandem.train.plan.link import links
from tandem.train.plan.measure import measured
from tandem.train.plan.plan import plan
from tandem.train.plan.request import lengths_of
from tandem.train.plan.typical import typical
from tandem.train.plan.work import Tokens
from tiny_models import language_model


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


def test_sampling_ahead_takes_the_longer_of_both(tmp_path):
    now = planned(large(tmp_path, "dense"), "h200", 64, top=10**6)
    ahead = planned(large(tmp_path, "dense", "sampling.max_lag=1"), "h200", 64, top=10**6)
    apart = next(o for o in ahead.offers if o.samplers)
    others = [o for o in now.offers if (o.axes, o.samplers) == (apart.axes, apart.samplers)]
    rollout = apart.seconds["rollout"]
    learning = sum(apart.seconds.values()) - rollout - apart.seconds["transfer"]
    assert apart.step_s == pytest.approx(max(rollout, learning) + apart.seconds["transfer"])
    assert apart.step_s < others[0].step_s


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
    # Into and out of attention, feed-forward and all layers together, three times over; 14 messages each.
    whole, turns = work.share(run, lengths_of(run, None, None), 1), (80 * 2 + 1) * 3
    wide = turns * 2 * 7 / 8 * whole.line * 8192 * 2
    messages = turns * whole.forwards * 14 * 2e-6
    assert split.layers == pytest.approx(wide / (0.7 * 450e9) + messages, rel=1e-3)
    # What lies between is then computed whole: forward, again, and backward, at 80 bytes for each number and pass.
    repeated = 7 / 8 * whole.line * 8192 * 80 * 80 * 4 / (0.7 * 4.8e12)
    together = replace(trainer(run, Axes(tensor=8), 8), layout=Layout(sequence=False)).update()
    assert together.products == pytest.approx(split.products + repeated)
    stages = trainer(run, Axes(pipeline=8), 8).update()
    # The last one has the head too: what the seven before it compute is waited for.
    shape = footprint.shape_of(run.model, None)
    layers = work.update(run, replace(shape, head=0), whole).total / 8 / (0.4 * 989e12)
    assert stages.products > layers
    assert stages.bubble == pytest.approx(7 / whole.forwards * (layers + stages.layers))


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
        samplers=8,
    )
    seconds = {e.tensor: e.seconds for e in found if isinstance(e, Engine)}
    assert list(seconds) == [2, 4, 8] and seconds[8] < seconds[2]
    assert seconds[8] > 4096 * one.weights / 8 / 4.8e12
    # On the same cores nothing is read while others multiply.
    here = links(rates, 8, 8)
    both, apart = (
        times(waiting, shape, each, here, 1, 2)[0] for each in (rates, replace(rates, overlaps=False))
    )
    shorter = min(waiting.weights / rates.bandwidth, waiting.step.products / rates.decode)
    assert apart == pytest.approx(both + 400 * shorter)


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_the_times_of_a_step_on_this_machine_are_near_those_expected(tmp_path):
    """And of an engine that has half of its answers, by rates of engines that have all of them and a quarter."""
    changes = {
        "model": {"new": {"hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 2, "max_positions": 256}},
        "sampling": {"prompts_per_step": 4, "answers_per_prompt": 8, "max_answer_tokens": 64},
        "data": {"max_prompt_tokens": 48, "eval": None},
        "algorithm": {"advantage": "gae", "scale": "none", "kl": {"coef": 0.1}},
        "learner": {"tokens_per_forward": 2560},
    }
    run, tokenizer = load(recipe(tmp_path, **changes)), new_tokenizer()
    model = load_model(run.model, tokenizer, torch.device("cpu"))
    prompts = [tuple(range(i, i + 48)) for i in range(4)]
    requests = [Request(tokens=p, key=8 * i + k) for i, p in enumerate(prompts) for k in range(8)]
    params = SamplingParams(max_tokens=64, min_tokens=64)
    engine = EmbeddedEngine(model, run.sampling.slots, run.learner.tokens_per_forward)
    actor, critic, part = Actor(model, run), critic_of(run, model), full_step(4, 48, 8, 64)
    phases = {
        "rollout": lambda: engine.generate(requests, params),
        "half of the rollout": lambda: engine.generate(requests[:16], params),
        "reference": lambda: actor.logprobs(part),
        "update": lambda: actor.update([part], 0.0),
        "values": lambda: critic.values(part),
        "critic update": lambda: critic.update([part]),
    }
    shape, lengths = footprint.shape_of(run.model, None), lengths_of(run, None, None)
    half = work.decoding(run, shape, lengths, 16, 16, joined=True)

    def expected() -> dict[str, float]:
        rates = measured(run, lengths, run.threads)
        made = plan(run, rates, count=1, per_node=1, lengths=lengths, top=1, offload=False)
        of_half = times(half, shape, rates, links(rates, 1, 1), 1, 4)[0]
        return made.offers[0].seconds | {"half of the rollout": of_half}

    assert_near(expected, lambda: {name: typical(act) for name, act in phases.items()})
