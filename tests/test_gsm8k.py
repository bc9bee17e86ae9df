"""The GSM8K recipe and every command of docs/gsm8k.md, on real questions with a tiny model that is sometimes right."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from published import FOLDER, needs
from tandem.config import Run, load
from tandem.data.prompts import load_prompts
from tandem.errors import ConfigError
from tandem.journal import read_metrics
from tandem.model.new import new_tokenizer
from tandem.optimizer import learning_rate
from tandem.train.run import Launch, train
from tiny_models import chain

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "runs" / "gsm8k.yaml"
GSM8K = FOLDER / "train.jsonl"
END = 258
GUESS = "10"
pytestmark = needs(GSM8K)

FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line)[3:]
    for block in FENCE.findall((ROOT / "docs" / "gsm8k.md").read_text(encoding="utf-8"))
    for line in block.replace("\\\n", " ").splitlines()
]
"""The overrides of each command."""

SHRUNK = [
    "sampling.prompts_per_step=3",
    "sampling.answers_per_prompt=4",
    "sampling.max_answer_tokens=12",
    "learner.tokens_per_forward=4096",
    "eval.questions=2",
    "checkpoint.every=null",
    "journal.sinks=[jsonl]",
]


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]


def lucky(layers: int = 2):
    """Always the asked layout but for a box; then mostly one of two numbers, the truth of `questions` and another, and
    rarely a third, which truncated sampling drops."""
    tokens = [spelled_one(piece) for piece in ("<think>", "</think>", "<answer>")]
    one, other, rare, zero, close = (spelled_one(piece) for piece in ("1", "3", "7", "0", "</answer>"))
    newline = spelled_one("\n")
    path = {last: {following: 1.0} for last, following in zip([newline, *tokens], tokens)}
    path |= {tokens[-1]: {one: 0.45, other: 0.45, rare: 0.1}}
    path |= {digit: {zero: 1.0} for digit in (one, other, rare)}
    return chain({**path, zero: {close: 1.0}, close: {END: 1.0}}, max_positions=2048, layers=layers)


def spelled_one(piece: str) -> int:
    (token,) = new_tokenizer().encode(piece, add_special_tokens=False)
    return token


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    lucky().save(folder := tmp_path_factory.mktemp("model"))
    return folder


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    lucky(layers=3).save(folder := tmp_path_factory.mktemp("larger"))
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Real rows, unchanged: short questions whose truth is one of the model's two guesses."""
    fitting = [r for r in rows() if r["answer"].endswith(f"#### {GUESS}") and len(r["question"]) < 160]
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    assert len(fitting) >= 6
    file.write_text("".join(json.dumps(row) + "\n" for row in fitting[:6]), encoding="utf-8")
    return file


@pytest.fixture
def start(tmp_path, model, larger, questions):
    """Run the recipe with the given overrides, at the size of a test; returns the run and its metrics by step."""
    places = {"DIR": model, "LARGER": larger, "train.jsonl": questions, "test.jsonl": questions}

    def started(overrides: list[str]) -> tuple[Run, list[dict[str, float]]]:
        pairs = (item.partition("=") for item in overrides)
        filled = [f"{key}={places.get(value, value)}" for key, _, value in pairs]
        run = load(RECIPE, [*filled, *SHRUNK, f"run_dir={tmp_path / 'run'}"])
        train(run, Launch(recipe="gsm8k.yaml", console=Console(quiet=True)))
        metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
        return run, [row for row in metrics if "reward/mean" in row]

    return started


