"""Layouts of three and more axes on eight processes do what one process does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import expert_ranks
import pipeline_ranks
from expert_ranks import EVERYWHERE
from parallel_ranks import CPU, PROBE, launch, single, two_shapes, update, weights_of
from tandem.engine.probe import policy_logp
from tandem.model.new import new_tokenizer
from tandem.model.parallel.grid import connect
from tiny_models import randomized

FAMILIES = {**expert_ranks.FAMILIES, **pipeline_ranks.FAMILIES}
MIXTURE = {"optimizer": {"lr": 0.2}}
PRODUCTS = {
    "pipeline x expert x tensor": expert_ranks.case({"pipeline": 2, "expert": 2, "tensor": 2}, **MIXTURE),
    "pipeline x adapted experts x tensor": expert_ranks.case(
        {"pipeline": 2, "expert": 2, "tensor": 2}, **EVERYWHERE, **MIXTURE
    ),
    "shard x context x tensor x expert of 4": expert_ranks.case(
        {"context": 2, "expert": 4, "tensor": 2}, **MIXTURE
    ),
    "pipeline x context x tensor x expert": expert_ranks.case(
        {"pipeline": 2, "context": 2, "tensor": 2, "expert": 2}, "qwen2_moe", **MIXTURE
    ),
    "replicate x expert x tensor": expert_ranks.case({"replicate": 2, "expert": 2, "tensor": 2}, **MIXTURE),
    "pipeline x context x tensor": pipeline_ranks.case({"context": 2, "tensor": 2}),
    "interleaved x shard x tensor lora": pipeline_ranks.case({"pipeline_chunks": 2, "tensor": 2}, lora=True),
    "uneven x replicate x context": pipeline_ranks.case(
        {"pipeline_layers": [2, 3], "replicate": 2, "context": 2}
    ),
}


def everything(rank: int, world: int, address: str, place: str) -> None:
    torch.set_num_threads(1)
    connect(rank, world, address, CPU, timeout_s=300)
    for name, made in PRODUCTS.items():
        update(made, Path(place), Path(place) / name, rank)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the eight have worked."""
    made = tmp_path_factory.mktemp("products")
    for family, make in FAMILIES.items():
        randomized(make()).save_pretrained(made / family)
        new_tokenizer().save_pretrained(made / family)
    launch(everything, 8, made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_axes_does_what_one_process_does(place, name):
    actor, part = single(PRODUCTS[name], place)
    logp_BT, start = actor.logprobs(part), weights_of(actor)
    figures = actor.update(two_shapes(part), 0.05)
    weights = weights_of(actor)
    assert max(float((weights[n] - start[n]).abs().max()) for n in weights) > 2e-3
    actor.model.module.eval()
    probe_T = torch.tensor(policy_logp(actor.model, PROBE))
    theirs = load_file(place / f"{name}.safetensors")
    torch.testing.assert_close(theirs.pop("logp_BT"), logp_BT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.pop("probe_T"), probe_T, atol=1e-4, rtol=1e-5)
    assert theirs.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(theirs[key], weight, atol=1e-5, rtol=1e-5)
    found = json.loads((place / f"{name}.json").read_text())
    assert found.keys() == figures.keys()
    for key, value in found.items():
        close = 1e-4 if "ratio" in key else 1e-5
        assert value == pytest.approx(figures[key], rel=close, abs=1e-5), key
