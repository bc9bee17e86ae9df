"""The embedded engine: what Transformers would generate, drawn by key, with true log-probabilities."""

import math
import random

import pytest
import torch

from sampling_truth import SETTINGS, processors
from tandem.engine import EmbeddedEngine, Request, SamplingParams, decode, embedded, steps
from tandem.engine.cache import Slots
from tandem.engine.random import key
from tandem.engine.steps import FixedSteps
from tandem.errors import RunError
from tiny_models import (
    FAMILIES,
    VOCABULARY,
    chain,
    forward_logits,
    language_model,
    network,
    script,
    spelled,
    twin,
)

END = 258
PROMPTS = [(3, 1, 4, 1, 5), (9,), (2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3), (8, 4), (6, 2, 6, 4, 3, 3, 8)]
STOPS = frozenset(range(0, VOCABULARY, 16))
"""Enough end tokens that answers end at many different lengths."""


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_transformers_generates(family):
    model = language_model(family)
    hf = twin(model)
    params = SamplingParams(temperature=0, max_tokens=24, stop_tokens=STOPS)
    done = EmbeddedEngine(model, slots=3).generate([Request(tokens=p, key=0) for p in PROMPTS], params)
    for prompt, completion in zip(PROMPTS, done):
        out = hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=[*STOPS, END],
        )
        assert list(completion.tokens) == out[0, len(prompt) :].tolist()
        stopped = completion.tokens[-1] in STOPS | {END}
        assert completion.finish == ("stop" if stopped else "length")


def test_equal_keys_give_equal_answers_however_they_are_batched():
    model = language_model("qwen3")
    params = SamplingParams(max_tokens=40, stop_tokens=STOPS)
    requests = [Request(tokens=p, key=key(7, i, a)) for i, p in enumerate(PROMPTS) for a in range(5)]
    alone = [EmbeddedEngine(model, 1).generate([r], params)[0] for r in requests]
    assert len({len(c.tokens) for c in alone}) > 8, "answers must end at different times to test refills"
    for slots, budget, seed in [
        (1, 8192, 0),
        (3, 8192, 1),
        (8, 1, 2),
        (10, 14, 3),
        (64, 8192, 4),
        (64, 1, 5),
    ]:
        order = list(range(len(requests)))
        random.Random(seed).shuffle(order)
        engine = EmbeddedEngine(model, slots, tokens_per_prefill=budget)
        batched = engine.generate([requests[i] for i in order], params)
        for i, completion in zip(order, batched):
            assert completion.tokens == alone[i].tokens and completion.finish == alone[i].finish
            assert completion.logp == pytest.approx(alone[i].logp, abs=1e-5)


def test_slots_are_refilled_and_compacted_on_the_way(monkeypatch):
    """The batches of the test above would prove little if its code paths were never taken."""
    sizes, orders, moves, lane_moves = [], [], [], []
    keep, keep_lanes, begin = Slots.keep, Slots.keep_lanes, Slots.begin

    def watched_begin(self, count_B, columns):
        sizes.append(self.rows)
        orders.append(self.in_order)
        return begin(self, count_B, columns)

    monkeypatch.setattr(Slots, "begin", watched_begin)
    monkeypatch.setattr(Slots, "keep", lambda self, slots, n: (moves.append(slots), keep(self, slots, n))[1])
    monkeypatch.setattr(
        Slots, "keep_lanes", lambda self, lanes: (lane_moves.append(lanes), keep_lanes(self, lanes))[1]
    )
    requests = [Request(tokens=p, key=key(7, i, a)) for i, p in enumerate(PROMPTS) for a in range(5)]
    params = SamplingParams(max_tokens=40, stop_tokens=STOPS)
    EmbeddedEngine(language_model("qwen3"), 10).generate(requests, params)
    assert max(sizes) == 10 and min(sizes) < 10, "never more than the slots; fewer once none waits"
    assert any(slots != list(range(len(slots))) for slots in moves), "rows moved to another slot"
    assert any(lanes != list(range(len(lanes))) for lanes in lane_moves), "prompts moved to another lane"
    assert set(orders) == {True, False}, "rows in the order of their prompts, and not"


