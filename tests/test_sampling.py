"""Draws: from the distribution that Transformers would draw from, by numbers that are uniform and independent."""

import pytest
import torch

from sampling_truth import SETTINGS, chi_square, chi_square_bound, processors
from tandem.engine import EmbeddedEngine, Request, SamplingParams
from tandem.engine.random import key, keys_tensor, uniforms
from tandem.engine.sampling import choose
from tiny_models import forward_logits, language_model, twin

PROMPT = (3, 1, 4, 1, 5)


@pytest.mark.parametrize("name", SETTINGS)
def test_drawn_distribution_is_that_of_transformers_processors(name):
    """The uniforms are an even grid, so that each token's share of the draws is its probability."""
    params, points = SETTINGS[name], 20_000
    generator = torch.Generator().manual_seed(1)
    for scale in (1.0, 4.0):
        logits_1V = scale * torch.randn(1, 50, generator=generator)
        seen = torch.randint(50, (1, 12), generator=generator)
        seen_1V = torch.zeros(1, 50, dtype=torch.bool).scatter(1, seen, True)
        expected_V = processors(params)(seen, logits_1V).log_softmax(-1)[0]
        penalized = params.repetition_penalty != 1
        token_B, logp_B, policy_logp_B = choose(
            logits_1V.expand(points, -1),
            (torch.arange(points) + 0.5) / points,
            params,
            None,
            seen_1V.expand(points, -1) if penalized else None,
        )
        share_V = torch.bincount(token_B, minlength=50) / points
        torch.testing.assert_close(share_V, expected_V.exp(), atol=2 / points, rtol=0)
        torch.testing.assert_close(logp_B, expected_V[token_B], atol=1e-5, rtol=0)
        policy_V = (logits_1V[0] / params.temperature).log_softmax(-1)
        torch.testing.assert_close(policy_logp_B, policy_V[token_B], atol=1e-6, rtol=0)


def test_first_and_second_tokens_follow_the_model():
    """Frequencies over many keys, against an independent forward; the second token given the first."""
    model = language_model()
    hf, prompt = twin(model), PROMPT
    requests = [Request(tokens=prompt, key=key(5, i)) for i in range(4000)]
    done = EmbeddedEngine(model, 1000).generate(requests, SamplingParams(temperature=0.5, max_tokens=2))
    first = torch.tensor([c.tokens[0] for c in done])
    value, bound = chi_square(first, (forward_logits(hf, prompt)[-1] / 0.5).softmax(-1))
    assert value < bound
    common = int(first.mode().values)
    second = torch.tensor([c.tokens[1] for c in done if c.tokens[0] == common and len(c.tokens) > 1])
    assert len(second) > 200
    value, bound = chi_square(second, (forward_logits(hf, (*prompt, common))[-1] / 0.5).softmax(-1))
    assert value < bound


def test_truncated_frequencies_follow_transformers_processors():
    params = SamplingParams(temperature=0.8, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    generator = torch.Generator().manual_seed(2)
    logits_1V, seen = 2 * torch.randn(1, 40, generator=generator), torch.tensor([[1, 2, 3, 30]])
    expected_V = processors(params)(seen, logits_1V).softmax(-1)[0]
    draws = 20_000
    uniform_B = uniforms(keys_tensor([key(11, 1)], torch.device("cpu")), draws)[0]
    seen_1V = torch.zeros(1, 40, dtype=torch.bool).scatter(1, seen, True)
    drawn, _, _ = choose(logits_1V.expand(draws, -1), uniform_B, params, None, seen_1V.expand(draws, -1))
    assert 1 < int((expected_V > 0).sum()) <= 12
    value, bound = chi_square(drawn, expected_V)
    assert value < bound


def test_uniforms_are_uniform_and_independent():
    """4.9 standard deviations: each bound fails by chance once in a million."""
    keys = keys_tensor(
        [key(0, 0, step, prompt) for step in range(16) for prompt in range(64)], torch.device("cpu")
    )
    drawn = uniforms(keys, 256).double()
    assert drawn.shape == (1024, 256) and drawn.min() >= 0 and drawn.max() < 1
    count, deviation = drawn.numel(), (1 / 12) ** 0.5
    assert abs(drawn.mean() - 0.5) < 4.9 * deviation / count**0.5
    assert abs(drawn.var() - 1 / 12) < 4.9 * (1 / 180) ** 0.5 / count**0.5
    bins = torch.bincount((drawn.flatten() * 128).long(), minlength=128).double()
    expected = count / 128
    assert float(((bins - expected).square() / expected).sum()) < chi_square_bound(127)
    centred = (drawn - 0.5) / deviation
    for one, other in [
        (centred[:, 1:], centred[:, :-1]),  # neighbouring positions of an answer
        (centred[1:], centred[:-1]),  # the same position of neighbouring prompts
        (centred[64:], centred[:-64]),  # the same prompt in neighbouring steps
    ]:
        assert abs((one * other).mean()) < 4.9 / one.numel() ** 0.5
    pairs = ((drawn[:, :-1] * 16).long() * 16 + (drawn[:, 1:] * 16).long()).flatten()
    value, bound = chi_square(pairs[::2], torch.full((256,), 1 / 256))
    assert value < bound
    assert len({tuple(row) for row in drawn.tolist()}) == 1024


def test_uniforms_depend_on_key_and_position_alone():
    keys = keys_tensor([key(1, i) for i in range(5)], torch.device("cpu"))
    whole = uniforms(keys, 40)
    assert torch.equal(uniforms(keys[3:4], 7)[0], whole[3, :7])
    assert torch.equal(uniforms(keys.flip(0), 40), whole.flip(0))


def test_every_part_of_a_key_counts_and_so_does_their_order():
    parts = [(), (0,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**32, 0), (0, 2**32), (7, 3, 5), (7, 5, 3)]
    assert len({key(*p) for p in parts}) == len(parts)
    assert all(0 <= key(*p) < 2**64 for p in parts)
    many = {
        key(s, d, n, p, a)
        for s in range(3)
        for d in range(2)
        for n in range(9)
        for p in range(9)
        for a in range(9)
    }
    assert len(many) == 3 * 2 * 9**3
