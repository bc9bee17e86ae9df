"""What the keys of vLLM do inside it: its own configuration, the cache of prompts, compilation, and on a GPU sleep."""

import pytest
import torch

from copies import check_probe, policy
from tandem.config.engine import Engine
from tandem.engine import EmbeddedEngine, Pause, Request, SamplingParams
from tandem.engine.random import key
from tandem.engine.roads import MemoryRoad
from tandem.engine.vllm import port
from tandem.engine.weights import ModelWeights
from tandem.errors import ConfigError, RunError
from test_transfer import offering
from test_vllm import CONFIG, GREEDY, REQUESTS, all_ended, engine_of, files  # noqa: F401

KEYS = {
    "kv_cache_mb": 16,
    "eager": True,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 700,
    "max_model_len": 400,
    "gpu_memory_utilization": 0.35,
    "sleep": True,
}
BLOCK = 128
"""Positions of a block of vLLM's cache on a CPU; only whole ones are found again."""
PROMPT = tuple(key(7, i) % 250 for i in range(2 * BLOCK + 10))
SHARING = [Request(tokens=(*PROMPT, i), key=key(i)) for i in range(6)]
SHORT = SamplingParams(temperature=0, max_tokens=8)


def long_policy(seed):
    model = policy(seed)
    model.network.config.max_position_embeddings = 512
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["caching", "no caching"])
def keyed(request, tmp_path_factory):
    config = Engine(kind="vllm", prefix_caching=request.param, **KEYS)
    return engine_of(long_policy(0), tmp_path_factory.mktemp("keyed"), config)


@pytest.fixture
def hits(monkeypatch):
    """By request: how many tokens of its prompt vLLM says it took from its cache."""
    found, step = {}, port().step

    def watched(llm):
        outputs = step(llm)
        found.update({output.request_id: output.num_cached_tokens for output in outputs})
        return outputs

    monkeypatch.setattr(port(), "step", watched)
    return found


def same_answers(engine, model, requests, params):
    theirs, ours = (e.generate(requests, params) for e in (engine, EmbeddedEngine(model, 8)))
    assert [c.tokens for c in theirs] == [c.tokens for c in ours]
    for their, our in zip(theirs, ours):
        assert their.policy_logp == pytest.approx(our.policy_logp, abs=1e-5, rel=1e-5)


def pause(done, tokens):
    if tokens:
        raise Pause


def test_a_cached_prompt_is_not_answered_with_the_weights_of_before(keyed, hits):
    """Also where the weights change while answers to it are half done."""
    whole = keyed.config.prefix_caching * 2 * BLOCK
    keyed.connect("memory")
    for version in (0, 1, 2):
        sender = long_policy(version)
        keyed.update(MemoryRoad().offer(version, ModelWeights(sender)))
        for first in (0, whole):
            hits.clear()
            same_answers(keyed, sender, SHARING, SHORT)
            assert [hits[name] for name in sorted(hits, key=int)] == [first] + 5 * [whole]
        paused = keyed.generate(SHARING, SamplingParams(temperature=0, max_tokens=60), poll=pause)
        assert any(0 < len(c.tokens) < 60 for c in paused)


def test_the_keys_are_in_vllms_own_configuration(keyed):
    theirs = keyed._llm.llm_engine.vllm_config
    scheduler, cache, model = theirs.scheduler_config, theirs.cache_config, theirs.model_config
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (6, 700)
    assert (model.max_model_len, model.enforce_eager, cache.gpu_memory_utilization) == (400, True, 0.35)
    assert cache.enable_prefix_caching is keyed.config.prefix_caching
    position = 2 * 2 * 32 * 4  # bytes of the keys and values of 32 fp32 numbers in each of two layers
    assert cache.block_size == BLOCK and cache.num_gpu_blocks == (16 << 20) // (position * BLOCK)


