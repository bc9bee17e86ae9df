"""Loss, gradient norm and updated weights on many processes are those of one, and no process reads another's part."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from offload_ranks import OFFLOADED, offloaded
from parallel_ranks import (
    CASES,
    CPU,
    MORE,
    PROBE,
    RESUMED,
    SAVED,
    Case,
    everything,
    launch,
    more,
    saved_by_one,
    single,
    two_shapes,
    weights_of,
)
from tandem.checkpoint.sharded import export_sharded, read_model, read_sharded, read_whole
from tandem.config.layout import Layout
from tandem.config.sections import Learner, Model
from tandem.engine.probe import policy_logp
from tandem.errors import ConfigError
from tandem.learner import Actor, micro_batches, silenced
from tandem.model import load
from tandem.model.new import new_tokenizer
from tandem.model.parallel.fit import check_fit
from tandem.model.parallel.grid import Axis
from tandem.model.parallel.share import shares
from tandem.model.parallel.tensor import split
from tandem.train.snapshot import write_pupil
from tandem.types import Experience
from tiny_models import network
from tiny_step import batch, run

FAMILIES = ("qwen2_grouped", "qwen2_untied", "qwen3", "llama", "mistral")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which 4, then 2, then 4 processes have worked. Of one model it has many files, of another bfloat16,
    of one pickles alone."""
    made = tmp_path_factory.mktemp("parallel")
    for family in FAMILIES:
        model = network(family).bfloat16() if family == "llama" else network(family)
        model.save_pretrained(made / family, max_shard_size="20KB" if family == "qwen3" else "1GB")
        new_tokenizer().save_pretrained(made / family)
    assert len(list((made / "qwen3").glob("*.safetensors"))) > 2
    (made / "bin").mkdir()
    network("llama").config.save_pretrained(made / "bin")
    torch.save(network("llama").state_dict(), made / "bin" / "pytorch_model.bin")
    for name, case in SAVED.items():
        saved_by_one(case, made, made / f"one {name}")
    for world in CASES:
        launch(everything, world, made)
    launch(more, 4, made)
    return made


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in CASES for name in CASES[world]])
def test_many_processes_do_what_one_does(place, world, name):
    case = CASES[world][name]
    actor, part = single(case, place)
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
        torch.testing.assert_close(theirs[key], weight, atol=1e-5, rtol=1e-5, msg=key)
    found = json.loads((place / f"{world} {name}.json").read_text())
    assert found.keys() == figures.keys()
    for key, value in found.items():
        # A ratio is the exponential of a difference of log-probabilities.
        close = 1e-4 if "ratio" in key else 1e-5
        assert value == pytest.approx(figures[key], rel=close, abs=1e-5), key


@pytest.mark.parametrize("layout", RESUMED)
@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_goes_on_in_another_layout(place, name, layout):
    later = load_file(place / f"saved {name} later.safetensors")
    then = load_file(place / f"saved {name} then.safetensors")
    close = 3e-2 if SAVED[name].dtype == "bf16" else 1e-5
    found = load_file(place / f"saved {name} {layout}.safetensors")
    assert found.keys() == later.keys() == then.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, later[key], atol=close, rtol=close, msg=key)
    assert any(not torch.equal(then[key], later[key]) for key in then)


@pytest.mark.parametrize("layout", MORE)
def test_a_checkpoint_goes_on_with_more_processes(place, layout):
    then, later = (load_file(place / f"saved fewer {when}.safetensors") for when in ("then", "later"))
    assert any(not torch.equal(then[key], later[key]) for key in then)
    found = load_file(place / f"saved fewer {layout}.safetensors")
    assert found.keys() == later.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, later[key], atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("layout", RESUMED)
