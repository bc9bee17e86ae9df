"""vLLM itself, with a tiny model on the CPU: it samples what it says, and weights reach it whole or not at all."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from copies import (
    QUERY,
    Changed,
    Lying,
    adapted,
    beside,
    check_probe,
    flip,
    group,
    names,
    policy,
    refused_changes,
    send,
)
from tandem.config.engine import Engine
from tandem.config.sections import Lora
from tandem.engine import PAUSED, EmbeddedEngine, Pause, Request, SamplingParams, decode
from tandem.engine.probe import policy_logp
from tandem.engine.random import key
from tandem.engine.roads import BroadcastRoad, FilesRoad, MemoryRoad, RoadBroken
from tandem.engine.vllm import VllmEngine, port
from tandem.engine.weights import ModelWeights
from tandem.errors import ConfigError, RunError
from tiny_models import forward_logits, language_model, twin

CONFIG = Engine(kind="vllm", kv_cache_mb=64, eager=True, max_num_seqs=8)
PROMPTS = [tuple(range(3 + i, 9 + 3 * i)) for i in range(4)]
REQUESTS = [Request(tokens=tokens, key=key(i, j)) for i, tokens in enumerate(PROMPTS) for j in range(2)]
GREEDY = SamplingParams(temperature=0, max_tokens=24)

STARTED = []
"""An engine that is forgotten ends later, and would take a newer one's process groups along."""


def engine_of(model, folder, config=CONFIG, **options):
    pytest.importorskip("vllm")
    model.network.save_pretrained(folder)
    known = {"tokenizer": model.tokenizer, "stop_tokens": model.stop_tokens}
    STARTED.append(VllmEngine(str(folder), config, dtype=torch.float32, **known, **options))
    return STARTED[-1]


@pytest.fixture(scope="module", autouse=True)
def all_ended():
    yield
    for engine in STARTED:
        engine.close()
    STARTED.clear()


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """An engine and the policy it was started with, whose weights it holds again after each test."""
    return engine_of(policy(0), tmp_path_factory.mktemp("tied")), policy(0)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return engine_of(policy(0, tied=False), tmp_path_factory.mktemp("untied")), policy(0, tied=False)


@pytest.fixture(params=["tied", "untied"])
def both(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def files():
    road = FilesRoad()
    yield road
    road.close()


def restore(engine, model):
    """Give the engine its first weights again."""
    engine.connect("memory")
    engine.update(MemoryRoad().offer(0, ModelWeights(model)))


def close_to(logp, model, request, done, temperature=1.0):
    row = request.tokens + done.tokens
    if temperature == 1:
        ours = policy_logp(model, row)[len(request.tokens) - 1 :]
    else:
        logits_TV = forward_logits(twin(model), row)
        steps = range(len(request.tokens), len(row))
        ours = [(logits_TV[t - 1] / temperature).log_softmax(-1)[row[t]].item() for t in steps]
    assert logp == pytest.approx(ours, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"min_tokens": 10},
        {"repetition_penalty": 1.3},
        {"stop": ("stop",)},
        {"stop": ("stop",), "min_tokens": 14},
        {"stop_tokens": frozenset({"stop"})},
        {"stop_tokens": frozenset({"stop"}), "min_tokens": 14},
    ],
    ids=str,
)
def test_greedy_answers_are_those_of_the_embedded_engine(both, changes):
    engine, model = both
    embedded = EmbeddedEngine(model, 8)
    plain = embedded.generate(REQUESTS, GREEDY)
    # A stop that the first answer runs into halfway.
    place = min(11, len(plain[0].tokens) - 2)
    if "stop" in changes:
        changes = {**changes, "stop": (decode(model.tokenizer, plain[0].tokens[place : place + 2]),)}
    if "stop_tokens" in changes:
        changes = {**changes, "stop_tokens": frozenset({plain[0].tokens[place]})}
    params = SamplingParams(temperature=0, max_tokens=24, **changes)
    theirs, ours = engine.generate(REQUESTS, params), embedded.generate(REQUESTS, params)
    assert [c.tokens for c in theirs] == [c.tokens for c in ours]
    assert [c.finish for c in theirs] == [c.finish for c in ours]
    if "stop" in changes or "stop_tokens" in changes:
        assert any(c.finish == "stop" for c in ours)
    for their, our in zip(theirs, ours):
        assert their.policy_logp == pytest.approx(our.policy_logp, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_tokens_come_with_the_policys_log_probability(both, temperature):
    engine, model = both
    done = engine.generate(REQUESTS, SamplingParams(temperature=temperature, max_tokens=24))
    for request, completion in zip(REQUESTS, done):
        assert completion.logp == completion.policy_logp
        close_to(completion.logp, model, request, completion, temperature)


@pytest.mark.parametrize(
    "changes", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}, {"min_tokens": 8}], ids=str
)
def test_under_truncation_both_log_probabilities_are_right(tied, changes):
    engine, model = tied
    done = engine.generate(REQUESTS, SamplingParams(max_tokens=12, **changes))
    for request, completion in zip(REQUESTS, done):
        close_to(completion.policy_logp, model, request, completion)
        above = [a - b for a, b in zip(completion.logp, completion.policy_logp)]
        assert min(above) > -1e-4 and max(above) > 1e-3