def test_a_prompt_is_computed_once_for_all_its_answers(monkeypatch):
    computed = []
    prefill = embedded._Decode._prefill
    monkeypatch.setattr(
        embedded._Decode,
        "_prefill",
        lambda self, prompts: (computed.extend(prompts), prefill(self, prompts))[1],
    )
    requests = [Request(tokens=p, key=key(7, i, a)) for i, p in enumerate(PROMPTS) for a in range(5)]
    EmbeddedEngine(language_model(), 4).generate(requests, SamplingParams(max_tokens=20, stop_tokens=STOPS))
    assert computed == PROMPTS


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_steps_of_fixed_shape_give_the_same_answers(monkeypatch, prompts):
    """What a CUDA graph replays, without the graph: padded rows, all lanes and seats, columns rounded up."""
    model, params = language_model("qwen3"), SamplingParams(max_tokens=40, stop_tokens=STOPS, temperature=0.9)
    requests = [Request(tokens=p, key=key(7, i, a)) for i, p in enumerate(prompts) for a in range(5)]
    plain = EmbeddedEngine(model, 11).generate(requests, params)
    monkeypatch.setattr(embedded, "Steps", FixedSteps)
    monkeypatch.setattr(steps, "COLUMNS", 16)
    fixed = EmbeddedEngine(model, 11).generate(requests, params)
    assert [c.tokens for c in fixed] == [c.tokens for c in plain]
    assert [c.finish for c in fixed] == [c.finish for c in plain]
    for one, other in zip(fixed, plain):
        assert one.logp == pytest.approx(other.logp, abs=1e-5)


@pytest.mark.parametrize("fits", [64, 3])
def test_steps_that_are_kept_serve_calls_with_other_prompts(monkeypatch, fits):
    """What a GPU keeps, without the graphs: a cache as large as any call wanted, or with fewer slots where memory is
    short, and steps by ways of sampling, which later see longer prompts than when they were made."""
    model, longest = language_model("qwen3"), 24 + 30
    column = 2 * model.layers * model.key_heads * model.head_dim * 4
    # Two ways to take the likeliest token: a draw may fall on a bound between two, where rounding decides.
    calls = [
        ([tuple(range(24)), (4, 2)], SamplingParams(temperature=0, max_tokens=30)),
        ([(3, 1), (7, 7, 7), (1, 2)], SamplingParams(top_k=1, max_tokens=30, stop_tokens=STOPS)),
        ([(5,), tuple(range(20, 40))], SamplingParams(top_k=1, max_tokens=30, stop_tokens=STOPS)),
    ]
    batches = [
        ([Request(tokens=p, key=key(7, a)) for p in prompts for a in range(4)], params)
        for prompts, params in calls
    ]
    plain = [EmbeddedEngine(model, 8).generate(*batch) for batch in batches]
    monkeypatch.setattr(embedded, "captures", lambda device: True)
    monkeypatch.setattr(embedded, "free_bytes", lambda device: int(fits * column * longest / 0.8) + 1)
    monkeypatch.setattr(embedded, "CapturedSteps", FixedSteps)
    engine = EmbeddedEngine(model, 8)
    for ours, theirs in zip((engine.generate(*batch) for batch in batches), plain, strict=True):
        assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    assert engine._held.slots.room.slots == min(fits, 8)
    kept = engine._held.slots
    engine.generate(*batches[0])
    assert engine._held.slots is kept
    engine.release()
    assert engine._held is None


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [3, 64])
def test_captured_steps_give_the_answers_of_plain_ones_and_see_new_weights(slots):
    model = language_model("qwen3")
    model.network.to("cuda")
    params = SamplingParams(max_tokens=40, stop_tokens=STOPS)
    requests = [Request(tokens=p, key=key(7, i, a)) for i, p in enumerate(PROMPTS) for a in range(5)]
    engine = EmbeddedEngine(model, slots)
    assert engine.generate(requests, params) == engine.generate(requests, params)
    for seed in (0, 1):
        weights = network("qwen3", seed=seed).state_dict()
        model.network.load_state_dict(weights)
        captured = engine.generate(requests, params)
        plain = EmbeddedEngine(language_model("qwen3", seed=seed), slots).generate(requests, params)
        same = sum(one.tokens == other.tokens for one, other in zip(captured, plain))
        assert same >= 0.9 * len(plain), "a draw at the edge between two tokens may differ between devices"


def test_a_request_may_have_a_limit_of_its_own():
    model = chain(script([5, 6, 7, 8], end=END))
    requests = [Request(tokens=(5,), key=0, max_tokens=n) for n in (1, 3, 9, None)]
    done = EmbeddedEngine(model, 2).generate(requests, SamplingParams(max_tokens=4))
    assert [c.tokens for c in done] == [(6,), (6, 7, 8), (6, 7, 8, END), (6, 7, 8, END)]
    assert [c.finish for c in done] == ["length", "length", "stop", "stop"]


def test_seed_changes_samples_and_answers_of_a_group_differ():
    engine = EmbeddedEngine(language_model(), 8)
    params = SamplingParams(max_tokens=12)

    def answers(seed):
        return engine.generate([Request(tokens=PROMPTS[0], key=key(seed, i)) for i in range(6)], params)

    assert answers(1) == answers(1)
    assert len({c.tokens for c in answers(1)} | {c.tokens for c in answers(2)}) == 12