@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_one_process_goes_on_with_many(place, name, layout):
    later = load_file(place / f"one {name} later.safetensors")
    close = 3e-2 if SAVED[name].dtype == "bf16" else 1e-5
    theirs = load_file(place / f"from one {name} {layout}.safetensors")
    assert theirs.keys() == later.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(weight, later[key], atol=close, rtol=close, msg=key)


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_many_processes_goes_on_with_one(place, name):
    case, saved = SAVED[name], place / f"saved {name}"
    actor, part = single(case, place)
    read_sharded(saved, actor.model, actor.optimizer)
    assert actor.optimizer.updates == 2
    masters = load_file(f"{saved} masters.safetensors")
    assert actor.optimizer.master_tensors.keys() == masters.keys()
    for key, values in masters.items():
        assert torch.equal(actor.optimizer.master_tensors[key], values), key
    then, later = (load_file(f"{saved} {when}.safetensors") for when in ("then", "later"))
    assert weights_of(actor).keys() == then.keys() == later.keys()
    for key, weight in weights_of(actor).items():
        torch.testing.assert_close(weight, then[key], atol=1e-7, rtol=1e-6, msg=key)
    actor.update([part], 0.05)
    close = 3e-2 if case.dtype == "bf16" else 1e-5
    for key, weight in weights_of(actor).items():
        torch.testing.assert_close(weight, later[key], atol=close, rtol=close, msg=key)


def test_masters_that_many_processes_did_not_have_are_made_from_the_weights(place):
    saved = place / "saved plain"
    actor, part = offloading(SAVED["plain"], place)
    read_sharded(saved, actor.model, actor.optimizer)
    assert_masters_are_weights(actor)
    actor.update([part], 0.05)
    later = load_file(f"{saved} later.safetensors")
    for key, weight in weights_of(actor).items():
        torch.testing.assert_close(weight, later[key], atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("updates", [0, 2])
def test_masters_that_one_process_did_not_have_are_made_from_the_weights(tmp_path, updates):
    """Read by slices, as each of many processes reads what one has written."""
    network("qwen2_grouped").save_pretrained(tmp_path / "qwen2_grouped")
    new_tokenizer().save_pretrained(tmp_path / "qwen2_grouped")
    case = Case(layout={})
    actor, part = single(case, tmp_path)
    actor.update([part] * updates, 0.05)
    write_pupil(actor, tmp_path)
    other, _ = offloading(case, tmp_path)
    read_model(tmp_path / "model", other.model)
    read_whole(tmp_path / "optimizer.safetensors", other.model, other.optimizer)
    assert_masters_are_weights(other)
    for one in actor, other:
        one.update([part], 0.05)
    for key, weight in weights_of(actor).items():
        assert torch.equal(weights_of(other)[key], weight), key


def offloading(case: Case, folder: Path) -> tuple[Actor, Experience]:
    """One process with masters of its own, which have moved away from those of the others."""
    actor, part = single(case, folder)
    settings = actor.run.learner.optimizer.model_copy(update={"offload": True})
    learner = actor.run.learner.model_copy(update={"optimizer": settings})
    actor = Actor(actor.model, actor.run.model_copy(update={"learner": learner}))
    actor.update([part], 0.05)
    return actor, part


def assert_masters_are_weights(actor: Actor) -> None:
    assert actor.optimizer.master_tensors.keys() == weights_of(actor).keys()
    for key, values in actor.optimizer.master_tensors.items():
        assert torch.equal(values, weights_of(actor)[key]), key


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_becomes_a_hugging_face_folder_without_its_processes(place, name):
    case = SAVED[name]
    folder = export_sharded(place / f"saved {name}", place / f"exported {name}")
    assert not any(path.suffix in (".pt", ".distcp", ".pkl") for path in (place / f"saved {name}").rglob("*"))
    then = load_file(place / f"saved {name} then.safetensors")
    if case.lora:
        found = weights_of(Actor(load(case.model(place), new_tokenizer(), CPU, resume=folder), run()))
    else:
        found = dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").named_parameters())
    assert found.keys() == then.keys()
    for key, weight in then.items():
        torch.testing.assert_close(found[key].detach(), weight, atol=1e-7, rtol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["whole", "adapter"])
def test_an_export_while_training_is_the_model(place, name):
    case = Case(layout={}, lora=name == "adapter")
    _, part = single(case, place)
    logp_BT = load_file(place / f"export {name}.safetensors")["logp_BT"]
    merged = load(Model(path=str(place / f"export {name}")), new_tokenizer(), CPU)
    kept = load(case.model(place), new_tokenizer(), CPU, resume=place / f"kept {name}")
    for model in (merged, kept):
        torch.testing.assert_close(Actor(model, run()).logprobs(part), logp_BT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 16])
