"""A mixture's loss, gradient norm and updated weights are those of one process, wherever its experts are."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from expert_ranks import CASES, EVERYWHERE, EXPORTED, FAMILIES, FROM_ONE, HEADS, SAVED, case, everything
from parallel_ranks import CPU, PROBE, launch, saved_by_one, single, two_shapes, weights_of
from tandem.checkpoint.sharded import export_sharded, read_sharded
from tandem.config.layout import Layout
from tandem.config.sections import Model
from tandem.engine.probe import policy_logp
from tandem.engine.weights import named_tensors
from tandem.errors import ConfigError, RunError
from tandem.learner import Actor
from tandem.model import LanguageModel, load
from tandem.model.mixture import apart
from tandem.model.new import new_tokenizer
from tandem.model.parallel.fit import check_fit
from tandem.model.value import load_value, value_like
from tiny_models import SHAPE, network, randomized


def unknown() -> PreTrainedModel:
    """A mixture that has its experts in one tensor too, and is none of those that Tandem understands."""
    return OlmoeForCausalLM(OlmoeConfig(**SHAPE, **HEADS, num_experts=4, num_experts_per_tok=2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which 4 and then 2 processes have worked."""
    made = tmp_path_factory.mktemp("expert")
    for family, make in FAMILIES.items():
        randomized(make()).save_pretrained(made / family)
        new_tokenizer().save_pretrained(made / family)
    saved_by_one(case({}, **EVERYWHERE), made, made / "one adapter")
    for world in CASES:
        launch(everything, world, made)
    return made


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in CASES for name in CASES[world]])
def test_experts_elsewhere_do_what_experts_here_do(place, world, name):
    made = CASES[world][name]
    actor, part = single(made, place)
    logp_BT, start = actor.logprobs(part), weights_of(actor)
    figures = actor.update(two_shapes(part), 0.05)
    weights = weights_of(actor)
    actor.model.module.eval()
    probe_T = torch.tensor(policy_logp(actor.model, PROBE))
    moved = {n: float((weights[n] - start[n]).abs().max()) for n in weights}
    assert max(moved.values()) > 2e-3
    on_experts = not made.lora or "down_proj" in made.targets or made.targets == "all-linear"
    assert not on_experts or max(size for n, size in moved.items() if ".experts." in n) > 2e-3
    theirs = load_file(place / f"{world} {name}.safetensors")
    torch.testing.assert_close(theirs.pop("logp_BT"), logp_BT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.pop("probe_T"), probe_T, atol=1e-4, rtol=1e-5)
    assert theirs.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(
            theirs[key], weight, atol=1e-5, rtol=1e-5, msg=lambda said, key=key: f"{key}: {said}"
        )
    found = json.loads((place / f"{world} {name}.json").read_text())
    assert found.keys() == figures.keys()
    for key, value in found.items():
        # A ratio is the exponential of a difference of log-probabilities.
        close = 1e-4 if "ratio" in key else 1e-5
        assert value == pytest.approx(figures[key], rel=close, abs=1e-5), key


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("layout", ["expert", "shard"])
def test_a_checkpoint_goes_on_with_the_experts_elsewhere(place, layout, saved):
    later = load_file(place / f"{saved} later.safetensors")
    found = load_file(place / f"{saved} {layout}.safetensors")
    assert found.keys() == later.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, later[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", FROM_ONE)
def test_adapters_on_experts_of_one_process_go_on_with_many(place, layout):
    later = load_file(place / "one adapter later.safetensors")
    found = load_file(place / f"from one adapter {layout}.safetensors")
    assert found.keys() == later.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, later[key], atol=1e-5, rtol=1e-5)


def test_adapters_on_experts_of_many_processes_go_on_with_one(place):
    actor, part = single(case({}, **EVERYWHERE), place)
    read_sharded(place / "saved adapter", actor.model, actor.optimizer)
    then, later = (load_file(place / f"saved adapter {when}.safetensors") for when in ("then", "later"))
    for key, weight in weights_of(actor).items():
        torch.testing.assert_close(weight, then[key], atol=1e-7, rtol=1e-6)
    actor.update([part], 0.05)
    for key, weight in weights_of(actor).items():
        torch.testing.assert_close(weight, later[key], atol=1e-5, rtol=1e-5)


