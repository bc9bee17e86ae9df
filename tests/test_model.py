"""Loading, log-probabilities, adapters, saving: against Transformers' own forward of the same weights."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from tandem.config.sections import Lora, Model
from tandem.engine import EmbeddedEngine, Request, SamplingParams
from tandem.errors import ConfigError, RunError
from tandem.model import LanguageModel, load, load_frozen, token_logprobs
from tandem.model.head import chosen_logprobs
from tandem.model.load import with_adapter, without_dropout
from tandem.model.new import new_tokenizer
from tandem.types import pad
from tiny_models import FAMILIES, SHAPE, forward_logits, language_model, network, twin

CPU = torch.device("cpu")
PLENTY = 1 << 40
LORA = Lora(rank=4, alpha=16.0)


def batch(seed: int = 0, lengths: tuple[int, ...] = (9, 3, 17, 2, 12)):
    """Random rows, of which about half the tokens are marked; padding holds tokens too, to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    length_B = torch.tensor(lengths)
    tokens_BT = torch.randint(250, (len(lengths), max(lengths)), generator=generator)
    mask_BT = torch.rand(tokens_BT.shape, generator=generator) < 0.5
    mask_BT &= torch.arange(max(lengths)) < length_B[:, None]
    mask_BT[:, 0] = False
    mask_BT[torch.arange(len(lengths)), length_B - 1] = True
    return tokens_BT, mask_BT, length_B


def logprobs(model: LanguageModel, rows, temperature: float = 0.7, logits_bytes: int = PLENTY):
    return token_logprobs(model, *rows, temperature=temperature, logits_bytes=logits_bytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_entropy_are_those_of_each_row_alone(family):
    model = language_model(family)
    hf, rows = twin(model), batch()
    logp_BT, entropy_BT = logprobs(model, rows)
    for tokens_T, mask_T, length, logp_T, entropy_T in zip(*rows, logp_BT, entropy_BT):
        logits_TV = forward_logits(hf, tokens_T[:length].tolist()) / 0.7
        for t in range(len(tokens_T)):
            if not mask_T[t]:
                assert logp_T[t] == 0 and entropy_T[t] == 0
                continue
            expected = torch.distributions.Categorical(logits=logits_TV[t - 1])
            assert logp_T[t].item() == pytest.approx(expected.log_prob(tokens_T[t]).item(), abs=1e-5)
            assert entropy_T[t].item() == pytest.approx(expected.entropy().item(), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_pack_do_not_see_each_other_nor_the_padding(family):
    model, (tokens_BT, mask_BT, length_B) = language_model(family), batch()
    before, _ = logprobs(model, (tokens_BT, mask_BT, length_B))
    changed_BT = tokens_BT.clone()
    changed_BT[2] = (changed_BT[2] + 1) % 250
    padding_BT = torch.arange(tokens_BT.shape[1]) >= length_B[:, None]
    changed_BT[padding_BT] = 7
    after, _ = logprobs(model, (changed_BT, mask_BT, length_B))
    others = [0, 1, 3, 4]
    torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=0)
    assert (after[2] - before[2]).abs().max() > 0.1


def test_a_later_token_does_not_change_an_earlier_ones_logprob():
    model, (tokens_BT, mask_BT, length_B) = language_model(), batch(lengths=(12, 12))
    before, _ = logprobs(model, (tokens_BT, mask_BT, length_B))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 8:] += 1
    after, _ = logprobs(model, (changed_BT, mask_BT, length_B))
    torch.testing.assert_close(after[:, :8], before[:, :8], atol=1e-6, rtol=0)
    assert not torch.allclose(after[:, 8:], before[:, 8:])


