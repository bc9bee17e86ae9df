"""Tiny random models of each supported family and a sequence classifier, their twins with Transformers' own attention,
and a scripted one."""

import copy
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tandem.model import LanguageModel
from tandem.model.attention import NAME
from tandem.model.new import new_tokenizer

VOCABULARY = 264
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "attn_implementation": NAME,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
}

FAMILIES = {
    "qwen2_tied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen2_untied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)
    ),
    "qwen2_grouped": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=False)
    ),
}
OTHERS = {
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    ),
}
"""Nothing is written for these in particular: what Transformers says of them is all that is known."""


def network(family: str, seed: int = 0) -> PreTrainedModel:
    return randomized({**FAMILIES, **OTHERS}[family](), seed)


def randomized(made: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Every weight is random, biases and norms too, and large enough that each one moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(1 + 0.3 * noise if is_norm else 0.25 * noise)
    return made.eval()


def language_model(family: str = "qwen2_grouped", seed: int = 0) -> LanguageModel:
    return LanguageModel(network(family, seed), new_tokenizer(), family)


def classifier(folder: Path) -> Path:
    """A folder with a sequence classifier of one output, of another shape than the language models."""
    config = FAMILIES["qwen2_grouped"]().config
    config.intermediate_size, config.num_labels = 64, 1
    randomized(Qwen2ForSequenceClassification(config), seed=4).save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    return folder


def spoiled(source: Path, target: Path, change: str) -> None:
    """A copy of a classifier's folder with one thing wrong."""
    copytree(source, target)
    file = target / "model.safetensors"
    weights = load_file(file)
    match change:
        case "headless":
            del weights["score.weight"]
        case "labels":
            weights["score.weight"] = weights["score.weight"].repeat(2, 1)
        case "bias":
            weights["score.bias"] = torch.zeros(1)
        case "half":
            del weights["model.norm.weight"]
        case "words":
            odd = new_tokenizer()
            odd.add_tokens(["one more"])
            odd.save_pretrained(target)
    save_file(weights, file, metadata={"format": "pt"})
    if change == "torn":
        file.write_bytes(b"torn")


def row_scores(folder: Path, rows: Sequence[Sequence[int]]) -> list[float]:
    """What the classifier in a folder says at the last token of each row, alone, with Transformers' own attention."""
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = [theirs.model(torch.tensor([list(row)])).last_hidden_state[:, -1] for row in rows]
        return [float(theirs.score(last_1H)) for last_1H in hidden]


def twin(model: LanguageModel) -> PreTrainedModel:
    """The same weights under Transformers' eager attention and masks: shares none of Tandem's forward code."""
    other = type(model.network)(copy.deepcopy(model.network.config))
    other.load_state_dict(model.network.state_dict())
    other.to(model.network.dtype).eval().set_attn_implementation("eager")
    assert other.config._attn_implementation == "eager"
    return other


def chain(rules: dict[int, dict[int, float]], max_positions: int = 128, layers: int = 2) -> LanguageModel:
    """A network whose next token depends on the last one alone: `rules[last][next]` is a probability.

    Attention and MLP add nothing, embeddings are unit vectors, so the output head is the table of log-probabilities.
    """
    shape = {
        **SHAPE,
        "hidden_size": VOCABULARY,
        "max_position_embeddings": max_positions,
        "num_hidden_layers": layers,
    }
    config = Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    made = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        made.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
    model = LanguageModel(made, new_tokenizer(), "chain")
    rewrite(model, rules)
    return model


def rewrite(model: LanguageModel, rules: dict[int, dict[int, float]]) -> None:
    """New rules for a `chain`, written into the same weights."""
    table = torch.full((VOCABULARY, VOCABULARY), -60.0)
    for last, following in rules.items():
        for token, probability in following.items():
            table[token, last] = torch.tensor(probability).log()
    norm = model.network.model.norm.variance_epsilon
    gain = torch.rsqrt(torch.tensor(1 / VOCABULARY + norm))
    with torch.no_grad():
        model.network.lm_head.weight.copy_(table / gain)


def spelled(model: LanguageModel, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_special_tokens=False)


def script(text_tokens: list[int], end: int) -> dict[int, dict[int, float]]:
    """Rules under which each token of a text (no token twice) is followed by the next, the last by `end`."""
    assert len({*text_tokens, end}) == len(text_tokens) + 1
    return {last: {following: 1.0} for last, following in zip(text_tokens, [*text_tokens[1:], end])}


def forward_logits(hf: PreTrainedModel, tokens: list[int] | tuple[int, ...]) -> Tensor:
    """[T, V] of one sequence alone."""
    with torch.no_grad():
        return hf(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float()
