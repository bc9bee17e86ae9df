"""Runs of large models of which there is only a config, and their plans."""

from pathlib import Path

from transformers import LlamaConfig, Qwen3MoeConfig

from small_recipe import recipe
from tandem.config import Run, load
from tandem.config.layout import Layout
from tandem.train import footprint
from tandem.train.plan.axes import Axes
from tandem.train.plan.device import assumed, find
from tandem.train.plan.link import links
from tandem.train.plan.plan import Plan, plan
from tandem.train.plan.request import lengths_of
from tandem.train.plan.training import Trainer

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


def trainer(run: Run, axes: Axes, count: int, per_node: int = 8) -> Trainer:
    rates = assumed(find("h200"), "bf16")
    return Trainer(
        run=run,
        shape=footprint.shape_of(run.model, None),
        lengths=lengths_of(run, None, None),
        axes=axes,
        rates=rates,
        links=links(rates, count, per_node),
        layout=Layout(),
        optimizer=run.learner.optimizer,
    )
