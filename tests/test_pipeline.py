"""A pipeline's loss, gradient norm and updated weights are those of one process, whatever the schedule."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel_ranks import CPU, PROBE, launch, single, two_shapes, weights_of
from pipeline_ranks import CASES, FAMILIES, case, everything
from tandem.config.layout import Layout
from tandem.config.sections import Model
from tandem.engine.probe import policy_logp
from tandem.errors import ConfigError
from tandem.learner import Actor
from tandem.model import load
from tandem.model.new import new_tokenizer
from tandem.model.parallel.fit import check_fit
from tandem.model.parallel.schedule import Action, Schedule
from tiny_models import network, randomized
from tiny_step import run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which 4 and then 2 processes have worked."""
    made = tmp_path_factory.mktemp("pipeline")
    for family, make in FAMILIES.items():
        randomized(make()).save_pretrained(made / family)
        new_tokenizer().save_pretrained(made / family)
    for world in CASES:
        launch(everything, world, made)
    return made


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in CASES for name in CASES[world]])
def test_stages_do_what_one_process_does(place, world, name):
    made = CASES[world][name]
    actor, part = single(made, place)
    logp_BT, start = actor.logprobs(part), weights_of(actor)
    figures = actor.update(two_shapes(part), 0.05)
    weights = weights_of(actor)
    actor.model.module.eval()
    probe_T = torch.tensor(policy_logp(actor.model, PROBE))
    assert max(float((weights[n] - start[n]).abs().max()) for n in weights) > 2e-3
    theirs = load_file(place / f"{world} {name}.safetensors")
    torch.testing.assert_close(theirs.pop("logp_BT"), logp_BT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.pop("probe_T"), probe_T, atol=1e-4, rtol=1e-5)
    assert theirs.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(
            theirs[key], weight, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    found = json.loads((place / f"{world} {name}.json").read_text())
    assert found.keys() == figures.keys()
    for key, value in found.items():
        # A ratio is the exponential of a difference of log-probabilities.
        close = 1e-4 if "ratio" in key else 1e-5
        assert value == pytest.approx(figures[key], rel=close, abs=1e-5), key


@pytest.mark.parametrize("layout", ["other stages", "shard"])
def test_a_checkpoint_goes_on_in_other_stages_or_none(place, layout):
    later = load_file(place / "saved later.safetensors")
    found = load_file(place / f"saved {layout}.safetensors")
    assert found.keys() == later.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, later[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["whole", "adapter"])
def test_an_export_from_stages_is_the_model(place, name):
    made = case({}, lora=name == "adapter")
    _, part = single(made, place)
    logp_BT = load_file(place / f"export {name}.safetensors")["logp_BT"]
    merged = load(Model(path=str(place / f"export {name}")), new_tokenizer(), CPU)
    kept = load(made.model(place), new_tokenizer(), CPU, resume=place / f"kept {name}")
    for model in (merged, kept):
        torch.testing.assert_close(Actor(model, run()).logprobs(part), logp_BT, atol=1e-5, rtol=1e-5)


SHAPES = [
    (ranks, chunks, parts) for ranks in (1, 2, 3, 4) for chunks in (1, 2, 3) for parts in (1, 2, 3, 8, 11)
]


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "chunks", "parts"), SHAPES)
def test_every_pass_is_made_once_and_after_what_it_needs(kind, ranks, chunks, parts):
    schedule = Schedule(kind=kind, ranks=ranks, chunks=chunks)
    for train in (False, True):
        done = set()
        for tick in schedule.ticks(parts, train=train):
            now = [(rank, action) for rank, action in enumerate(tick) if action is not None]
            for rank, action in now:
                assert action.stage % ranks == rank
                assert done.issuperset(schedule.needs(action))
            done |= {action for _, action in now}
        stages = range(ranks * chunks)
        ways = (False, True) if train else (False,)
        assert done == {Action(way, s, p) for way in ways for s in stages for p in range(parts)}


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_nobody_waits_but_at_the_ends(kind, chunks):
    """With whole rounds of micro-batches each process waits 2 (ranks - 1) of its passes, which are shorter with more
    chunks."""
    ticks = Schedule(kind=kind, ranks=4, chunks=chunks).ticks(12, train=True)
    assert len(ticks) == 2 * 12 * chunks + 2 * 3


def test_going_back_early_holds_few_micro_batches():
    def most(kind: str) -> list[int]:
        held, top = [0] * 4, [0] * 4
        for tick in Schedule(kind=kind, ranks=4, chunks=1).ticks(16, train=True):
            for rank, action in enumerate(tick):
                if action is not None:
                    held[rank] += -1 if action.backward else 1
                    top[rank] = max(top[rank], held[rank])
        return top

    assert most("1f1b") == [4, 3, 2, 1]
    assert most("gpipe") == [16, 16, 16, 16]


def test_layers_are_shared_out_in_order():
    assert Layout(pipeline=3).stage_layers(8) == [range(0, 3), range(3, 6), range(6, 8)]
    uneven = Layout(pipeline=2, pipeline_chunks=2, pipeline_layers=[3, 2, 2, 1])
    assert uneven.stage_layers(8) == [range(0, 3), range(3, 5), range(5, 7), range(7, 8)]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"pipeline": 3, "shard": 1},
            r"learner.layout.pipeline=3: 3 stages of \[1, 1, 0\] layers .* the model's 2",
        ),
        (
            {"pipeline": 2, "pipeline_layers": [2, 3]},
            r"stages of \[2, 3\] layers do not make up the model's 2 layers",
        ),
    ],
    ids=str,
)
def test_stages_that_do_not_fit_are_refused_before_anything_is_loaded(keys, said):
    with pytest.raises(ConfigError, match=said):
        check_fit(Layout.model_validate(keys), network("llama").config, keys["pipeline"], "learner.layout")


def test_a_model_of_another_make_is_refused():
    config = network("llama").config
    config.model_type = "gpt_neox"
    with pytest.raises(
        ConfigError,
        match="pipeline=2: not for models of type gpt_neox, only for llama, mistral, mixtral, qwen2",
    ):
        check_fit(Layout(pipeline=2), config, 2, "learner.layout")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pipeline": 2, "pipeline_layers": [1, 1, 1]}, "has 3 numbers; give 2"),
        ({"pipeline_chunks": 2}, "need pipeline > 1"),
        ({"expert": 2, "tensor": 2, "sequence": False}, "expert=2 with tensor=2 needs sequence=true"),
    ],
    ids=str,
)
def test_keys_that_contradict_each_other_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        Layout.model_validate(keys)