def test_the_limit_is_max_model_len_and_not_the_models_own(keyed):
    fits = Request(tokens=PROMPT + PROMPT[: 400 - len(PROMPT) - SHORT.max_tokens], key=0)
    assert len(keyed.generate([fits], SHORT)[0].tokens) == SHORT.max_tokens
    with pytest.raises(
        ConfigError, match=r"up to 401 tokens, above the engine's limit of 400; raise engine\.max_model_len"
    ):
        keyed.generate([Request(tokens=(*fits.tokens, 1), key=0)], SHORT)


def test_on_a_cpu_sleep_changes_nothing(keyed):
    if torch.accelerator.is_available():
        pytest.skip("an accelerator sleeps")
    before = keyed.generate(SHARING, SHORT)
    keyed.sleep()
    assert keyed.generate(SHARING, SHORT) == before


def test_an_engine_that_cannot_empty_its_cache_refuses_until_it_could(keyed, monkeypatch):
    keyed.connect("memory")
    monkeypatch.setattr(keyed._llm, "reset_prefix_cache", lambda: False)
    for call in (
        lambda: keyed.update(MemoryRoad().offer(3, ModelWeights(long_policy(3)))),
        lambda: keyed.generate(SHARING, SHORT),
    ):
        with pytest.raises(RunError, match="a cache of prompts that is older than weights of version 3"):
            call()
    monkeypatch.undo()
    keyed.update(MemoryRoad().offer(4, ModelWeights(long_policy(4))))
    same_answers(keyed, long_policy(4), SHARING, SHORT)


@pytest.mark.slow
def test_compiled_it_answers_with_the_weights_it_was_sent(tmp_path, monkeypatch):
    """Compiled anew, with nothing left from before."""
    # vLLM reads its variables once, when the first engine of a process starts.
    pytest.importorskip("vllm.envs").disable_envs_cache()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "compiled"))
    config = CONFIG.model_copy(update={"eager": False})
    engine = engine_of(policy(0, layers=1), tmp_path / "model", config)
    theirs = engine._llm.llm_engine.vllm_config.compilation_config
    assert theirs.mode.name != "NONE" and any((tmp_path / "compiled").rglob("*.so"))
    engine.connect("memory")
    for version in (0, 1, 2):
        sender = policy(version, layers=1)
        engine.update(MemoryRoad().offer(version, ModelWeights(sender)))
        assert check_probe(engine, sender, version, torch.float32) < 1e-4
        same_answers(engine, sender, REQUESTS, GREEDY)


@pytest.mark.gpu
def test_a_sleeping_engine_gives_its_memory_back(tmp_path, files):  # noqa: F811
    device = torch.accelerator.current_accelerator(check_available=True)
    config = Engine(kind="vllm", gpu_memory_utilization=0.3, sleep=True)
    engine = engine_of(policy(0), tmp_path, config)
    engine.connect("files")
    free = torch.accelerator.get_memory_info(device)[0]
    engine.sleep()
    assert torch.accelerator.get_memory_info(device)[0] > free
    with pytest.raises(RunError, match="let go of its weights"):
        engine.generate(REQUESTS, GREEDY)
    engine.update(files.offer(1, ModelWeights(policy(1))))
    engine.wake()
    check_probe(engine, policy(1), 1, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["memory", "files", "ipc"])
def test_weights_reach_a_captured_graph(tmp_path, kind, files):  # noqa: F811
    device = torch.device(torch.accelerator.current_accelerator(check_available=True).type, 0)
    engine = engine_of(policy(0), tmp_path, Engine(kind="vllm", gpu_memory_utilization=0.3))
    engine.connect(kind)
    sender = policy(1)
    sender.module.to(device)
    if kind == "ipc":
        # A process cannot open handles of its own memory: the sender is another, with the same weights.
        with offering(kind, device, tmp_path / "offer") as process:
            assert process.stdout.readline() == "offered\n"
            engine.update(torch.load(tmp_path / "offer", weights_only=False))
            process.stdin.close()
    else:
        road = files if kind == "files" else MemoryRoad()
        engine.update(road.offer(1, ModelWeights(sender)))
    check_probe(engine, sender, 1, torch.float32)