def test_a_key_fixes_its_answer_in_any_company(tied):
    engine, _ = tied
    params = SamplingParams(max_tokens=16)
    alone = [engine.generate([request], params)[0].tokens for request in REQUESTS]
    assert [c.tokens for c in engine.generate(REQUESTS[::-1], params)][::-1] == alone
    assert len(set(alone)) == len(alone)


def test_each_request_keeps_its_own_limit(tied):
    engine, _ = tied
    short = [Request(tokens=PROMPTS[0], key=1, max_tokens=n) for n in (1, 3, 99)]
    done = engine.generate(short, SamplingParams(max_tokens=5, min_tokens=4))
    assert [len(c.tokens) for c in done] == [1, 3, 5]
    assert engine.generate([], GREEDY) == []


def test_work_can_be_abandoned_between_tokens(tied):
    engine, model = tied
    seen = []

    def poll(done, tokens):
        seen.append((done, tokens))
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(REQUESTS, GREEDY, poll=poll)
    assert seen == sorted(seen)
    after = engine.generate(REQUESTS[:2], GREEDY)
    assert [c.tokens for c in after] == [
        c.tokens for c in EmbeddedEngine(model, 8).generate(REQUESTS[:2], GREEDY)
    ]


@pytest.mark.parametrize("changes", [{}, {"stop": ("stop",)}, {"top_k": 20}], ids=str)
def test_paused_answers_go_on_with_the_weights_of_then(both, changes):
    """And those that are done are reported when they are, each once."""
    engine, old = both
    if "stop" in changes:
        known = EmbeddedEngine(old, 8).generate(REQUESTS, SamplingParams(max_tokens=24))
        changes = {"stop": (decode(old.tokenizer, known[0].tokens[10:12]),)}
    new = policy(3, tied=old.network.config.tie_word_embeddings)
    params = SamplingParams(max_tokens=40, **changes)
    reported, calls = {}, []

    def poll(done, tokens):
        calls.append(tokens)
        if len(calls) == 20:
            raise Pause

    engine.connect("memory")
    first = engine.generate(REQUESTS, params, poll=poll, on_done=reported.__setitem__)
    assert any(c.finish == PAUSED and c.tokens for c in first)
    for index, completion in enumerate(first):
        assert (index in reported) == (completion.finish != PAUSED)
        assert len(completion.tokens) == len(completion.policy_logp) == len(completion.versions)
        if completion.tokens:
            close_to(completion.policy_logp, old, REQUESTS[index], completion)
    engine.update(MemoryRoad().offer(1, ModelWeights(new)))
    left = [i for i, c in enumerate(first) if c.finish == PAUSED]
    asked = [replace(REQUESTS[i], begun=first[i], version=1) for i in left]
    for request, completion in zip(asked, engine.generate(asked, params)):
        before = len(request.begun.tokens)
        assert completion.tokens[:before] == request.begun.tokens and len(completion.tokens) <= 40
        assert completion.versions == (0,) * before + (1,) * (len(completion.tokens) - before)
        assert completion.policy_logp[:before] == request.begun.policy_logp
        scored = policy_logp(new, request.tokens + completion.tokens)[len(request.tokens) - 1 :]
        assert completion.policy_logp[before:] == pytest.approx(scored[before:], abs=1e-5, rel=1e-5)
    assert engine.generate(asked, params) == engine.generate(asked, params), (
        "and a key still fixes what is sampled"
    )
    restore(engine, old)


