"""The decoder written out for sampling is the model's own decoder, on the model's own weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from tandem.engine import EmbeddedEngine, Request, SamplingParams
from tandem.model import LanguageModel
from tandem.model import product as products
from tandem.model.attention import Rows
from tandem.model.compiled import compile_blocks
from tandem.model.fused import Fused, sampling_forward
from tandem.model.new import new_tokenizer
from tiny_models import FAMILIES, SHAPE, VOCABULARY, language_model, network

LENGTHS = (5, 17, 1, 9)


def line():
    rows = Rows(torch.tensor(LENGTHS))
    return torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)), rows


@torch.no_grad()
def both(model, at_once=1):
    """Hidden states of the written-out decoder, made for so many rows at once, and of the model's own."""
    tokens_N, rows = line()
    forward = sampling_forward(model, 32, at_once)
    assert isinstance(forward, Fused)
    return forward.hidden(tokens_N, rows.position_N, rows), model.hidden(tokens_N, rows.position_N, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_model(family):
    ours_NH, theirs_NH = both(language_model(family))
    torch.testing.assert_close(ours_NH, theirs_NH, atol=2e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_weights_laid_out_numbers_stay_the_same(family, intel, monkeypatch):
    """By oneDNN, and in the order of MKL where that has AVX-512."""
    monkeypatch.setattr(products, "wide_vectors", lambda: intel)
    monkeypatch.setattr(products, "idle_vectors", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = language_model(family)
    tokens_N, rows = line()
    laid, plain = sampling_forward(model, 32, 64), sampling_forward(model, 32, 1)
    ours, theirs = laid.layers[0].down.weight, plain.layers[0].down.weight
    assert (ours.is_mkldnn, theirs.is_mkldnn) == (not intel, False)
    assert theirs.is_contiguous() and (ours.t() if intel else ours).is_contiguous()
    with torch.no_grad():
        ours_NH, theirs_NH = (each.hidden(tokens_N, rows.position_N, rows) for each in (laid, plain))
        torch.testing.assert_close(ours_NH, theirs_NH, atol=2e-5, rtol=1e-5)
        for each in (laid, plain):
            torch.testing.assert_close(each.logits(ours_NH), model.logits(ours_NH), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(*both(model, 64), atol=2e-5, rtol=1e-5)


def test_a_call_of_the_engine_sees_the_weights_as_they_are():
    """The copy that it lays out ends with it."""
    model = language_model()
    engine, params = EmbeddedEngine(model, 16), SamplingParams(max_tokens=6)
    requests = [Request(tokens=(5, 6, 7 + i), key=i) for i in range(16)]
    engine.generate(requests, params)
    with torch.no_grad():
        for weight in model.network.parameters():
            weight.mul_(1.1)
    changed = engine.generate(requests, params)
    fresh = EmbeddedEngine(model, 16).generate(requests, params)
    assert changed == fresh
    for request, done in zip(requests, changed):
        row = torch.tensor([*request.tokens, *done.tokens])
        logp_TV = (
            model.network(input_ids=row[None], layout=Rows(torch.tensor([len(row)])))
            .logits[0]
            .log_softmax(-1)
        )
        exact = [logp_TV[t - 1, row[t]].item() for t in range(len(request.tokens), len(row))]
        assert done.logp == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen2_grouped", "qwen3"])
def test_in_bf16_they_differ_by_rounding_alone(family):
    exact_NH, _ = both(language_model(family))
    model = language_model(family)
    model.network.to(torch.bfloat16)
    ours_NH, theirs_NH = both(model)
    assert ours_NH.dtype == torch.bfloat16
    ours, theirs = (ours_NH.float() - exact_NH).norm(), (theirs_NH.float() - exact_NH).norm()
    assert ours < 1.2 * theirs, "no farther from the exact values than the model's own forward"


def test_adapters_act():
    model = language_model()
    before_NH, _ = both(model)
    module = get_peft_model(model.network, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted = LanguageModel(module, model.tokenizer, "adapted")
    ours_NH, theirs_NH = both(adapted)
    torch.testing.assert_close(ours_NH, theirs_NH, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(ours_NH, before_NH, atol=1e-2)
    with adapted.base():
        torch.testing.assert_close(both(adapted)[0], before_NH, atol=2e-5, rtol=1e-5)


def test_joined_weights_are_the_same_parameters_in_one_storage():
    model = language_model()
    parameters = dict(model.network.named_parameters())
    values = copy.deepcopy(model.network.state_dict())
    with torch.inference_mode():
        sampling_forward(model, 32, 1)
    assert dict(model.network.named_parameters()) == parameters
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, values[name])
    attention = model.network.model.layers[0].self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert len({p.weight.untyped_storage().data_ptr() for p in projections}) == 1
    place = attention.q_proj.weight.data_ptr()
    sampling_forward(model, 32, 1)
    assert attention.q_proj.weight.data_ptr() == place, "joined once"


def test_weights_that_change_in_place_or_move_are_seen():
    model = language_model()
    tokens_N, rows = line()
    forward = sampling_forward(model, 32, 1)
    with torch.no_grad():
        for _ in range(2):
            for weight in model.network.parameters():
                weight.add_(0.1)
            torch.testing.assert_close(
                forward.hidden(tokens_N, rows.position_N, rows), model.hidden(tokens_N, rows.position_N, rows)
            )
    for weight in model.network.parameters():
        weight.data = weight.data.clone() * 0.7
    torch.testing.assert_close(*both(model), atol=2e-5, rtol=1e-5)


def test_training_goes_on_after_weights_were_joined():
    plain, model = language_model(seed=3), language_model(seed=3)
    with torch.inference_mode():
        sampling_forward(model, 32, 1)
    tokens_N, rows = line()
    for one in (plain, model):
        optimizer = torch.optim.AdamW(one.network.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            one.logits(one.hidden(tokens_N, rows.position_N, rows)).log_softmax(-1)[:, 7].sum().backward()
            optimizer.step()
    for (name, weight), other in zip(model.network.named_parameters(), plain.network.parameters()):
        assert torch.equal(weight, other), name


def test_joined_weights_are_saved_whole(tmp_path):
    model = language_model("qwen3", seed=5)
    sampling_forward(model, 32, 1)
    model.save(tmp_path)
    loaded = type(model.network).from_pretrained(tmp_path)
    expected = network("qwen3", seed=5).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_an_unknown_decoder_runs_as_it_is():
    shape = MistralConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2, sliding_window=None)
    model = LanguageModel(MistralForCausalLM(shape).eval(), new_tokenizer(), "mistral")
    assert sampling_forward(model, 32, 64) is model


def test_compiled_blocks_leave_values_and_gradients_unchanged():
    plain, model = language_model("qwen3"), language_model("qwen3")
    assert compile_blocks(model, backend="aot_eager") == 3 * model.layers
    gradients = []
    for one in (plain, model):
        for length in (20, 33):
            rows = Rows(torch.tensor([length]))
            one.hidden(torch.arange(length), rows.position_N, rows)[:, 3].sum().backward()
        gradients.append({name: p.grad for name, p in one.network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