def test_adapters_on_experts_are_saved_as_one_process_has_them(place):
    made = CASES[2]["adapted experts"]
    actor, part = single(made, place)
    said_BT = load_file(place / "kept adapter.safetensors")["logp_BT"]
    assert not torch.allclose(actor.logprobs(part), said_BT, atol=1e-3)
    exported = export_sharded(place / "saved adapter", place / "from saved adapter")
    both = [load_file(folder / "adapter_model.safetensors") for folder in (place / "kept adapter", exported)]
    assert both[0].keys() == both[1].keys()
    for key in both[0]:
        torch.testing.assert_close(both[0][key], both[1][key], atol=1e-5, rtol=1e-5)
    model = made.model(place)
    again = load(model, new_tokenizer(), CPU, resume=place / "kept adapter")
    merged = load(
        model.model_copy(update={"path": str(place / "merged adapter"), "lora": None}), new_tokenizer(), CPU
    )
    for other in (again, merged):
        found_BT = Actor(other, made.run(place)).logprobs(part)
        torch.testing.assert_close(found_BT, said_BT, atol=1e-5, rtol=1e-5)


EXPERT = {
    "qwen3_moe": "model.layers.1.mlp.experts.7.down_proj.weight",
    "qwen2_moe": "model.layers.1.mlp.experts.7.down_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.7.w2.weight",
}
"""A weight of an expert in a folder."""


