"""Answers that are interrupted and go on: with the same weights as if nothing had been, with others as these say."""

from dataclasses import replace

import pytest

from tandem.engine import PAUSED, EmbeddedEngine, Pause, Request, SamplingParams, decode, embedded, steps
from tandem.engine.random import key
from tandem.engine.steps import FixedSteps
from test_engine import PROMPTS, STOPS
from tiny_models import forward_logits, language_model, twin

STOPPING = ("in two tokens",)
"""Stands for texts that answers have in their middle."""
PARAMS = {
    "plain": {},
    "scaled": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "held": {"min_tokens": 12},
    "truncated": {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalized": {"repetition_penalty": 1.3},
    "stop text": {"stop": STOPPING},
}


def requests_to(prompts=PROMPTS, each: int = 4) -> list[Request]:
    """With limits of their own here and there."""
    return [
        Request(tokens=p, key=key(7, i, a), max_tokens=9 if a == 3 else None)
        for i, p in enumerate(prompts)
        for a in range(each)
    ]


def interrupted(engines, requests, params, tokens: int):
    """Answers that were stopped after each so many tokens (of all of them); every time the next engine goes on."""
    done = {}
    for version in range(1000):
        left = [i for i in range(len(requests)) if i not in done]
        if not left:
            return [done[i] for i in range(len(requests))]
        reported = {}

        def poll(answers, so_far):
            if so_far >= tokens:
                raise Pause

        asked = [replace(requests[i], version=version) for i in left]
        engine = engines[min(version, len(engines) - 1)]
        for place, completion in enumerate(
            engine.generate(asked, params, poll=poll, on_done=reported.__setitem__)
        ):
            if completion.finish == PAUSED:
                assert place not in reported
                requests[left[place]] = replace(requests[left[place]], begun=completion)
            else:
                assert reported[place] == completion
                done[left[place]] = completion
    raise AssertionError("no end")


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.tokens == b.tokens and a.finish == b.finish
        assert a.logp == pytest.approx(b.logp, abs=1e-5)
        assert a.policy_logp == pytest.approx(b.policy_logp, abs=1e-5)


@pytest.mark.parametrize("name", PARAMS)
def test_an_answer_goes_on_as_if_it_had_never_stopped(name):
    params = SamplingParams(max_tokens=30, stop_tokens=STOPS, **PARAMS[name])
    engine = EmbeddedEngine(language_model("qwen3"), 8, tokens_per_prefill=60)
    if params.stop == STOPPING:
        free = engine.generate(requests_to(), replace(params, stop=()))
        texts = [decode(engine.model.tokenizer, c.tokens[i : i + 2]) for c in free for i in (4, 7)]
        params = replace(params, stop=tuple(t for t in texts if t.isascii() and len(t) == 2))
        assert params.stop
    whole = engine.generate(requests_to(), params)
    assert len({len(c.tokens) for c in whole}) > 2
    for tokens in (1, 7, 40):
        pieces = interrupted([engine], requests_to(), params, tokens)
        same(pieces, whole)
        for completion in pieces:
            assert list(completion.versions) == sorted(completion.versions)
            assert len(completion.versions) == len(completion.tokens)
        assert max(len(set(c.versions)) for c in pieces) > 1, "some were stopped in their middle"


@pytest.mark.parametrize("family", ["qwen2_tied", "qwen2_grouped", "llama"])
def test_every_family_goes_on(family):
    params = SamplingParams(max_tokens=16, stop_tokens=STOPS)
    engine = EmbeddedEngine(language_model(family), 64)
    same(interrupted([engine], requests_to(), params, 30), engine.generate(requests_to(), params))


def test_every_place_to_stop_is_as_good_as_another():
    params = SamplingParams(max_tokens=12)
    engine = EmbeddedEngine(language_model("qwen3"), 2)
    requests = requests_to(PROMPTS[:2], 1)
    whole = engine.generate(requests, params)
    for tokens in range(24):
        pieces = interrupted([engine], list(requests), params, max(1, tokens))
        same(pieces, whole)


def test_steps_of_fixed_shape_go_on_too(monkeypatch):
    """What a CUDA graph replays, without the graph."""
    params = SamplingParams(max_tokens=30, stop_tokens=STOPS)
    engine = EmbeddedEngine(language_model("qwen3"), 11)
    whole = engine.generate(requests_to(), params)
    monkeypatch.setattr(embedded, "Steps", FixedSteps)
    monkeypatch.setattr(steps, "COLUMNS", 16)
    same(interrupted([engine], requests_to(), params, 40), whole)


@pytest.mark.gpu
def test_captured_steps_go_on_too():
    model = language_model("qwen3")
    model.network.to("cuda")
    params = SamplingParams(max_tokens=30, stop_tokens=STOPS)
    engine = EmbeddedEngine(model, 11)
    whole = engine.generate(requests_to(), params)
    pieces = interrupted([engine], requests_to(), params, 40)
    agree = [a.tokens == b.tokens for a, b in zip(pieces, whole)]
    assert sum(agree) >= len(agree) - 1, "but for a draw at the edge of two tokens"


def test_with_other_weights_each_token_is_of_those_that_chose_it():
    """Held against plain forward passes of both models; no key of the old weights is used by the new ones."""
    models = [language_model("qwen3", seed=seed) for seed in (0, 1)]
    params = SamplingParams(max_tokens=24, temperature=0.8)
    pieces = interrupted([EmbeddedEngine(m, 8) for m in models], requests_to(), params, 100)
    old_and_new = 0
    for request, done in zip(requests_to(), pieces):
        row = request.tokens + done.tokens
        logits = [forward_logits(twin(model), row) for model in models]
        for place, (version, logp) in enumerate(zip(done.versions, done.policy_logp), len(request.tokens)):
            of = [(each_TV[place - 1] / 0.8).log_softmax(-1)[row[place]].item() for each_TV in logits]
            assert logp == pytest.approx(of[min(version, 1)], abs=1e-4)
        old_and_new += len({min(v, 1) for v in done.versions}) == 2
    assert old_and_new > 3


def test_what_was_not_begun_comes_back_as_it_was():
    engine, params = EmbeddedEngine(language_model("qwen3"), 2), SamplingParams(max_tokens=6)

    def at_once(answers, tokens):
        raise Pause

    requests = requests_to(PROMPTS[:2], 2)
    for completion in engine.generate(requests, params, poll=at_once):
        assert completion.tokens == () and completion.finish == PAUSED
    begun = interrupted_once(engine, requests, params)
    again = engine.generate([replace(r, begun=b) for r, b in zip(requests, begun)], params, poll=at_once)
    assert again == begun


def interrupted_once(engine, requests, params):
    def poll(answers, tokens):
        if tokens >= 3:
            raise Pause

    return engine.generate(requests, params, poll=poll)