@pytest.mark.parametrize("logits_bytes", [1, 264 * 4 * 5])
def test_chunked_head_gives_the_same_values_and_gradients(logits_bytes):
    results = []
    for size in (PLENTY, logits_bytes):
        model = language_model()
        logp_BT, entropy_BT = logprobs(model, batch(), logits_bytes=size)
        (logp_BT.sum() + (entropy_BT**2).sum()).backward()
        results.append((logp_BT, entropy_BT, {n: p.grad for n, p in model.trainable().items()}))
    (logp, entropy, grads), (cut_logp, cut_entropy, cut_grads) = results
    torch.testing.assert_close(cut_logp, logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(cut_entropy, entropy, atol=1e-5, rtol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(cut_grads[name], grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_chosen_logprobs_and_their_gradient_are_exact_however_far_logits_are_apart(spread):
    logits_MV = (100 + spread * torch.randn(64, 300)).requires_grad_()
    chosen_M, upstream_M = torch.randint(300, (64,)), torch.randn(64)
    logp_M, entropy_M = chosen_logprobs(logits_MV, chosen_M)
    (dlogits_MV,) = torch.autograd.grad(logp_M, logits_MV, upstream_M, retain_graph=True)
    exact_MV = logits_MV.detach().double().requires_grad_()
    all_MV = exact_MV.log_softmax(-1)
    exact_M = all_MV.gather(-1, chosen_M[:, None]).squeeze(-1)
    torch.testing.assert_close(logp_M.double(), exact_M, atol=1e-4, rtol=1e-6)
    exact_entropy_M = -(all_MV.exp() * all_MV).sum(-1)
    torch.testing.assert_close(entropy_M.double(), exact_entropy_M, atol=2e-4, rtol=0)
    (exact_dlogits_MV,) = torch.autograd.grad(exact_M, exact_MV, upstream_M.double())
    torch.testing.assert_close(dlogits_MV.double(), exact_dlogits_MV, atol=1e-5, rtol=1e-4)
    assert not entropy_M.requires_grad
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(logp_M, logits_MV, upstream_M)


def test_the_entropy_has_a_gradient_where_a_loss_asks_for_it():
    logits_MV, chosen_M = torch.randn(8, 30, dtype=torch.double, requires_grad=True), torch.arange(8)
    assert torch.autograd.gradcheck(lambda x: chosen_logprobs(x, chosen_M, True), logits_MV)


def test_gradients_of_a_pack_are_those_of_a_padded_forward_with_attention_mask():
    model = language_model("qwen3")
    hf, (tokens_BT, mask_BT, length_B) = twin(model), batch()
    logp_BT, _ = logprobs(model, (tokens_BT, mask_BT, length_B), temperature=1.0)
    weight_BT = torch.randn(logp_BT.shape, generator=torch.Generator().manual_seed(1)) * mask_BT
    (logp_BT * weight_BT).sum().backward()
    real_BT = (torch.arange(tokens_BT.shape[1]) < length_B[:, None]).long()
    logits_BTV = hf(input_ids=tokens_BT, attention_mask=real_BT, use_cache=False).logits
    padded_BT = logits_BTV[:, :-1].log_softmax(-1).gather(-1, tokens_BT[:, 1:, None]).squeeze(-1)
    (padded_BT * weight_BT[:, 1:]).sum().backward()
    theirs = dict(hf.named_parameters())
    for name, weight in model.trainable().items():
        torch.testing.assert_close(weight.grad, theirs[name].grad, atol=2e-4, rtol=2e-4, msg=name)


def test_a_mask_on_the_first_token_is_a_programming_error():
    tokens_BT, mask_BT, length_B = batch()
    mask_BT[0, 0] = True
    with pytest.raises(AssertionError, match="first token"):
        logprobs(language_model(), (tokens_BT, mask_BT, length_B))


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder as others would write it."""
    network("qwen2_untied").save_pretrained(tmp_path / "model")
    new_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def opened(folder, **options) -> LanguageModel:
    config = Model(path=str(folder), **options)
    return load(config, new_tokenizer(), CPU)


def test_missing_folder_and_folder_without_a_model_are_named(tmp_path):
    with pytest.raises(ConfigError, match=rf"model\.path={tmp_path}/none does not exist"):
        opened(tmp_path / "none")
    with pytest.raises(ConfigError, match=rf"model\.path={tmp_path} has no config\.json"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        opened("./folder")


def test_missing_weights_are_named(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"lacks 2 weights: model\.layers\.1\.mlp\.up_proj\.weight, model\.norm"
    ):
        opened(folder)


def test_a_head_that_is_missing_from_an_untied_model_is_named(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights: lm_head\.weight"):
        opened(folder)


def test_pickled_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=rf"model\.path={folder} cannot be loaded.*safetensors"):
        opened(folder)


def test_cut_weights_are_refused(folder):
    """As after a download that broke off."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(ConfigError, match=rf"model\.path={folder} cannot be loaded"):
        opened(folder)


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ConfigError, match=rf"model\.path={folder} cannot be loaded"):
        opened(folder)


def test_unknown_architecture_and_broken_config_are_refused(folder):
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ConfigError, match="no_such_model"):
        opened(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        opened(folder)


GEMMA = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CAPPED = {
    "final logits": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, attn_logit_softcapping=None)),
    "attention scores": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, final_logit_softcapping=None)),
    "scaled logits": lambda: GraniteForCausalLM(
        GraniteConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0)
    ),
}


