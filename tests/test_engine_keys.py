"""The keys of the engine section: what they refuse, and how they reach vLLM. Needs no vLLM."""

import sys

import pytest
import torch
from pydantic import ValidationError

from tandem.config.engine import Engine
from tandem.config.sections import Lora
from tandem.engine import SamplingParams
from tandem.engine.vllm import arguments, changes_distribution, check_params, check_room, port
from tandem.engine.vllm_adapter import check_adapter
from tandem.errors import ConfigError


def test_without_vllm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tandem.engine.vllm_port", None)
    with pytest.raises(
        ConfigError, match=r"engine.kind=vllm needs vLLM.*tandem-rl\[vllm\].*engine.kind=embedded"
    ):
        port()


def test_the_keys_reach_vllm():
    config = Engine(
        kind="vllm",
        tensor_parallel=2,
        max_num_seqs=7,
        max_num_batched_tokens=512,
        max_model_len=100,
        gpu_memory_utilization=0.5,
        kv_cache_mb=3,
        prefix_caching=False,
        eager=True,
    )
    chosen = arguments("folder", config, torch.bfloat16, Lora(rank=12), False, fill=False)
    wanted = {
        "model": "folder",
        "dtype": "bfloat16",
        "load_format": "dummy",
        "tensor_parallel_size": 2,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 512,
        "max_model_len": 100,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory_bytes": 3 << 20,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "enable_lora": True,
        "max_lora_rank": 16,
        "logprobs_mode": "processed_logprobs",
    }
    assert wanted.items() <= chosen.items()
    with pytest.raises(ConfigError, match=r"model.lora.rank=600"):
        check_adapter(Lora(rank=600), "folder", mixture=False)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"transfer": "memory", "tensor_parallel": 2}, "transfer=memory stays in one process"),
        ({"max_num_batched_tokens": 200}, r"batched_tokens=200 is less than .*max_num_seqs=256 answers"),
        ({"transfer": "broadcast", "transfer_dir": "here"}, "transfer_dir is for transfer=files"),
        ({"kind": "embedded", "max_num_seqs": 64}, "engine.max_num_seqs is for engine.kind=vllm"),
        ({"gpu_memory_utilization": 1.5}, "less than or equal to 1"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(values, says):
    with pytest.raises(ValidationError, match=says):
        Engine(**{"kind": "vllm", **values})


def test_the_first_transfer_is_verified_and_every_nth_after_it():
    assert [n for n in range(1, 9) if Engine(verify_every=3).verifies(n)] == [1, 4, 7]


def test_auto_takes_the_shortest_road():
    assert Engine().road(one_process=True, adapter=False) == "memory"
    assert Engine().road(one_process=False, adapter=False) == "files"
    vllm = Engine(kind="vllm")
    assert vllm.road(one_process=True, adapter=False) == "memory"
    assert vllm.road(one_process=True, adapter=True) == "files"
    assert Engine(kind="vllm", tensor_parallel=2).road(one_process=True, adapter=False) == "files"
    assert Engine(kind="vllm", transfer="ipc").road(one_process=False, adapter=False) == "ipc"


def test_a_pass_over_a_whole_answer_needs_one_position_more():
    check_room(100, SamplingParams(), 100)
    check_room(99, SamplingParams(top_p=0.9), 100)
    with pytest.raises(ConfigError, match=r"up to 100 tokens and one for the pass that says .* limit of 100"):
        check_room(100, SamplingParams(top_p=0.9), 100)
    with pytest.raises(ConfigError, match=r"up to 101 tokens, above .* of 100; raise engine\.max_model_len"):
        check_room(101, SamplingParams(), 100)


def test_sampling_that_vllm_cannot_account_for_is_refused():
    check_params(SamplingParams(temperature=0.7))
    check_params(SamplingParams(temperature=1, top_p=0.9))
    check_params(SamplingParams(temperature=0, min_tokens=3))
    assert changes_distribution(SamplingParams(min_tokens=3)) and not changes_distribution(SamplingParams())
    with pytest.raises(ConfigError, match=r"sampling.temperature=0.7 together with top_k=0, top_p=0.9"):
        check_params(SamplingParams(temperature=0.7, top_p=0.9))
    with pytest.raises(ConfigError, match=r"sampling.temperature=0.001"):
        check_params(SamplingParams(temperature=0.001))