def test_recipe_trains_and_exports(start, tmp_path, model):
    """In its own precision and at its own learning rate."""
    run, metrics = start(["model.path=DIR", "data.train=train.jsonl", "data.eval=test.jsonl", "steps=2"])
    assert run.model.dtype == "bf16" and run.learner.checkpointing and len(metrics) == 2
    for row in metrics:
        assert row["reward/failures"] == 0 and 0 <= row["reward/mean"] <= 1
        assert row["reward/mean"] == pytest.approx(row["reward/parts/accuracy"])
        assert row["response_length/mean"] == 7 and row["truncated_share"] == 0
        assert row["actor/updates"] == 1 and row["grad_norm"] > 0
        assert row["rollout/logp_gap_max"] < 0.1 and row["rollout/lag_max"] == 0
    assert any(0 < row["reward/mean"] < 1 for row in metrics), (
        "rewards differ, so there is something to learn"
    )
    assert [row["actor/lr"] for row in metrics] == pytest.approx([9e-6, 1e-10])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    before = AutoModelForCausalLM.from_pretrained(model, dtype=exported.dtype).state_dict()
    assert exported.dtype == torch.bfloat16
    assert any(not torch.equal(weight, before[name]) for name, weight in exported.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token_id == END
    evaluated = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/accuracy" in row]
    assert len(evaluated) == 2 and all(0 <= row["eval/greedy_accuracy"] <= 1 for row in evaluated)


def test_reference_follows_the_policy_every_so_many_steps(start):
    """With a learning rate that moves the policy by more than rounding."""
    _, metrics = start(
        [
            "model.path=DIR",
            "data.train=train.jsonl",
            "model.dtype=fp32",
            "steps=4",
            "reference.refresh_every=2",
            "learner.optimizer.lr=0.003",
            "learner.optimizer.schedule=constant",
        ]
    )
    pull = [row["kl/reference"] for row in metrics]
    assert max(pull[0], pull[2]) < 1e-7 and min(pull[1], pull[3]) > 1e-6


REWARDS = {
    "accuracy": {0.0, 1.0},
    "format": {1.0},
    "base_acc": {0.0},  # the tiny model writes no box
    "acc": {-1.0},
    "strict_format": {-0.5},
    "answer_number": {-1.0, 1.0},
    "format_tags": {1.25},
}
"""What each function can say of the tiny model's answers."""


@pytest.mark.parametrize("number", range(1, len(COMMANDS)))
def test_each_command_of_the_documentation_runs_and_its_options_take_effect(start, tmp_path, number):
    overrides = [item for item in COMMANDS[number] if not item.startswith("steps=")]
    run, (row,) = start([*overrides, "steps=1"])
    names = [f.name for f in run.reward.functions]
    parts = [json.loads(line)["parts"] for line in rollout_lines(tmp_path / "run")]
    for name in names:
        assert {p[name] for p in parts} <= REWARDS[name]
    expected = sum(f.weight * row[f"reward/parts/{f.name}"] for f in run.reward.functions)
    assert row["reward/mean"] == pytest.approx(expected)
    assert row["actor/lr"] == run.learner.optimizer.lr
    assert row["kl/coef"] == run.algorithm.kl.coef
    truncated = run.sampling.top_p < 1
    assert (row["correction/mean"] < 0.995) == truncated, (
        "the rare number is never drawn, so the others are too often"
    )
    assert row["actor/updates"] == (row["advantage/zero_share"] < 1 or run.needs_reference)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def rollout_lines(folder: Path) -> list[str]:
    (file,) = sorted((folder / "rollouts").glob("*.jsonl"))
    return file.read_text(encoding="utf-8").splitlines()


def test_documentation_has_the_commands_that_the_test_runs():
    assert len(COMMANDS) == 8
    assert all(c[:2] == ["model.path=DIR", "data.train=train.jsonl"] for c in COMMANDS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], ["model.path", "data.train: missing"]),
        (["model.path=DIR"], ["data.train: missing"]),
        (["data.train=train.jsonl"], ["model.path"]),
    ],
)
def test_what_must_be_given_is_named_when_it_is_not(given, said):
    with pytest.raises(ConfigError) as caught:
        load(RECIPE, given)
    message = str(caught.value)
    assert f"{len(said)} problem" in message
    for words in said:
        assert words in message


def test_documentation_quotes_the_message_as_it_is(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        load("recipes/runs/gsm8k.yaml")
    documented = (ROOT / "docs" / "gsm8k.md").read_text(encoding="utf-8")
    for line in str(caught.value).splitlines()[:-1]:
        assert f"    {line}\n" in documented


def test_recipe_passes_twice_over_the_published_questions_and_ends_at_its_end_rate():
    run = load(RECIPE, [f"data.train={GSM8K}", "model.path=DIR"])
    published = len(rows())
    assert published == 7473
    per_step = run.sampling.prompts_per_step
    assert abs(run.steps * per_step - 2 * published) < per_step
    optimizer, total = run.learner.optimizer, run.total_updates
    rates = [learning_rate(optimizer, update, total) for update in range(total)]
    assert (rates[0], rates[-1]) == (9e-6, pytest.approx(1e-10)) and rates == sorted(rates, reverse=True)
    assert [step for step in range(1, 201) if run.refreshes_reference(step)] == [50, 100, 150, 200]


def test_every_published_question_has_a_number_and_the_layout_is_asked_for():
    """Bytes are more tokens than any model's vocabulary makes of a text."""
    run = load(RECIPE, [f"data.train={GSM8K}", "model.path=DIR", "data.max_prompt_tokens=4000"])
    prompts = load_prompts(run.data, run.data.train, new_tokenizer())
    assert len(prompts.prompts) == 7473 and prompts.bad == prompts.overlong == 0
    for prompt, row in zip(prompts.prompts, rows(), strict=True):
        assert float(prompt.truth.replace(",", "")) == float(
            row["answer"].rpartition("#### ")[2].replace(",", "")
        )
        assert row["question"] in prompt.text and "<answer>" in prompt.text and "\\boxed{}" in prompt.text
        assert prompt.text.endswith("<|im_start|>assistant\n") and row["answer"] not in prompt.text