def test_sequences_are_shared_out_evenly_and_once(ranks):
    raw = batch(seed=3, groups=6, answers=4)
    found = shares(raw.length_B, raw.prompt_length_B, raw.group_B, ranks)
    assert sorted(torch.cat(found).tolist()) == list(range(raw.size))
    loads = [int(raw.length_B[rows].sum()) for rows in found]
    fair, longest = sum(loads) / ranks, int(raw.length_B.max())
    assert max(loads) <= 1.35 * fair + longest


def skewed(seed: int, groups: int = 16, answers: int = 8) -> tuple[torch.Tensor, ...]:
    """Lengths of rows and of their prompts, and their groups; later groups have much longer answers."""
    generator = torch.Generator().manual_seed(seed)
    group_B = torch.arange(groups).repeat_interleave(answers)
    prompt_B = torch.randint(50, 750, (groups,), generator=generator)[group_B]
    noise_B = torch.randn(len(group_B), generator=generator)
    return prompt_B + (100 * torch.exp(2 * group_B / groups + 0.7 * noise_B)).long() + 1, prompt_B, group_B


def most_tokens(parts: Iterable[torch.Tensor], rows: tuple[torch.Tensor, ...]) -> int:
    """Of the process with most: its answers, and each of its prompts once."""
    length_B, prompt_B, group_B = rows
    prompts = dict(zip(group_B.tolist(), prompt_B.tolist()))
    return max(
        int((length_B - prompt_B)[part].sum()) + sum(prompts[g] for g in group_B[part].unique().tolist())
        for part in parts
    )


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_shares_are_nearly_equal_where_simple_cuts_are_not(seed, ranks):
    rows = skewed(seed)
    every = torch.arange(len(rows[0]))
    fair, bound = most_tokens([every], rows) / ranks, 1 + 0.02 * ranks
    assert most_tokens(shares(*rows, ranks), rows) <= bound * fair
    for simple in (every.tensor_split(ranks), [every[rank::ranks] for rank in range(ranks)]):
        assert most_tokens(simple, rows) > bound * fair


@pytest.mark.parametrize(("groups", "ranks"), [(4, 3), (5, 4), (12, 8)])
def test_a_few_groups_more_than_processes_are_divided(groups, ranks):
    """Or most processes would wait for those that have two."""
    group_B = torch.arange(groups).repeat_interleave(8)
    rows = torch.full_like(group_B, 110), torch.full_like(group_B, 10), group_B
    fair = most_tokens([torch.arange(len(group_B))], rows) / ranks
    found = shares(*rows, ranks)
    assert sorted(torch.cat(found).tolist()) == list(range(len(group_B)))
    assert most_tokens(found, rows) <= 1.15 * fair


def test_groups_stay_together_where_that_is_fair():
    length_B, prompt_B = torch.full((12,), 20), torch.full((12,), 10)
    group_B = torch.arange(4).repeat_interleave(3)
    for rows in shares(length_B, prompt_B, group_B, 4):
        assert len(group_B[rows].unique()) == 1 and len(rows) == 3
    # One large group must not keep three of four processes waiting.
    sizes = [len(rows) for rows in shares(length_B, prompt_B, torch.zeros(12, dtype=torch.long), 4)]
    assert sizes == [3, 3, 3, 3]


def test_a_silenced_part_has_no_loss_and_no_gradient(place):
    actor, part = single(Case(layout={}), place)
    quiet = silenced(part)
    assert quiet.size == 1 and not quiet.mask_BT.any() and not quiet.weight_BT.any()
    sums = actor._accumulate(quiet, 0.05)
    assert sums["loss/total"] == 0 and sums["tokens"] == 0
    assert all(not weight.grad.any() for weight in actor.model.trainable().values())


