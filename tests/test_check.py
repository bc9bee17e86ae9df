"""The check before a run: it finds what would go wrong, finds nothing where nothing is, and estimates truly."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config
from typer.testing import CliRunner

from small_recipe import recipe
from tandem.cli import app
from tandem.config import load
from tandem.config.sections import Lora, Model
from tandem.engine import EmbeddedEngine, Request, SamplingParams, embedded
from tandem.engine.ipc import ALIGNED, IpcRoad
from tandem.engine.weights import ModelWeights
from tandem.errors import ConfigError
from tandem.learner import Actor
from tandem.model import load as load_model
from tandem.model import token_logprobs, tokenizer_of
from tandem.model.load import DTYPES
from tandem.model.new import new_tokenizer
from tandem.train import footprint
from tandem.train.check import LOOKS, check
from tandem.train.folder_bytes import folder_bytes
from tandem.train.layouts import check_layouts
from tandem.train.plan.axes import Axes
from tandem.train.run import Launch, train
from tiny_models import classifier, language_model

SLOW = """import time


def late(answer: str) -> float:
    time.sleep(5)
    return 1.0


def moody(answer: str) -> float:
    if not answer:
        raise KeyError("empty")
    return float(len(answer))


def flat(answer: str) -> float:
    return 0.5
"""


def findings(path: Path, *overrides: str) -> dict[str, list[tuple[str, str]]]:
    """Status and text of every line, by what was looked at."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in check(load(path, overrides)):
        assert line.seconds >= 0
        found.setdefault(line.name, []).append((line.status, line.text))
    return found


def only(found: dict[str, list[tuple[str, str]]], status: str) -> dict[str, str]:
    return {name: text for name, lines in found.items() for s, text in lines if s == status}


def own(tmp_path: Path, name: str) -> str:
    (tmp_path / "rewards.py").write_text(SLOW)
    return f"reward.functions=[{{name: '{tmp_path / 'rewards.py'}:{name}'}}]"


def test_a_sound_run_passes_every_look_and_nothing_is_left_behind(tmp_path):
    path = recipe(tmp_path, reward={"functions": [{"name": "answer_number"}]})
    before = sorted(tmp_path.rglob("*"))
    found = findings(path)
    assert list(found) == list(LOOKS)
    assert not only(found, "problem") and not only(found, "warning")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_lists_all_problems_at_once_and_exits_with_one(tmp_path):
    path = recipe(tmp_path, reward={"functions": [{"name": "countdown"}]})
    (tmp_path / "run").write_text("in the way")
    done = CliRunner().invoke(
        app,
        ["check", str(path), "sampling.max_answer_tokens=500", "data.eval=missing.jsonl", "device=abacus"],
    )
    assert done.exit_code == 1
    lines = [line for line in done.output.splitlines() if line.startswith("problem")]
    assert {line.split()[3] for line in lines} >= {"device", "data.eval", "reward", "lengths", "save"}
    assert f"{len(lines)} problems" in done.output
    assert CliRunner().invoke(app, ["check", str(path), "steps=no"]).exit_code == 1
    assert CliRunner().invoke(app, ["check", str(recipe(tmp_path)), f"run_dir={tmp_path}/new"]).exit_code == 0


def test_what_needs_a_failed_look_is_said_to_be_unchecked(tmp_path):
    found = findings(recipe(tmp_path), "data.columns.question=quest")
    assert "no column 'quest'" in only(found, "problem")["data.train"]
    assert only(found, "warning")["template"] == "not checked: data.train has a problem"
    assert found["memory"][0][0] == found["save"][0][0] == "ok"


def test_questions_that_are_also_trained_on_are_counted(tmp_path):
    found = findings(recipe(tmp_path), "data.eval=tandem:addition", "eval.questions=30")
    assert only(found, "warning")["data.eval"] == "30 of these questions are also in data.train"


