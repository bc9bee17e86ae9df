"""vLLM with mixtures of experts: their weights come expert by expert, and the second pass over answers is watched."""

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from copies import check_probe
from tandem.config.engine import Engine
from tandem.config.sections import Lora
from tandem.engine import Pause, Request, SamplingParams
from tandem.engine.roads import FilesRoad, MemoryRoad
from tandem.engine.vllm import VllmEngine, own_specs
from tandem.engine.weights import ModelWeights, check_specs
from tandem.errors import ConfigError
from tandem.model import LanguageModel
from tandem.model.new import new_tokenizer
from tiny_models import SHAPE

SPARSE = {
    **SHAPE,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
FAMILIES = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SPARSE, head_dim=32, norm_topk_prob=True)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SPARSE, shared_expert_intermediate_size=32)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**{**SPARSE, "intermediate_size": 32})),
}
CONFIG = Engine(kind="vllm", kv_cache_mb=64, eager=True, max_num_seqs=8)
REQUESTS = [Request(tokens=tuple(range(3 + i, 9 + 2 * i)), key=i) for i in range(12)]


def mixture(family: str, seed: int) -> LanguageModel:
    made, generator = FAMILIES[family](), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.1 * noise)
    return LanguageModel(made.eval(), new_tokenizer(), family)


def engine_of(model: LanguageModel, folder) -> VllmEngine:
    pytest.importorskip("vllm")
    model.network.save_pretrained(folder)
    known = {"tokenizer": model.tokenizer, "stop_tokens": model.stop_tokens}
    return VllmEngine(str(folder), CONFIG, dtype=torch.float32, **known)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_expects_the_tensors_that_the_trainer_sends(tmp_path, family):
    model = mixture(family, 0)
    model.network.save_pretrained(tmp_path)
    offer = MemoryRoad().offer(0, ModelWeights(model))
    last = "w2" if family == "mixtral" else "down_proj"
    assert any(f".experts.3.{last}.weight" in spec.name for spec in offer.specs)
    check_specs(offer, own_specs(str(tmp_path), torch.float32, trust_remote_code=False))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="vLLM takes them on an accelerator")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_on_a_cpu_that_gets_adapters_of_a_mixture_is_not_started(tmp_path, family):
    """The driver of a cluster does not know its devices. There is nothing to load."""
    model = mixture(family, 0)
    model.network.config.save_pretrained(tmp_path)
    known = {"tokenizer": model.tokenizer, "stop_tokens": model.stop_tokens, "lora": Lora(rank=4)}
    with pytest.raises(
        ConfigError, match=r"^engine.kind=vllm: on a CPU vLLM takes no adapters .* of a mixture"
    ):
        VllmEngine(str(tmp_path), CONFIG, dtype=torch.float32, **known)


@pytest.fixture(scope="module")
def engine(request, tmp_path_factory):
    made = engine_of(mixture(request.param, 0), tmp_path_factory.mktemp("mixture"))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("engine", "family", "kind"),
    [(family, family, kind) for family in ("mixtral", "qwen3_moe") for kind in ("memory", "files")],
    indirect=["engine"],
    scope="module",
)
def test_a_mixtures_weights_are_taken_and_proved(engine, tmp_path, family, kind):
    road = MemoryRoad() if kind == "memory" else FilesRoad(tmp_path / "versions")
    engine.connect(kind)
    for version in (1, 2):
        sender = mixture(family, version)
        engine.update(road.offer(version, ModelWeights(sender)))
        assert check_probe(engine, sender, version, torch.float32) < 1e-4


@pytest.mark.parametrize("engine", ["qwen3_moe"], indirect=True, scope="module")
def test_the_second_pass_says_how_far_it_is_and_can_be_ended_but_not_paused(engine):
    """More answers than decode at the same time: they are scored in several steps."""
    params, seen = SamplingParams(max_tokens=12, top_k=5), []
    whole = engine.generate(REQUESTS, params, poll=lambda done, tokens: seen.append((done, tokens)))
    sampled = sum(len(completion.tokens) for completion in whole)
    scoring = [tokens for done, tokens in seen if done == len(REQUESTS)]
    assert scoring[0] == sampled < scoring[1] and seen == sorted(seen)

    def ending_with(cause):
        def poll(done, tokens):
            if tokens > sampled:
                raise cause

        return poll

    paused = engine.generate(REQUESTS, params, poll=ending_with(Pause))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(REQUESTS, params, poll=ending_with(KeyboardInterrupt))
    assert not engine._llm.llm_engine.has_unfinished_requests()
    after = engine.generate(REQUESTS, params)
    for one, other, third in zip(whole, paused, after):
        assert one.tokens == other.tokens == third.tokens
        for completion in (other, third):
            assert completion.policy_logp == pytest.approx(one.policy_logp, abs=1e-5, rel=1e-5)