@pytest.mark.parametrize(("family", "saved"), EXPORTED.items())
def test_folders_have_the_experts_apart(place, tmp_path, family, saved):
    original = load_file(place / family / "model.safetensors")
    assert EXPERT[family] in original
    many, one = place / f"export {family}", tmp_path / "one"
    single(case({}, family), place)[0].model.save_merged(one)
    for folder in (many, one):
        exported = load_file(folder / "model.safetensors")
        assert exported.keys() == original.keys()
        assert all(torch.equal(exported[key], original[key]) for key in original)
    theirs = AutoModelForCausalLM.from_pretrained(many).state_dict()
    given = AutoModelForCausalLM.from_pretrained(place / family).state_dict()
    assert all(torch.equal(theirs[key], given[key]) for key in given)
    folder = export_sharded(place / saved, place / f"from {saved}")
    then = load_file(place / f"{saved} then.safetensors")
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == original.keys()
    for key in saved:
        torch.testing.assert_close(saved[key], then[key], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("family", EXPERT)
def test_an_engine_is_sent_the_experts_apart(tmp_path, family):
    model = LanguageModel(randomized(FAMILIES[family]()), new_tokenizer(), family)
    own = named_tensors(model)
    sent = dict(model.weights())
    model.save(tmp_path)
    assert own.keys() == sent.keys() == load_file(tmp_path / "model.safetensors").keys()
    own[EXPERT[family]].fill_(7.0)
    assert (sent[EXPERT[family]] == 7.0).all()


@pytest.mark.parametrize(
    ("family", "block", "gate", "up"),
    [("qwen3_moe", "mlp", "gate_proj", "up_proj"), ("mixtral", "block_sparse_moe", "w1", "w3")],
)
def test_experts_are_named_one_by_one(family, block, gate, up):
    fused = torch.arange(24.0).view(2, 4, 3)
    found = dict(apart(family, "model.layers.3.mlp.experts.gate_up_proj", fused, first=6))
    stem = f"model.layers.3.{block}"
    assert list(found) == [f"{stem}.experts.{e}.{p}.weight" for e in (6, 7) for p in (gate, up)]
    assert torch.equal(found[f"{stem}.experts.7.{up}.weight"], fused[1, 2:])
    assert list(apart(family, "model.norm.weight", fused)) == [("model.norm.weight", fused)]
    assert list(apart(family, "model.layers.3.mlp.gate.weight", fused)) == [(f"{stem}.gate.weight", fused)]


@pytest.mark.parametrize(
    ("keys", "family", "said"),
    [
        ({"expert": 2}, "qwen2_tied", r"learner.layout.expert=2: the model \(qwen2\) has no experts that"),
        ({"expert": 3, "shard": 3}, "qwen3_moe", "expert=3: the model .* has 8 experts"),
        ({"expert": 3, "shard": 3}, "mixtral", r"expert=3: the model \(mixtral\) has 8 experts"),
        (
            {"expert": 2},
            "olmoe",
            r"expert=2: the model \(olmoe\) has no experts that .* those of mixtral, qwen2",
        ),
        ({"expert": 2, "shard": 3}, "qwen3_moe", "expert=2 does not divide shard=3 x context=1"),
    ],
    ids=str,
)
def test_experts_that_cannot_be_split_are_refused_before_anything_is_loaded(keys, family, said):
    made = unknown() if family == "olmoe" else FAMILIES[family]() if family in FAMILIES else network(family)
    with pytest.raises(ConfigError, match=said):
        check_fit(Layout.model_validate(keys), made.config, keys.get("shard", 2), "learner.layout")


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
        ("qwen3_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
        ("qwen3_moe", {"target_modules": "all-linear"}),
        ("mixtral", {"target_modules": ["w1", "w3", "w2"]}),
        ("mixtral", {"target_modules": "all-linear"}),
    ],
    ids=str,
)
def test_whole_weights_of_one_process_have_adapters_on_experts_merged(tmp_path, family, keys):
    made = get_peft_model(randomized(FAMILIES[family]()), LoraConfig(r=2, lora_alpha=6, **keys))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if ".lora_" in name:
                weight.normal_(0.0, 0.3)
    model = LanguageModel(made, new_tokenizer(), "mixture")
    plain = dict(LanguageModel(FAMILIES[family](), new_tokenizer(), "plain").weights())
    found = dict(model.weights())
    assert found.keys() == plain.keys()
    before = {name: made.get_parameter(name).detach().clone() for name, _ in made.named_parameters()}
    model.save_merged(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    made.merge_adapter()
    merged = {
        view: part
        for name, weight in made.named_parameters()
        if ".lora_" not in name
        for view, part in apart(family, model.hf_name(name), weight.detach())
    }
    assert found.keys() == merged.keys() == saved.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(saved[name], weight, atol=1e-6, rtol=1e-6)
    changed = sum(not torch.equal(before[n], w) for n, w in made.named_parameters() if ".experts." in n)
    assert changed == 2 * (1 if "target_parameters" in keys else 2)


def test_noise_of_a_router_is_off(tmp_path):
    """Else an update would see other log-probabilities than its answers were sampled with."""
    network = randomized(FAMILIES["mixtral"]())
    network.config.router_jitter_noise = 0.5
    network.save_pretrained(tmp_path)
    new_tokenizer().save_pretrained(tmp_path)
    model = load(Model(path=str(tmp_path)), new_tokenizer(), CPU)
    said_T = torch.tensor(policy_logp(model, PROBE))
    model.module.train()
    assert torch.equal(torch.tensor(policy_logp(model, PROBE)), said_T)
    for critic in (value_like(model), load_value(str(tmp_path), "fp32", new_tokenizer(), CPU)):
        noises = [m.jitter_noise for m in critic.network.modules() if hasattr(m, "jitter_noise")]
        assert noises and not any(noises)


@pytest.mark.parametrize(
    ("make", "keys", "said"),
    [
        (unknown, {"target_parameters": ["mlp.experts.down_proj"]}, "experts"),
        (lambda: network("llama"), {"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
        # One weight with the embedding.
        (lambda: network("qwen2_tied"), {"target_modules": ["lm_head"]}, "lm_head"),
    ],
    ids=["experts of others", "embedding", "tied head"],
)
def test_an_adapter_that_cannot_be_merged_is_refused_by_its_name(make, keys, said):
    model = LanguageModel(get_peft_model(make(), LoraConfig(r=2, **keys)), new_tokenizer(), "adapted")
    with pytest.raises(RunError, match=rf"model.lora.targets: .*{said}"):
        list(model.weights())
