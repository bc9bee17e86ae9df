"""Small real models and configurations that many tests share."""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# As the command line does, and before torch comes in: the suite must not crawl on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
import yaml
from rich.console import Console
from transformers.utils import logging as transformers_logging

from tandem.config import Run, load
from tandem.config.sections import Data, Learner, NewModel, Warmup
from tandem.data import tasks
from tandem.data.prompts import load_prompts
from tandem.model import LanguageModel
from tandem.model.new import new_network, new_tokenizer
from tandem.train.run import Launch
from tandem.train.supervised import demonstrations, supervise, warmup_optimizer

# What imports Ray: elsewhere the others can be collected, those for a GPU among them.
OF_RAY = ["test_in_flight_run.py", "test_ray.py", "test_reward_model_run.py", "test_vllm_ray.py"]
collect_ignore = [] if find_spec("ray") else OF_RAY
LONGEST = ["test_ray.py", "test_nodes.py", "test_vllm_ray.py", "test_in_flight_run.py", "test_critic_run.py"]
"""Begun first, so that none of them is left to one process at the end."""
SHAPE = NewModel(hidden_size=64, layers=2, heads=4, kv_heads=2, max_positions=256)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    transformers_logging.disable_progress_bar()
    yield


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen2 with random weights."""
    return saved(tmp_path_factory.mktemp("random"), random_model())


@pytest.fixture(scope="session")
def adding_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model after a short warm-up on sums: it is right sometimes, so its rewards differ."""
    model = random_model()
    data = Data(train="tandem:addition")
    prompts = load_prompts(data, data.train, model.tokenizer, limit=20)
    warmup = Warmup(steps=120, batch=64, lr=4e-3, wrong_share=0.5)
    batches = demonstrations(
        tasks.find("addition"), prompts.prompts, model.tokenizer, batch=64, wrong_share=0.5, seed=0
    )
    supervise(
        model,
        batches,
        warmup_optimizer(warmup),
        warmup.steps,
        learner=Learner(tokens_per_forward=8192, logits_mb=256),
        on_step=lambda step, metrics: None,
    )
    return saved(tmp_path_factory.mktemp("adding"), model)


def random_model(seed: int = 0, shape: NewModel = SHAPE) -> LanguageModel:
    tokenizer = new_tokenizer()
    return LanguageModel(new_network(shape, tokenizer, seed), tokenizer, "random")


def saved(folder: Path, model: LanguageModel) -> Path:
    model.save(folder)
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """A small run of additions; keyword arguments replace whole keys of sections (`learner={"lr": ...}` merges)."""

    def make(folder: Path | None = None, /, **changes: Any) -> Run:
        values: dict[str, Any] = {
            "run_dir": str(tmp_path / "run"),
            "steps": 4,
            "model": {"path": str(folder)} if folder else {"new": SHAPE.model_dump()},
            "data": {"train": "tandem:addition", "max_prompt_tokens": 64},
            "sampling": {"prompts_per_step": 4, "answers_per_prompt": 4, "max_answer_tokens": 32},
            "reward": {"functions": [{"name": "answer_number", "args": {"right": 1.0, "wrong": 0.0}}]},
            "learner": {"optimizer": {"lr": 1e-4}},
            "algorithm": {"kl": {"coef": 0.0}},
            "eval": {"every": None},
            "checkpoint": {"every": None},
            "journal": {"sinks": ["jsonl"], "samples": 0},
        }
        for name, value in changes.items():
            values[name] = merged(values.get(name), value)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
        return load(recipe)

    return make


def merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}


@pytest.fixture
def quiet() -> Launch:
    return Launch(recipe="test.yaml", console=Console(quiet=True))
