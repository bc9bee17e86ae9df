"""The reference: another model of the same vocabulary, the policy's copy, or the policy without its adapter."""

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import Qwen2Config, Qwen2ForCausalLM

from tandem.config import Run
from tandem.config.sections import Lora
from tandem.errors import ConfigError
from tandem.learner import Actor, Reference
from tandem.model import LanguageModel
from tandem.model.load import check_vocabulary, with_adapter
from tandem.model.new import new_tokenizer
from tandem.placement.inline import reference_of
from tiny_models import SHAPE, language_model, network, twin
from tiny_step import TEMPERATURE, batch, experience, run


def saved_reference(folder, **shape) -> str:
    config = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, **shape}
    torch.manual_seed(9)
    Qwen2ForCausalLM(Qwen2Config(**config, tie_word_embeddings=True)).save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    return str(folder)


def with_path(settings: Run, path: str) -> Run:
    return settings.model_copy(update={"reference": settings.reference.model_copy(update={"path": path})})


def test_reference_of_another_size_scores_with_its_own_weights(tmp_path):
    path = saved_reference(tmp_path, hidden_size=64, num_hidden_layers=3)
    model, raw = language_model(), batch()
    reference = reference_of(with_path(run(), path), model, None)
    assert reference.model.layers == 3 != model.layers
    logp_BT = reference.logprobs(raw)
    hf = twin(reference.model)
    for row in range(raw.size):
        length = int(raw.length_B[row])
        logits = hf(input_ids=raw.tokens_BT[row : row + 1, :length], use_cache=False).logits[0].detach()
        expected = log_softmax(logits[:-1] / TEMPERATURE, -1).gather(-1, raw.tokens_BT[row, 1:length, None])
        mask_T = raw.mask_BT[row, 1:length]
        torch.testing.assert_close(
            logp_BT[row, 1:length][mask_T], expected.squeeze(-1)[mask_T], atol=1e-5, rtol=0
        )
    assert (logp_BT[~raw.mask_BT] == 0).all()


def test_reference_with_another_vocabulary_is_refused(tmp_path):
    model = language_model()
    wide = saved_reference(tmp_path / "wide", vocab_size=272)
    with pytest.raises(ConfigError, match=r"has 272 output rows and the policy has 264"):
        reference_of(with_path(run(), wide), model, None)
    other = new_tokenizer()
    other.add_tokens(["<extra>"])
    with pytest.raises(ConfigError, match=r"has 264 entries and the policy's has 263.*'<extra>'"):
        check_vocabulary(model.tokenizer, other, "reference.path", "there")
    path = saved_reference(tmp_path / "same_size")
    other.save_pretrained(path)
    with pytest.raises(ConfigError, match=r"reference\.path=.*same_size.*<extra>"):
        reference_of(with_path(run(), path), model, None)
    check_vocabulary(model.tokenizer, new_tokenizer(), "reference.path", "there")


def test_reference_is_the_policy_at_the_start_until_it_is_refreshed():
    settings, raw = run(), batch()
    actor = Actor(language_model(), settings)
    reference = reference_of(settings, actor.model, None)
    start_BT = actor.logprobs(raw)
    assert torch.equal(reference.logprobs(raw), start_BT)
    actor.update([experience(actor)], 0.05)
    moved_BT = actor.logprobs(raw)
    assert (moved_BT - start_BT).abs().max() > 0.01
    assert torch.equal(reference.logprobs(raw), start_BT)
    reference.refresh(actor)
    assert torch.equal(reference.logprobs(raw), moved_BT)
    actor.update([experience(actor)], 0.05)
    assert torch.equal(reference.logprobs(raw), moved_BT), "a copy, not the same tensors"
    assert reference.model.trainable() == {}


def test_reference_of_a_model_with_adapter_is_its_base():
    settings = run(optimizer={"lr": 0.02})
    settings = settings.model_copy(
        update={"model": settings.model.model_copy(update={"lora": Lora(rank=4, alpha=16.0)})}
    )
    base, raw = network("qwen2_grouped"), batch()
    module = with_adapter(base, settings.model.lora, 0, None)
    actor = Actor(LanguageModel(module, new_tokenizer(), "adapted"), settings)
    reference = reference_of(settings, actor.model, None)
    assert reference.model is actor.model, "no second copy of the weights"
    plain = Reference(language_model(), run(), adapter_off=False).logprobs(raw)
    for _ in range(3):
        figures = actor.update([experience(actor)], 0.05)
    assert figures["actor/updates"] == 1
    assert (actor.logprobs(raw) - plain).abs().max() > 0.05
    torch.testing.assert_close(reference.logprobs(raw), plain, atol=1e-5, rtol=0)