def test_one_process_cuts_as_before():
    actor_rows = micro_batches(torch.tensor([5, 9, 9, 3]), Learner(tokens_per_forward=18))
    assert [rows.tolist() for rows in actor_rows] == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("keys", "world", "expected"),
    [
        ({}, 8, (1, 8, 1, 1)),
        ({"tensor": 2}, 8, (1, 4, 1, 2)),
        ({"replicate": 2, "context": 2}, 8, (2, 2, 2, 1)),
        ({"shard": 1}, 1, (1, 1, 1, 1)),
    ],
    ids=str,
)
def test_what_the_axes_leave_over_is_sharded(keys, world, expected):
    assert Layout.model_validate(keys).sizes(world) == expected


@pytest.mark.parametrize(
    ("keys", "world", "said"),
    [
        ({"shard": 3}, 4, "replicate=1 x shard=3 x context=1 x tensor=1 does not give 4 processes"),
        ({"tensor": 8}, 4, "shard=rest x context=1 x tensor=8 does not give 4 processes"),
        ({"tensor": 4}, 4, "learner.layout.tensor=4 does not divide the model's num_key_value_heads=2"),
        ({"context": 3}, 3, r"context=3 does not divide the model's 8 attention heads; .* \[1, 2, 4, 8\]"),
        ({"tensor": 2, "context": 8}, 16, "tensor=2 x context=8 does not divide"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_refused_before_anything_is_loaded(keys, world, said):
    config = network("qwen2_grouped").config
    with pytest.raises(ConfigError, match=said):
        check_fit(Layout.model_validate(keys), config, world, "learner.layout")


def test_a_model_without_a_plan_can_be_sharded_but_not_split():
    config = GPTNeoXConfig(num_hidden_layers=1, num_key_value_heads=64)
    config.base_model_tp_plan = None
    check_fit(Layout(), config, 2, "learner.layout")
    with pytest.raises(ConfigError, match="GPTNeoXConfig carries no plan"):
        check_fit(Layout(tensor=2), config, 2, "learner.layout")


def test_a_split_leaves_each_process_its_part_of_every_weight():
    whole = network("qwen2_grouped").state_dict()
    halves, parts = [], None
    for rank in range(2):
        half = network("qwen2_grouped")
        parts = split(half, half, Axis(size=2, rank=rank, group=None), sequence=True, where="learner.layout")
        assert half.lm_head.weight is half.model.embed_tokens.weight
        halves.append(dict(half.named_parameters()))
    assert {name.split(".")[-2] for name, part in parts.items() if part.dim == 1} == {"o_proj", "down_proj"}
    for name, part in parts.items():
        both = [half[name] for half in halves]
        joined = both[0] if part.dim is None else torch.cat(both, part.dim)
        assert torch.equal(joined, whole[name]), name
        assert part.summed == (part.dim is None), name


def test_an_adapter_on_the_embedding_is_not_split():
    adapted = get_peft_model(network("llama"), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="cannot be split; leave them out"):
        split(adapted, adapted.get_base_model(), Axis(size=2, rank=0, group=None), True, "learner.layout")


def test_offloaded_parameters_bring_their_gradients_along():
    with pytest.raises(ValueError, match="leave offload_gradients false"):
        Layout(offload_parameters=True, offload_gradients=True)


@pytest.fixture(scope="module")
def accelerated(place: Path) -> Path:
    """The folder in which one process has worked on an accelerator, with each switch in turn."""
    launch(offloaded, 1, place)
    return place


@pytest.mark.gpu
@pytest.mark.parametrize("name", OFFLOADED)
def test_what_waits_in_host_memory_trains_the_same(accelerated, name):
    """Where it waits is asserted by the process itself."""
    actor, part = single(OFFLOADED[name][0], accelerated)
    figures = actor.update([part, part], 0.05)
    theirs, weights = load_file(accelerated / f"offloaded {name}.safetensors"), weights_of(actor)
    assert theirs.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(theirs[key], weight, atol=1e-4, rtol=1e-4, msg=key)
    found = json.loads((accelerated / f"offloaded {name}.json").read_text())
    assert found.keys() == figures.keys()
    assert found["grad_norm"] == pytest.approx(figures["grad_norm"], rel=1e-3)
