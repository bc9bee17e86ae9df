"""Tiny random models of every family that can be converted, on disk, and what is in folders of weights."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tandem.model.new import new_tokenizer

SHAPE = {
    "vocab_size": 266,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
SPARSE = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "mlp_only_layers": [1]}

MODELS = {
    "qwen2_tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **TIED)),
    "qwen2_untied": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **UNTIED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, **TIED, head_dim=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, **UNTIED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, **UNTIED)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, **UNTIED, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **UNTIED, **SPARSE, head_dim=8)),
    "reward": lambda: Qwen2ForSequenceClassification(Qwen2Config(**SHAPE, **TIED, num_labels=1)),
}


def network(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Every weight is random, norms and biases too."""
    made = MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + (weight.ndim == 1))
    return made.to(dtype).eval()


def saved(folder: Path, name: str, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    network(name, dtype).save_pretrained(folder, max_shard_size=shard)
    new_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """Of a Hugging Face folder, read by the library alone."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def rank_weights(folder: Path, name: str, key: str = "model") -> dict[str, Tensor]:
    """Of one rank of a Megatron checkpoint."""
    path = folder / "release" / name / "model_optim_rng.pt"
    return torch.load(path, weights_only=True)[key]


def rewrite(path: Path, change) -> None:
    """Change what a rank's file holds."""
    content = copy.deepcopy(torch.load(path, weights_only=True))
    change(content)
    torch.save(content, path)


def assert_bytes_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name