def test_weights_that_change_in_place_are_seen_by_the_next_call():
    model = language_model()
    engine, requests = EmbeddedEngine(model, 4), [Request(tokens=p, key=3) for p in PROMPTS]
    params = SamplingParams(max_tokens=10)
    before = engine.generate(requests, params)
    model.network.load_state_dict(network("qwen2_grouped", seed=1).state_dict())
    after = engine.generate(requests, params)
    assert before != after
    assert after == EmbeddedEngine(language_model(seed=1), 4).generate(requests, params)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["temperature", "all"])
def test_logp_is_that_of_an_independent_forward(family, name):
    model = language_model(family)
    hf, params = twin(model), SETTINGS[name]
    params = SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        max_tokens=16,
    )
    requests = [Request(tokens=p, key=key(2, i, a)) for i, p in enumerate(PROMPTS) for a in range(2)]
    for request, done in zip(requests, EmbeddedEngine(model, 4).generate(requests, params)):
        whole = (*request.tokens, *done.tokens)
        logits = forward_logits(hf, whole)
        for i, token in enumerate(done.tokens):
            place = len(request.tokens) + i - 1
            seen, scores = torch.tensor([whole[: place + 1]]), logits[place][None]
            drawn = processors(params)(seen, scores).log_softmax(-1)[0, token]
            policy = (scores / params.temperature).log_softmax(-1)[0, token]
            assert done.logp[i] == pytest.approx(float(drawn), abs=1e-5)
            assert done.policy_logp[i] == pytest.approx(float(policy), abs=1e-5)


def test_greedy_logp_is_that_of_the_model_at_temperature_one():
    model = language_model()
    done = EmbeddedEngine(model, 2).generate(
        [Request(tokens=PROMPTS[0], key=0)], SamplingParams(temperature=0, max_tokens=8)
    )[0]
    logits = forward_logits(twin(model), (*PROMPTS[0], *done.tokens))[len(PROMPTS[0]) - 1 : -1]
    best = logits.log_softmax(-1).max(-1)
    assert list(done.tokens) == best.indices.tolist()
    assert done.logp == pytest.approx(best.values.tolist(), abs=1e-5)
    assert done.policy_logp == done.logp


def test_end_tokens_are_held_back_until_the_minimum():
    """The model wants to end at once; its other choice has one chance in a thousand."""
    rules = {7: {END: 0.999, 7: 0.001}}
    engine, request = EmbeddedEngine(chain(rules), 4), Request(tokens=(7,), key=1)
    at_once = engine.generate([request], SamplingParams(max_tokens=9))[0]
    assert (at_once.tokens, at_once.finish) == ((END,), "stop")
    held = engine.generate([request], SamplingParams(min_tokens=4, max_tokens=9))[0]
    assert held.tokens == (7, 7, 7, 7, END) and held.finish == "stop"
    # Drawn from what remains, so certain; under the policy itself improbable.
    assert held.logp == pytest.approx([0, 0, 0, 0, math.log(0.999)], abs=1e-4)
    assert held.policy_logp == pytest.approx([math.log(0.001)] * 4 + [math.log(0.999)], abs=1e-4)
    never = engine.generate([request], SamplingParams(min_tokens=9, max_tokens=9))[0]
    assert never.tokens == (7,) * 9 and never.finish == "length"


def test_an_end_token_beyond_the_vocabulary_is_never_met():
    """As with a tokenizer that has more entries than the model has rows."""
    params = SamplingParams(min_tokens=3, max_tokens=6, stop_tokens=frozenset({VOCABULARY, 151_645}))
    engine, request = EmbeddedEngine(chain({7: {7: 1.0}}), 1), Request(tokens=(7,), key=1)
    assert engine.generate([request], params)[0].tokens == (7,) * 6


def test_end_tokens_come_from_model_tokenizer_and_settings():
    model = chain(script([5, 6, 7, 8, 9], end=10))
    model.network.generation_config.eos_token_id = [8, 200]
    model.tokenizer.eos_token = "<|endoftext|>"
    engine, request = EmbeddedEngine(model, 1), Request(tokens=(5,), key=0)
    assert model.stop_tokens == {8, 200, 256}
    assert engine.generate([request], SamplingParams(max_tokens=9))[0].tokens == (6, 7, 8)
    sooner = SamplingParams(max_tokens=9, stop_tokens=frozenset({7}))
    assert engine.generate([request], sooner)[0].tokens == (6, 7)