def test_what_is_too_long_is_refused(tied):
    engine, _ = tied
    with pytest.raises(ConfigError, match=r"up to 134 tokens, above the engine's limit of 128"):
        engine.generate([Request(tokens=(1,) * 110, key=0)], GREEDY)


@pytest.mark.parametrize("kind", ["memory", "files", "broadcast"])
def test_weights_come_by_every_road_and_are_proved(both, kind, files):
    engine, model = both
    tied = model.network.config.tie_word_embeddings
    if kind == "broadcast":
        road, meeting = group()
        with beside(road.connect):
            engine.connect("broadcast", **meeting, first_rank=1, size=2)
    else:
        road = files if kind == "files" else MemoryRoad()
        engine.connect(kind)
    for version in (1, 2):
        sender = policy(version, tied=tied)
        send(road, engine, version, ModelWeights(sender), verify=version == 1)
        assert check_probe(engine, sender, version, torch.float32) < 1e-4
        expected = EmbeddedEngine(sender, 8).generate(REQUESTS, GREEDY)
        assert [c.tokens for c in engine.generate(REQUESTS, GREEDY)] == [c.tokens for c in expected]
        with pytest.raises(RunError, match="Cause: the weights"):
            check_probe(engine, model, version, torch.float32)
    restore(engine, model)
    check_probe(engine, model, 0, torch.float32)


@pytest.mark.parametrize("change", refused_changes())
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(tied, change):
    engine, model = tied
    engine.connect("memory")
    alter, says = refused_changes()[change]
    with pytest.raises(RunError, match=says):
        engine.update(MemoryRoad().offer(1, Changed(policy(1), alter)))
    check_probe(engine, model, 0, torch.float32)


def test_a_flipped_bit_or_a_lost_tensor_is_refused_and_the_old_weights_stay(both, files):
    engine, model = both
    sender = policy(1, tied=model.network.config.tie_word_embeddings)
    engine.connect("files")
    offer = files.offer(1, ModelWeights(sender))
    flip(files.root / "v00000001", sender.network.get_parameter(QUERY))
    with pytest.raises(RunError, match=rf"version 1 by road files: tensor {QUERY} changed on the way"):
        engine.update(offer)
    check_probe(engine, model, 0, torch.float32)
    with pytest.raises(RunError, match=f"tensor {QUERY} never came"):
        engine.update(files.offer(2, Lying(sender)))
    check_probe(engine, model, 0, torch.float32)
    engine.update(files.offer(3, ModelWeights(sender)))
    check_probe(engine, sender, 3, torch.float32)
    restore(engine, model)


def flipping(self, tensor, offer, bucket, plain=BroadcastRoad._broadcast):
    """A bit of the last tensor changes on the way."""
    if self.rank == 0 and tensor.dtype == torch.uint8:
        tensor[-1] ^= 64
    plain(self, tensor, offer, bucket)


def test_a_broadcast_that_breaks_off_leaves_an_engine_that_refuses(tied, monkeypatch):
    engine, model = tied
    road, meeting = group()
    with beside(road.connect):
        engine.connect("broadcast", **meeting, first_rank=1, size=2)
    last = names(ModelWeights(model).specs())[-1]
    with monkeypatch.context() as patch:
        patch.setattr(BroadcastRoad, "_broadcast", flipping)
        with pytest.raises(RunError, match=f"road broadcast: tensor {last} changed"):
            send(road, engine, 1, ModelWeights(policy(1)))
    with pytest.raises(RunError, match="part of version 1"):
        engine.generate(REQUESTS, GREEDY)
    send(road, engine, 2, ModelWeights(policy(2)))
    check_probe(engine, policy(2), 2, torch.float32)
    restore(engine, model)


def test_a_head_that_stays_behind_is_found_by_the_probe(tied, monkeypatch):
    engine, model = tied
    engine.connect("memory")
    monkeypatch.setattr(port(), "tie_again", lambda model: None)
    engine.update(MemoryRoad().offer(1, ModelWeights(policy(1))))
    with pytest.raises(
        RunError, match=r"Cause: the weights: they arrived and the engine computes with others"
    ):
        check_probe(engine, policy(1), 1, torch.float32)
    monkeypatch.undo()
    restore(engine, model)
    check_probe(engine, model, 0, torch.float32)


