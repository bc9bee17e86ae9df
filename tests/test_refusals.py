"""What is refused before anything slow: what vLLM cannot sample or apply, and files that no converter can cut."""

import pytest
import torch
from transformers import MixtralConfig, Qwen2Config, Qwen2MoeConfig

from small_recipe import recipe
from tandem.checkpoint.convert import convert
from tandem.config import load
from tandem.errors import ConfigError
from tandem.model.new import new_tokenizer
from tandem.train.check import check
from tandem.train.run import Launch, train
from tiny_models import SHAPE


def test_an_evaluation_that_vllm_cannot_sample_is_refused_by_its_own_key(tmp_path):
    """It needs no vLLM: whatever is wrong is said before an engine starts."""
    path = recipe(
        tmp_path,
        engine={"kind": "vllm"},
        sampling={"min_answer_tokens": 4},
        eval={"temperature": 0.6},
        journal={"samples": 0, "sinks": ["jsonl"]},
    )
    with pytest.raises(ConfigError, match=r"^eval.temperature=0.6 together with .*min_answer_tokens=4"):
        train(load(path), Launch(recipe=str(path)))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["sampling.top_p=0.9", "sampling.temperature=0.7"], "sampling.temperature=0.7 together with "),
        (["sampling.temperature=0.001"], "sampling.temperature=0.001: vLLM samples at "),
        (["eval.temperature=0.6", "sampling.min_answer_tokens=4"], "eval.temperature=0.6 together with "),
        (
            ["engine.max_model_len=20"],
            "prompt and answer take up to 36 tokens, above the engine's limit of 20",
        ),
    ],
)
def test_the_check_refuses_what_the_run_refuses_of_vllm(tmp_path, keys, said):
    path = recipe(tmp_path, engine={"kind": "vllm"}, journal={"samples": 0, "sinks": ["jsonl"]})
    found = [
        line.text for line in check(load(path, keys)) if (line.status, line.name) == ("problem", "engine")
    ]
    with pytest.raises(ConfigError) as refused:
        train(load(path, keys), Launch(recipe=str(path)))
    assert found == [str(refused.value)] and found[0].startswith(said)


def test_an_end_token_that_the_model_never_says_is_refused(tmp_path):
    run = load(recipe(tmp_path, sampling={"stop_tokens": [7, 999999]}))
    with pytest.raises(
        ConfigError, match=r"^sampling.stop_tokens=999999: the tokenizer has the tokens 0 to"
    ) as told:
        train(run, Launch(recipe="small.yaml"))
    assert str(told.value) in [line.text for line in check(run) if line.status == "problem"]


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
WITH_EXPERTS = {
    "mixtral": MixtralConfig(**SHAPE, **HEADS, num_local_experts=4, architectures=["MixtralForCausalLM"]),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, **HEADS, num_experts=4, architectures=["Qwen2MoeForCausalLM"]),
}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="vLLM takes them on an accelerator")
@pytest.mark.parametrize("family", WITH_EXPERTS)
@pytest.mark.parametrize("placement", ["inline", "apart"])
def test_an_adapter_of_a_mixture_is_refused_where_vllm_samples_on_a_cpu(tmp_path, family, placement):
    """From the model's config alone: the folder has no weights."""
    path = adapted(tmp_path, WITH_EXPERTS[family], placement={"kind": placement})
    found = [line.text for line in check(load(path)) if (line.status, line.name) == ("problem", "engine")]
    with pytest.raises(
        ConfigError, match=r"^engine.kind=vllm: on a CPU .* \(model.lora\) .* model.path="
    ) as told:
        train(load(path), Launch(recipe=str(path)))
    assert found == [str(told.value)] and "set engine.kind=embedded" in found[0]
    embedded = load(path, ["engine.kind=embedded"])
    assert [line.status for line in check(embedded) if line.name == "engine"] == ["ok"]


@pytest.mark.parametrize(("rank", "refused"), [(512, False), (513, True)])
def test_an_adapter_that_vllm_has_no_room_for_is_refused(tmp_path, rank, refused):
    """One of a model without experts is taken otherwise."""
    config = Qwen2Config(**SHAPE, num_attention_heads=2, architectures=["Qwen2ForCausalLM"])
    path = adapted(tmp_path, config)
    found = [line for line in check(load(path, [f"model.lora.rank={rank}"])) if line.name == "engine"]
    assert [line.status for line in found] == ["problem" if refused else "ok"]
    assert ("model.lora.rank=513: vLLM takes adapters up to rank 512" in found[0].text) == refused


def adapted(folder, config, **changes):
    """A recipe of an adapter for the model with such a config, which vLLM samples from."""
    config.save_pretrained(folder / "model")
    new_tokenizer().save_pretrained(folder / "model")
    model = {"new": None, "path": str(folder / "model"), "lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}}
    quiet = {"samples": 0, "sinks": ["jsonl"]}
    return recipe(folder, model=model, engine={"kind": "vllm"}, journal=quiet, **changes)


@pytest.mark.parametrize("size", [0.0, -1.0, float("inf"), float("nan")])
def test_files_of_no_size_or_without_end_are_refused(tmp_path, size):
    with pytest.raises(ConfigError, match=r"--shard-gb .* must be above 0 and finite"):
        convert(tmp_path, tmp_path / "new", "hf", shard_gb=size)
    assert not (tmp_path / "new").exists()
