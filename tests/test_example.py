"""The one-file example is the trainer's own arithmetic, spelled out."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.data import tasks
from tandem.journal import read_metrics
from tandem.train.run import train

EXAMPLE = Path(__file__).parents[1] / "examples" / "one_file_grpo.py"


def test_the_one_file_example_and_the_trainer_sample_the_same_and_end_at_the_same_weights(
    adding_folder, make_run, quiet, tmp_path
):
    spec = importlib.util.spec_from_file_location("one_file_grpo", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": r["question"], "answer": r["answer"]} for r in tasks.rows("addition")[:10]]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    steps, prompts, answers = 3, 4, 4
    sizes = ["--steps", steps, "--prompts", prompts, "--answers", answers, "--max-tokens", 32]
    model, rewards = example.main([str(adding_folder), str(questions), *map(str, sizes)])

    run = make_run(
        adding_folder,
        steps=steps,
        data={"train": str(questions), "shuffle": False},
        reward={"functions": [{"name": f"{EXAMPLE}:reward"}]},
    )
    train(run, quiet)
    ours = [
        row["reward/mean"]
        for row in read_metrics(Path(run.run_dir) / "metrics.jsonl")
        if "reward/mean" in row
    ]
    assert ours == pytest.approx(rewards, abs=0)
    assert len(set(rewards)) > 1, "the rewards must differ for the comparison to mean something"
    trained = AutoModelForCausalLM.from_pretrained(Path(run.run_dir) / "model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(adding_folder).state_dict()
    # Adam divides by the root of the second moment: where a gradient is all rounding, so is its update.
    apart = torch.cat(
        [(trained[name] - weight).abs().flatten() for name, weight in model.state_dict().items()]
    )
    assert (apart > 1e-6).float().mean() < 1e-3
    assert apart.max() < steps * 1e-4
    moved = max((trained[name] - start[name]).abs().max().item() for name in start)
    assert moved > 1e-4, "training must have moved the weights"
