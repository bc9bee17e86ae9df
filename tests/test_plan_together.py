"""The plan's times of several processes on this machine are near those that they take."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from learner_times import (
    ANSWER,
    ANSWERS,
    DENSE,
    GROUPS,
    MIXTURE,
    PROMPT,
    SENDING,
    seconds_of_each,
    seconds_of_engines,
)
from near import assert_near
from parallel_ranks import launch
from small_recipe import recipe
from tandem.config import load
from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.model import LanguageModel
from tandem.model.new import new_tokenizer
from tandem.train.plan.axes import Axes
from tandem.train.plan.plan import plan
from tandem.train.plan.request import lengths_of
from tandem.train.plan.together import measured_together, processes_here

NEW = {"hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 2, "max_positions": 256}


def mixture(folder: Path) -> dict[str, Any]:
    """Eight experts, of which each token goes through two."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    LanguageModel(Qwen3MoeForCausalLM(config), new_tokenizer(), "made here").save(folder / "mixture")
    return {"new": None, "path": str(folder / "mixture")}


@pytest.mark.alone
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_the_times_of_two_learners_on_this_machine_are_near_those_expected(tmp_path, kind):
    run = of_two(tmp_path, {"new": NEW} if kind == "dense" else mixture(tmp_path))
    layouts = MIXTURE if kind == "mixture" else DENSE
    whole = load(tmp_path / "small.yaml", ["learner.layout.sequence=false"])

    def taken() -> dict[str, float]:
        launch(seconds_of_each, 2, tmp_path)
        return json.loads((tmp_path / "seconds.json").read_text())

    assert_near(lambda: expected(layouts, run, whole), taken)


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_the_times_of_two_engines_at_once_are_near_those_expected(tmp_path):
    """That they sample, and that they take weights which two learners each have or hold together."""
    run = of_two(tmp_path, {"new": NEW | {"hidden_size": 512}})
    layouts = {name: DENSE[name] for name in SENDING}

    def taken() -> dict[str, float]:
        launch(seconds_of_engines, 2, tmp_path)
        return json.loads((tmp_path / "seconds.json").read_text())

    assert_near(lambda: expected(layouts, run), taken)


def of_two(folder: Path, model: dict[str, Any]) -> Run:
    changes = {
        "model": model,
        "sampling": {"prompts_per_step": GROUPS, "answers_per_prompt": ANSWERS, "max_answer_tokens": ANSWER},
        "data": {"max_prompt_tokens": PROMPT, "eval": None},
        "learner": {"tokens_per_forward": PROMPT + ANSWERS * ANSWER},
        "algorithm": {"old_logp": "recompute"},
    }
    run = load(recipe(folder, **changes))
    if processes_here(run, 2) < 2:
        pytest.skip("needs two cores")
    return run


def expected(layouts: dict[str, dict[str, Any]], *runs: Run) -> dict[str, float]:
    """Seconds of each phase of each layout that one of the runs may have, by rates that are taken now."""
    found, lengths = {}, lengths_of(runs[0], None, None)
    rates = measured_together(runs[0], lengths, 2)
    for run in runs:
        offers = plan(run, rates, count=2, per_node=2, lengths=lengths, top=10**6, offload=False).offers
        every = {offer.axes: offer.seconds for offer in offers if not offer.samplers}
        for name, sizes in layouts.items():
            layout = Layout(**sizes)
            if layout.sequence == run.learner.layout.sequence:
                phases = every[Axes.of(layout, 2)]
                found |= phases | {f"{name}, {phase}": seconds for phase, seconds in phases.items()}
    return found