@pytest.mark.parametrize("what", CAPPED)
def test_architectures_that_change_logits_or_scores_are_refused(what, tmp_path):
    """Their probabilities would be silently wrong."""
    CAPPED[what]().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not supported; use a Qwen2"):
        opened(tmp_path)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    model = language_model()
    model.module.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    model.save(tmp_path)
    with pytest.raises(ConfigError, match=r"not finite .*, model\.layers\.1\.mlp\.up_proj\.weight the"):
        opened(tmp_path)


def test_an_architecture_with_learned_positions_works_too(tmp_path):
    """GPT-2 rotates nothing and fuses its projections; only the attention hook is common to it and the others."""
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = opened(tmp_path)
    hf, rows = twin(model), batch()
    logp_BT, _ = logprobs(model, rows, temperature=1.0)
    logits_TV = forward_logits(hf, rows[0][0, :9].tolist())
    assert logp_BT[0, 8].item() == pytest.approx(logits_TV[7].log_softmax(-1)[rows[0][0, 8]].item(), abs=1e-5)


def test_rows_longer_than_a_sliding_window_are_refused():
    """Attention here is over all earlier tokens, which within the window is the same."""
    model = language_model()
    model.network.config.sliding_window = 40
    assert model.max_positions == 40
    request = Request(tokens=(1,) * 30, key=0)
    with pytest.raises(RunError, match="limit of 40"):
        EmbeddedEngine(model, 1).generate([request], SamplingParams(max_tokens=11))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_is_an_ordinary_one_with_the_same_logits(family, tmp_path):
    model = language_model(family)
    model.save(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert other.config._attn_implementation != "tandem"
    assert "tandem" not in (tmp_path / "config.json").read_text()
    tokens = [5, 3, 200, 7, 9, 1]
    torch.testing.assert_close(
        forward_logits(other, tokens), forward_logits(twin(model), tokens), atol=2e-5, rtol=0
    )
    tied = model.network.config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    assert other.config.tie_word_embeddings == tied
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == model.tokenizer.get_vocab()
    back = opened(tmp_path)
    for name, weight in model.network.state_dict().items():
        assert torch.equal(back.network.state_dict()[name], weight), name


def train(model: LanguageModel, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        logp_BT, _ = logprobs(model, batch(), temperature=1.0)
        (-logp_BT.sum() / 20).backward()
        optimizer.step()


def adapted(family: str = "qwen2_grouped", seed: int = 0, resume=None) -> LanguageModel:
    module = with_adapter(network(family), LORA, seed, resume)
    return LanguageModel(module, new_tokenizer(), family)


@pytest.mark.parametrize("family", ["qwen2_tied", "qwen2_untied", "qwen3", "llama"])
def test_adapter_trains_alone_and_switched_off_is_the_base(family):
    model, base = adapted(family), language_model(family)
    before, _ = logprobs(base, batch())
    with torch.no_grad():
        fresh, _ = logprobs(model, batch())
        torch.testing.assert_close(fresh, before, atol=1e-6, rtol=0)
    assert model.trainable() and all(".lora_" in name for name in model.trainable())
    frozen = {n: p.clone() for n, p in model.module.named_parameters() if ".lora_" not in n}
    train(model)
    with torch.no_grad():
        trained, _ = logprobs(model, batch())
        assert (trained - before).abs().max() > 0.05
        with model.base():
            off, _ = logprobs(model, batch())
        again, _ = logprobs(model, batch())
    torch.testing.assert_close(off, before, atol=1e-6, rtol=0)
    assert torch.equal(again, trained)
    for name, weight in model.module.named_parameters():
        assert ".lora_" in name or torch.equal(weight, frozen[name]), name


@pytest.mark.parametrize("family", ["qwen2_tied", "qwen2_untied", "qwen3"])
def test_merged_export_is_base_plus_adapter_and_leaves_the_model_as_it_was(family, tmp_path):
    model = adapted(family)
    train(model)
    with torch.no_grad():
        before, _ = logprobs(model, batch(), temperature=1.0)
    state = {n: p.clone() for n, p in model.module.state_dict().items()}
    model.save_merged(tmp_path)
    for name, weight in model.module.state_dict().items():
        torch.testing.assert_close(weight, state[name], atol=1e-6, rtol=0, msg=name)
    assert not (tmp_path / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sorted(plain.state_dict()) == sorted(network(family).state_dict())
    merged, _ = logprobs(opened(tmp_path), batch(), temperature=1.0)
    torch.testing.assert_close(merged, before, atol=5e-5, rtol=0)
    # By hand: W' = W + alpha / rank * B A.
    name, layer = "model.layers.0.self_attn.q_proj", model.network.model.layers[0].self_attn.q_proj
    added = LORA.alpha / LORA.rank * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = network(family).state_dict()[f"{name}.weight"] + added
    torch.testing.assert_close(plain.state_dict()[f"{name}.weight"], expected, atol=1e-5, rtol=0)


def test_saved_adapter_resumes_to_the_same_logprobs_and_trains_on(tmp_path):
    model = adapted()
    train(model)
    model.save(tmp_path)
    assert sorted(p.suffix for p in tmp_path.glob("adapter_model*")) == [".safetensors"]
    back = adapted(resume=tmp_path)
    with torch.no_grad():
        assert torch.equal(logprobs(back, batch())[0], logprobs(model, batch())[0])
    assert back.trainable().keys() == model.trainable().keys()
    train(model)
    train(back)
    for name, weight in back.trainable().items():
        assert torch.equal(weight, model.trainable()[name]), name


def test_adapter_targets_that_do_not_exist_are_named():
    with pytest.raises(ConfigError, match=r"model\.lora\.targets=\['no_proj'\]"):
        with_adapter(network("llama"), Lora(targets=["no_proj"]), 0, None)


def test_sampler_and_trainer_agree_under_an_adapter():
    model = adapted("qwen3")
    train(model)
    requests = [Request(tokens=(1, 2, 3), key=i) for i in range(4)]
    done = EmbeddedEngine(model, 4).generate(requests, SamplingParams(temperature=0.7, max_tokens=10))
    tokens_BT = pad([(1, 2, 3, *c.tokens) for c in done], torch.long)
    length_B = torch.tensor([3 + len(c.tokens) for c in done])
    mask_BT = pad([[False] * 3 + [True] * len(c.tokens) for c in done], torch.bool, False)
    logp_BT, _ = logprobs(model, (tokens_BT, mask_BT, length_B))
    for row, c in zip(logp_BT, done):
        assert row[3 : 3 + len(c.tokens)].tolist() == pytest.approx(c.policy_logp, abs=1e-5)


def test_bf16_is_kept_and_close_to_float32(folder, tmp_path):
    exact, short = opened(folder), opened(folder, dtype="bf16")
    assert {p.dtype for p in short.network.parameters()} == {torch.bfloat16}
    close, _ = logprobs(exact, batch(), temperature=1.0)
    rough, entropy = logprobs(short, batch(), temperature=1.0)
    assert rough.dtype == entropy.dtype == torch.float32
    assert 0 < (rough - close).abs().max() < 0.15
    short.save(tmp_path / "short")
    weights = load_file(tmp_path / "short" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    for name, weight in exact.network.state_dict().items():
        assert torch.equal(weights[name], weight.bfloat16()), name


def test_frozen_model_has_nothing_to_train(folder):
    frozen = load_frozen(str(folder), "fp32", CPU)
    assert frozen.trainable() == {}
    torch.testing.assert_close(logprobs(frozen, batch())[0], logprobs(opened(folder), batch())[0].detach())


def test_new_model_follows_its_shape_and_seed():
    config = Model(new={"hidden_size": 64, "layers": 3, "heads": 4, "kv_heads": 1, "max_positions": 96})
    made = {seed: load(config, new_tokenizer(), CPU, seed=seed) for seed in (1, 2)}
    again = load(config, new_tokenizer(), CPU, seed=1)
    assert (made[1].layers, made[1].max_positions, made[1].network.config.hidden_size) == (3, 96, 64)
    assert made[1].vocab_size >= len(made[1].tokenizer) and made[1].stop_tokens == {258}
    for name, weight in made[1].network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], weight)
    first, second = (m.network.model.embed_tokens.weight for m in made.values())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("spread", [0.02, 0.1])
def test_a_new_models_weights_are_as_wide_as_asked_for(spread):
    config = Model(
        new={"hidden_size": 64, "layers": 1, "heads": 4, "kv_heads": 4, "initializer_range": spread}
    )
    network = load(config, new_tokenizer(), CPU, seed=0).network
    for name, weight in network.named_parameters():
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(spread, rel=0.05), name


def test_dropout_of_a_models_own_is_off():
    """Else an update would see other log-probabilities than its answers were sampled with."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Dropout(0.1)).train()
    given = torch.randn(3, 4)
    assert torch.equal(without_dropout(module)(given), module[0](given))