def test_a_template_for_another_model_is_a_problem(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text('format_user: "<|user|>{content}<|end|>"\n')
    found = findings(recipe(tmp_path), f"data.template={other}")
    assert "data.template is for another model" in only(found, "problem")["template"]


def test_a_reward_is_shown_what_it_reads_and_gives(tmp_path):
    text = findings(recipe(tmp_path), "reward.functions=[{name: answer_number}]")["reward"][0][1]
    assert "<answer> 1" in text and "the truth -1" in text and "worked 1" in text and "nonsense -1" in text


@pytest.mark.parametrize(
    ("function", "status", "said"),
    [
        ("flat", "warning", "the reward is 0.5 for every answer"),
        ("moody", "warning", "4 of 32 answers failed, the first (empty): error, "),
        ("gone", "problem", "has no 'gone'"),
    ],
)
def test_rewards_that_teach_nothing_or_fail_are_found(tmp_path, function, status, said):
    found = findings(recipe(tmp_path), own(tmp_path, function))
    assert said in only(found, status)["reward"]


def test_a_reward_that_is_too_late_is_a_problem_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr("tandem.train.trial.SECONDS", 0.5)
    found = findings(recipe(tmp_path), own(tmp_path, "late"), "reward.timeout_s=0.2")
    assert "8 of 8 answers failed, the first (the truth): timeout" in only(found, "problem")["reward"]


def test_a_truth_that_no_form_is_rewarded_for_is_suspicious(tmp_path):
    """The right answer is there, but under the wrong column."""
    rows = [{"question": f"{a}+1", "id": str(a + 900), "answer": str(a + 1)} for a in range(10, 30)]
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    reward = tmp_path / "rewards.py"
    reward.write_text(
        "def sums(answer: str, row: dict) -> float:\n    return float(row['answer'] in answer) - 0.1 * (not answer)\n"
    )
    changes = [f"data.train={data}", "data.eval=null", f"reward.functions=[{{name: '{reward}:sums'}}]"]
    right = findings(recipe(tmp_path), *changes)
    wrong = findings(recipe(tmp_path), *changes, "data.columns.truth=id")
    assert "reward" not in only(right, "warning")
    assert "no form of the truth scores above" in only(wrong, "warning")["reward"]


def test_lengths_are_those_of_the_longest_question(tmp_path):
    assert findings(recipe(tmp_path), "sampling.max_answer_tokens=104")["lengths"][0][0] == "ok"
    found = findings(recipe(tmp_path), "sampling.max_answer_tokens=105")
    assert (
        "prompt 24 + answer 105 = 129 tokens of the model's 128 positions"
        in only(found, "problem")["lengths"]
    )
    short = findings(recipe(tmp_path), "sampling.max_answer_tokens=1")
    assert "truths alone are longer" in only(short, "warning")["lengths"]


def test_a_model_without_its_weights_that_would_not_fit_is_found_from_its_config(tmp_path):
    folder = tmp_path / "large"
    config = Qwen2Config(
        vocab_size=264,
        hidden_size=16384,
        intermediate_size=65536,
        num_hidden_layers=48,
        num_attention_heads=128,
        num_key_value_heads=8,
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    found = findings(recipe(tmp_path, model={"new": None, "path": str(folder)}))
    problems = only(found, "problem")
    assert "lacks model.safetensors" in problems["model"]
    assert "too much" in problems["memory"] and "too much" in problems["disk"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").touch()
    found = findings(recipe(tmp_path, model={"new": None, "path": str(folder)}))
    assert "lacks model-2.safetensors;" in only(found, "problem")["model"]


MANY = ["placement.kind=apart", "placement.learners=4", "placement.engines=2"]


@pytest.mark.parametrize("placement", ["inline", "apart"])
def test_a_classifier_is_no_policy(tmp_path, placement):
    path = recipe(
        tmp_path,
        model={"new": None, "path": str(classifier(tmp_path / "judge"))},
        placement={"kind": placement},
    )
    with pytest.raises(
        ConfigError, match=r"^model\.path=\S+judge is a Qwen2ForSequenceClassification, which"
    ) as told:
        train(load(path), Launch(recipe=str(path)))
    assert str(told.value) in only(findings(path), "problem")["model"]


def test_layouts_are_held_against_the_model_and_nothing_is_loaded(tmp_path):
    """Of a folder whose weights are an empty file."""
    language_model("qwen2_grouped").save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    path = recipe(
        tmp_path, model={"new": None, "path": str(tmp_path / "model")}, algorithm={"kl": {"coef": 0.1}}
    )
    found = findings(path, *MANY, "learner.layout.context=2", "reference.layout.shard=4")
    assert found["layout"][0][0] == found["memory"][0][0] == "ok"
    assert "on 4 learners: shard=2 context=2; reference.layout: shard=4" in found["layout"][0][1]
    assert "no weight loaded" in found["layout"][0][1]
    assert "4 learners of" in found["memory"][0][1] and "2 engines of" in found["memory"][0][1]
    wrong = findings(path, *MANY, "learner.layout.tensor=4")
    assert "learner.layout.tensor=4 does not divide" in only(wrong, "problem")["layout"]
    assert findings(recipe(tmp_path))["layout"][0][1].startswith("one learner")


def test_a_layout_for_another_number_of_learners_is_a_problem(tmp_path):
    path = recipe(tmp_path, algorithm={"kl": {"coef": 0.1}})
    for role in ("learner", "reference"):
        found = findings(path, *MANY, f"{role}.layout.shard=3")
        problem = only(found, "problem")["layout"]
        assert f"{role}.layout: " in problem and "does not give 4 processes" in problem
        assert only(found, "warning")["memory"] == "not checked: layout has a problem"


ALL_ROLES = {"algorithm": {"preset": "ppo", "kl": {"coef": 0.1, "place": "loss", "estimator": "k3"}}}
AXES = ("replicate", "shard", "tensor", "context", "expert", "pipeline")


@pytest.mark.parametrize("role", ["learner", "reference", "critic"])
@pytest.mark.parametrize("placement", ["inline", "colocated"])
def test_one_learner_has_no_layout(tmp_path, role, placement):
    """What is asked of it would not be done."""
    path, given = recipe(tmp_path, **ALL_ROLES), [f"placement.kind={placement}"]
    for key in (*(f"{axis}=2" for axis in AXES), "offload_parameters=true", "offload_gradients=true"):
        with pytest.raises(ConfigError) as refused:
            check_layouts(load(path, [*given, f"{role}.layout.{key}"]), None)
        said = str(refused.value)
        assert said.startswith(f"{role}.layout.{key} needs placement.learners above 1, ")
        works = "offload" in key and role != "reference"
        assert (f"use {role}.optimizer.offload=true, which works with one" in said) == works
    found = findings(path, *given, f"{role}.layout.offload_parameters=true")
    assert only(found, "problem")["layout"].startswith(f"{role}.layout.offload_parameters=true ")
    assert only(found, "warning")["memory"] == "not checked: layout has a problem"


def test_one_learner_passes_with_a_layout_of_one_and_without_what_it_does_not_hold(tmp_path):
    path = recipe(tmp_path, **ALL_ROLES)
    ones = [f"{role}.layout.{axis}=1" for role in ("learner", "reference", "critic") for axis in AXES]
    check_layouts(load(path, ones), None)
    without = ["algorithm.kl.coef=0", "reference.layout.tensor=2", "critic.layout.tensor=2"]
    check_layouts(load(recipe(tmp_path), without), None)
    path = recipe(tmp_path, **ALL_ROLES)
    judged = ["reward.model={path: nowhere, layout: {context: 2}}"]
    with pytest.raises(
        ConfigError, match=r"^reward\.model\.layout\.context=2 needs placement\.learners above 1, "
    ):
        check_layouts(load(path, judged), None)


def test_the_memory_of_a_learner_is_that_of_its_part(tmp_path):
    path = recipe(tmp_path, algorithm={"kl": {"coef": 0.1}})
    alone, many = (load(path, keys) for keys in ([], MANY))
    shape = footprint.shape_of(alone.model, tokenizer_of(alone.model))
    whole = footprint.memory(alone, shape, 24, shape)
    part = footprint.memory(many, shape, 24, shape, Axes(shard=4), Axes(shard=2, tensor=2))
    for what in ("weights", "optimizer", "reference"):
        assert part.lasting[what] == pytest.approx(whole.lasting[what] / 4, abs=8)
    assert part.sampling["engine's weights"] == whole.lasting["weights"]
    assert "engine's weights" not in whole.sampling


HANDLES = ["placement.kind=colocated", "engine.transfer=ipc"]


@pytest.mark.parametrize("lora", [None, {"rank": 2, "targets": ["q_proj", "down_proj"]}])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_of_what_is_kept_for_handles_is_what_they_lead_to(tmp_path, dtype, lora):
    """On a CPU, where it is a copy in any case."""
    path = recipe(tmp_path, model={"lora": lora})
    run = load(path, [*HANDLES, f"engine.dtype={dtype}"])
    model = load_model(run.model, tokenizer_of(run.model), torch.device("cpu"))
    road, weights = IpcRoad(model.device), ModelWeights(model, DTYPES[dtype])
    [handles] = road.offer(0, weights).place.values()
    held = Path(handles[0][1][0]).stat().st_size
    road.close()
    kept = footprint.memory(run, footprint.shape_of(run.model, model.tokenizer), 24, None).lasting
    assert 0 <= held - kept["copy for engines"] < ALIGNED * len(weights.specs())
    assert "copy for engines " in findings(path, *HANDLES, f"engine.dtype={dtype}")["memory"][0][1]
    assert "copy for engines" not in findings(path, HANDLES[0], f"engine.dtype={dtype}")["memory"][0][1]


@pytest.mark.parametrize(
    ("keys", "copied"),
    [
        (["engine.dtype=bf16"], 2),
        (["learner.layout.shard=2"], 4),
        (["learner.layout.shard=2", "engine.dtype=bf16"], 2),
        (["learner.layout.tensor=2"], 4),
        (["learner.layout.replicate=2"], 0),
        (["learner.layout.replicate=2", "learner.layout.offload_parameters=true"], 4),
        (["learner.layout.replicate=2", "engine.dtype=bf16"], 2),
        ([], 0),
    ],
)
def test_on_another_device_handles_lead_to_the_learners_own_tensors_where_they_can(tmp_path, keys, copied):
    """Bytes per parameter that are kept beside them."""
    several = any("layout" in key for key in keys)
    many = [f"placement.{role}={1 + several}" for role in ("learners", "engines")]
    run = load(recipe(tmp_path), [*HANDLES, *keys, *many, "device=meta"])
    shape = footprint.shape_of(run.model, tokenizer_of(run.model))
    axes = Axes.of(run.learner.layout, 1 + several)
    kept = footprint.memory(run, shape, 24, None, axes).lasting
    assert kept.get("copy for engines", 0) == copied * shape.parameters


def test_a_folder_with_another_run_is_a_problem_and_ones_own_goes_on(tmp_path, quiet):
    path = recipe(tmp_path)
    train(load(path), quiet)
    assert "goes on from step 4 of 9" in findings(path, "steps=9")["run folder"][0][1]
    assert findings(path, "steps=4")["run folder"][0][0] == "ok"
    assert "has 4 steps done, more than steps=3" in only(findings(path, "steps=3"), "problem")["run folder"]
    assert "seed: 0 -> 2" in only(findings(path, "seed=2"), "problem")["run folder"]


LORA = Lora(rank=2, targets=["q_proj", "down_proj"])


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("family", ["qwen2_tied", "qwen2_grouped", "qwen3", "llama"])
def test_sizes_read_from_a_config_are_those_of_the_loaded_model(tmp_path, family, lora):
    language_model(family).save(tmp_path)
    config = Model(path=str(tmp_path), lora=lora)
    tokenizer = tokenizer_of(config)
    shape = footprint.shape_of(config, tokenizer)
    model = load_model(config, tokenizer, torch.device("cpu"))
    assert shape.parameters == sum(p.numel() for p in model.module.parameters())
    assert shape.trainable == sum(p.numel() for p in model.trainable().values())
    assert (shape.layers, shape.vocabulary, shape.positions) == (2, model.vocab_size, model.max_positions)


def test_an_adapter_that_finds_no_module_is_told_without_weights(tmp_path):
    path = recipe(tmp_path, model={"lora": {"targets": ["q_projection"]}})
    assert "q_projection" in only(findings(path), "problem")["model"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_of_weights_and_optimizer_is_what_they_take(tmp_path, dtype):
    run = load(recipe(tmp_path), [f"model.dtype={dtype}"])
    tokenizer = tokenizer_of(run.model)
    shape = footprint.shape_of(run.model, tokenizer)
    actor = Actor(load_model(run.model, tokenizer, torch.device("cpu")), run)
    for weight in actor.model.trainable().values():
        weight.grad = torch.zeros_like(weight)
    gradients = sum(w.grad.nbytes for w in actor.model.trainable().values() if w.grad is not None)
    actor.optimizer.step(actor.optimizer.gradient_norm())
    states = [t for s in actor.optimizer.adamw.state.values() for t in s.values() if t.ndim]
    taken = footprint.memory(run, shape, 24, None)
    assert taken.lasting["weights"] == sum(p.nbytes for p in actor.model.module.parameters())
    assert taken.lasting["optimizer"] == sum(t.nbytes for t in states)
    masters = sum(t.nbytes for t in actor.optimizer.master_tensors.values())
    assert taken.lasting.get("master weights", 0) == masters
    assert taken.update["gradients"] == gradients


def test_the_estimate_of_the_cache_is_what_the_engine_allocates(tmp_path, monkeypatch):
    run = load(recipe(tmp_path), ["data.eval=null", "sampling.slots=6"])
    tokenizer = tokenizer_of(run.model)
    model = load_model(run.model, tokenizer, torch.device("cpu"))
    made = []

    class Watched(embedded.Slots):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            made.append(sum(t.nbytes for t in self.caches))

    monkeypatch.setattr(embedded, "Slots", Watched)
    prompts = [tuple(range(i, i + 20)) for i in range(run.sampling.prompts_per_step)]
    requests = [Request(tokens=p, key=k) for p in prompts for k in range(run.sampling.answers_per_prompt)]
    params = SamplingParams(max_tokens=run.sampling.max_answer_tokens)
    EmbeddedEngine(model, run.sampling.slots).generate(requests, params)
    shape = footprint.shape_of(run.model, tokenizer)
    assert footprint.memory(run, shape, 20, None).sampling["KV cache"] == made[0]


@pytest.mark.parametrize("family", ["qwen2_grouped", "qwen3", "llama"])
def test_the_estimate_of_activations_is_near_what_the_backward_pass_keeps(tmp_path, family):
    model = language_model(family)
    model.save(tmp_path)
    shape = footprint.shape_of(Model(path=str(tmp_path)), model.tokenizer)
    rows, length = 6, 64
    tokens_BT = torch.randint(0, 200, (rows, length))
    mask_BT = torch.zeros(rows, length, dtype=torch.bool)
    mask_BT[:, -1] = True
    lengths = torch.tensor([length] * (rows - 1) + [length - 1])
    mask_BT[-1, -1] = False
    measured = kept_bytes(model, tokens_BT, mask_BT, lengths)
    estimate = int(lengths.sum()) * shape.layers * shape.kept(Axes(), True, 4)
    assert 0.8 < measured / estimate < 1.2, measured / estimate


def kept_bytes(model, *batch, **groups) -> int:
    """What a forward pass keeps for the backward pass, but for weights."""
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(model, *batch, **groups, temperature=1.0, logits_bytes=2**30)
    return sum(size for place, size in kept.items() if place not in weights)


def test_the_estimate_counts_the_probabilities_that_answers_to_one_prompt_keep(tmp_path):
    """They are a fourth of all here."""
    model = language_model("qwen2_grouped")
    model.save(tmp_path / "model")
    prompt, answer, answers = 40, 64, 8
    run = load(
        recipe(
            tmp_path,
            model={"path": str(tmp_path / "model"), "new": None},
            sampling={"answers_per_prompt": answers, "max_answer_tokens": answer},
        ),
        [f"learner.tokens_per_forward={prompt + answers * answer}"],
    )
    shape = footprint.shape_of(run.model, model.tokenizer)
    mask_BT = (torch.arange(prompt + answer) >= prompt).repeat(answers, 1)
    tokens_BT = torch.randint(0, 200, mask_BT.shape)
    tokens_BT[:, :prompt] = tokens_BT[0, :prompt]
    groups = {
        "prompt_length_B": torch.full((answers,), prompt),
        "group_B": torch.zeros(answers, dtype=torch.long),
    }
    measured = kept_bytes(model, tokens_BT, mask_BT, torch.full((answers,), prompt + answer), **groups)
    update = footprint.memory(run, shape, prompt, None).update
    scores = shape.layers * footprint.probabilities(run, shape.heads * answers * answer * (prompt + answer))
    assert scores > update["activations"] / 5
    assert 0.8 < (measured - answers * answer * shape.vocabulary * 4) / update["activations"] < 1.2


def test_the_estimate_of_the_disk_is_what_the_run_folder_holds(tmp_path, quiet):
    path = recipe(
        tmp_path,
        model={"new": {"hidden_size": 128, "layers": 2, "heads": 4, "max_positions": 128}},
        algorithm={"kl": {"coef": 0.01}},
    )
    run = load(path, ["checkpoint.every=1", "checkpoint.keep=2", "eval.every=null"])
    parts = folder_bytes(run, footprint.shape_of(run.model, tokenizer_of(run.model)), 24)
    train(run, quiet)
    folder = tmp_path / "run"

    def size(*patterns: str) -> int:
        return sum(f.stat().st_size for p in patterns for f in folder.glob(p) if f.is_file())

    kept = size("checkpoints/**/*.safetensors")
    # One checkpoint more is there while the next one is written.
    assert parts["3 checkpoints"] / 3 == pytest.approx(kept / 2, rel=0.05)
    assert parts["exported model"] == pytest.approx(size("model/*.safetensors"), rel=0.05)
    assert 0.4 * parts["rollout records"] < size("rollouts/*") <= parts["rollout records"]


def test_offloading_moves_the_optimizer_to_the_host(tmp_path):
    run = load(recipe(tmp_path))
    shape = footprint.shape_of(run.model, tokenizer_of(run.model))
    here = footprint.memory(run, shape, 24, None)
    away = footprint.memory(load(recipe(tmp_path), ["learner.optimizer.offload=true"]), shape, 24, None)
    assert here.lasting["optimizer"] == away.host["optimizer"] and not here.host
    assert here.peak - away.peak == here.lasting["optimizer"]


def test_checkpointing_activations_takes_less(tmp_path):
    run = load(recipe(tmp_path), ["model.new.layers=8"])
    shape = footprint.shape_of(run.model, tokenizer_of(run.model))
    less = load(recipe(tmp_path), ["model.new.layers=8", "learner.checkpointing=true"])
    ratio = (
        footprint.memory(less, shape, 24, None).update["activations"]
        / footprint.memory(run, shape, 24, None).update["activations"]
    )
    assert ratio < 0.2