def test_a_head_that_is_tied_in_an_unknown_way_is_refused():
    pytest.importorskip("vllm")
    odd = policy(0).network
    odd.model = None
    with pytest.raises(RunError, match="Qwen2ForCausalLM ties its output head in a way"):
        port().tie_again(odd)


def test_weights_on_another_road_are_refused(tied, files):
    engine, _ = tied
    engine.connect("memory")
    with pytest.raises(RunError, match=r"are on road files, the engine on memory"):
        engine.update(files.offer(1, ModelWeights(policy(1))))
    with pytest.raises(RunError, match=r"are an adapter and the engine was started for all weights"):
        engine.update(files.offer(1, ModelWeights(adapted(1))))


def test_an_adapter_is_all_that_travels(tmp_path, files):
    engine = engine_of(policy(0), tmp_path, lora=Lora(rank=4, alpha=8))
    check_probe(engine, policy(0), 0, torch.float32)
    with pytest.raises(RunError, match=r"Cause: the adapter"):
        check_probe(engine, adapted(1), 0, torch.float32)
    with pytest.raises(ConfigError, match=r"engine.transfer=memory: vLLM reads adapters from files"):
        engine.connect("memory")
    engine.connect("files")
    for version in (1, 2, 3):
        sender = adapted(version)
        engine.update(files.offer(version, ModelWeights(sender)))
        assert check_probe(engine, sender, version, torch.float32) < 1e-4
        expected = EmbeddedEngine(sender, 8).generate(REQUESTS, GREEDY)
        assert [c.tokens for c in engine.generate(REQUESTS, GREEDY)] == [c.tokens for c in expected]
    offer = files.offer(4, ModelWeights(adapted(4)))
    flip(files.root / "v00000004", next(t for n, t in ModelWeights(adapted(4)) if "lora_B" in n))
    with pytest.raises(RunError, match=r"lora_B.weight changed on the way"):
        engine.update(offer)
    check_probe(engine, adapted(3), 3, torch.float32)


def test_an_engine_without_weights_waits_for_the_first(tmp_path):
    model = policy(0)
    state, threads = random.getstate(), torch.get_num_threads()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    np.random.seed(7)
    engine = engine_of(model, tmp_path, fill=False)
    assert torch.equal(torch.rand(3), expected) and random.getstate() == state
    drawn = np.random.rand()
    np.random.seed(7)
    assert np.random.rand() == drawn
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    with pytest.raises(RunError, match="no weights yet"):
        engine.generate(REQUESTS, GREEDY)
    engine.connect("memory")
    engine.update(MemoryRoad().offer(1, ModelWeights(policy(3))))
    check_probe(engine, policy(3), 1, torch.float32)
    engine.sleep()
    engine.wake()
    check_probe(engine, policy(3), 1, torch.float32)


@pytest.mark.slow
def test_two_workers_share_the_weights(tmp_path, files, monkeypatch):
    config = CONFIG.model_copy(update={"tensor_parallel": 2})
    engine = engine_of(policy(0), tmp_path, config)
    engine.connect("files")
    engine.update(files.offer(1, ModelWeights(policy(1))))
    assert check_probe(engine, policy(1), 1, torch.float32) < 1e-4
    offer = files.offer(2, ModelWeights(policy(2)))
    flip(files.root / "v00000002", policy(2).network.get_parameter(QUERY))
    with pytest.raises(RunError, match=f"tensor {QUERY} changed on the way"):
        engine.update(offer)
    check_probe(engine, policy(1), 1, torch.float32)

    with pytest.raises(RoadBroken, match=r"rank [12] of 3 found no group"):
        engine.connect("broadcast", host="127.0.0.1", port=9, first_rank=1, size=3, timeout_s=0.5)
    road, meeting = group(3)
    with beside(road.connect):
        engine.connect("broadcast", **meeting, first_rank=1, size=3)
    send(road, engine, 3, ModelWeights(policy(3)))
    assert check_probe(engine, policy(3), 3, torch.float32) < 1e-4
    last = names(ModelWeights(policy(4)).specs())[-1]
    monkeypatch.setattr(BroadcastRoad, "_broadcast", flipping)
    with pytest.raises(RunError, match=f"road broadcast: tensor {last} changed"):
        send(road, engine, 4, ModelWeights(policy(4)))


def test_heads_that_the_cpu_cannot_do_are_said_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"no attention for heads of 16"):
        engine_of(language_model("qwen2_tied"), tmp_path)