@pytest.mark.parametrize(
    ("stops", "answer"),
    [
        (("wor",), "i wor"),
        (("d\u3002",), "i world\u3002"),
        (("\u3002",), "i world\u3002"),
        (("\u3002\u00e9", "zzz"), "i world\u3002\u00e9"),
        (("never", "x" * 40), "i world\u3002\u00e9</think>!"),
        (("think",), "i world\u3002\u00e9</think>"),
        (("k>!",), "i world\u3002\u00e9</think>!"),
        (("o", "wo"), "i wo"),
    ],
)
def test_stop_text_ends_the_answer_with_the_token_that_completes_it(stops, answer):
    """One token per byte, so that texts cross tokens and characters; `</think>` is one token, cut by `think`."""
    text = "hi world\u3002\u00e9</think>!"
    model = language_model()
    model = chain(script(spelled(model, text), end=END))
    request = Request(tokens=tuple(spelled(model, "h")), key=0)
    done = EmbeddedEngine(model, 2).generate([request], SamplingParams(max_tokens=30, stop=stops))[0]
    assert decode(model.tokenizer, done.tokens) == answer
    assert done.finish == "stop"
    assert (done.tokens[-1] == END) == (stops[0] == "never")


def test_stop_text_before_the_minimum_does_not_end_the_answer():
    model = language_model()
    model = chain(script(spelled(model, "abcdefgh"), end=END))
    request = Request(tokens=tuple(spelled(model, "a")), key=0)
    params = SamplingParams(max_tokens=30, min_tokens=5, stop=("b", "g"))
    done = EmbeddedEngine(model, 2).generate([request], params)[0]
    assert decode(model.tokenizer, done.tokens) == "bcdefg"


def test_length_limit_ends_answers_and_an_end_token_at_the_limit_is_a_stop():
    model = chain(script([5, 6, 7, 8], end=END))
    engine, request = EmbeddedEngine(model, 1), Request(tokens=(5,), key=0)
    cut = engine.generate([request], SamplingParams(max_tokens=3))[0]
    assert (cut.tokens, cut.finish) == ((6, 7, 8), "length")
    whole = engine.generate([request], SamplingParams(max_tokens=4))[0]
    assert (whole.tokens, whole.finish) == ((6, 7, 8, END), "stop")


def test_answer_may_fill_the_positions_but_not_exceed_them():
    model = language_model()
    engine, limit = EmbeddedEngine(model, 2), model.max_positions
    prompt = tuple(i % 250 for i in range(limit - 4))
    params = SamplingParams(temperature=0, max_tokens=4)
    done = engine.generate([Request(tokens=prompt, key=0)], params)[0]
    logits = forward_logits(twin(model), (*prompt, *done.tokens))
    assert list(done.tokens) == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    with pytest.raises(RunError, match=r"129 tokens.*limit of 128.*max_answer_tokens"):
        engine.generate([Request(tokens=prompt, key=0)], SamplingParams(max_tokens=5))


@pytest.mark.parametrize("keys", [{}, {"temperature": 0}, {"top_k": 5}, {"repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_the_call_with_their_cause(keys, value):
    """They are found when the host asks for answers, and their rows take no further steps."""
    model, taken = language_model(), []
    model.decoder.norm.weight.data[3] = value
    requests = [Request(tokens=p, key=i) for i, p in enumerate(PROMPTS)]
    engine = EmbeddedEngine(model, slots=3)
    with pytest.raises(RunError, match=r"token 1 of an answer .* logits are not finite\. Its weights"):
        engine.generate(requests, SamplingParams(max_tokens=40, **keys), poll=lambda *_: taken.append(1))
    assert len(taken) == 1


def test_no_requests_give_no_answers():
    assert EmbeddedEngine(language_model(), 2).generate([], SamplingParams()) == []


def test_a_poll_that_raises_abandons_the_work_and_leaves_the_engine_usable():
    engine = EmbeddedEngine(language_model(), 3)
    requests = [Request(tokens=p, key=i) for i, p in enumerate(PROMPTS)]
    params = SamplingParams(max_tokens=12)
    before = engine.generate(requests, params)
    calls = []

    def poll(answers, tokens):
        calls.append(None)
        if len(calls) == 6:
            raise InterruptedError("stop here")

    with pytest.raises(InterruptedError, match="stop here"):
        engine.generate(requests, params, poll=poll)
    assert len(calls) == 6
    assert engine.generate(requests, params) == before


def test_on_token_sees_each_token_of_each_answer_once_and_in_order():
    seen = {i: [] for i in range(len(PROMPTS))}
    done = EmbeddedEngine(language_model(), 2).generate(
        [Request(tokens=p, key=i) for i, p in enumerate(PROMPTS)],
        SamplingParams(max_tokens=20, stop_tokens=STOPS),
        on_token=lambda index, token: seen[index].append(token),
    )
    assert [tuple(seen[i]) for i in seen] == [c.tokens for c in done]
