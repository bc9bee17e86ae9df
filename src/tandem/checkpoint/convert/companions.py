"""What goes along with the weights: config, tokenizer, and the arguments with which Megatron is started."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tandem.checkpoint.convert.architecture import Architecture
from tandem.checkpoint.convert.document import read_object
from tandem.checkpoint.convert.experts import Experts
from tandem.checkpoint.convert.layout import Layout
from tandem.checkpoint.jsonfile import write_json

ARGUMENTS = "megatron_arguments.json"
_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""All but the factor of Megatron's one kind of scaled positions."""
WORDS = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def copy_companions(origin: Path, folder: Path, model: Architecture, dtype: torch.dtype) -> None:
    """Config and tokenizer of `origin`, the config with the type and the head that the weights really have."""
    for name in _COPIED:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    config = read_object(origin / "config.json")
    changed = config | {"torch_dtype" if "torch_dtype" in config else "dtype": WORDS[dtype]}
    ends = ("ForCausalLM", "ForSequenceClassification")
    given = config.get("architectures") or []
    changed["architectures"] = [name.replace(ends[not model.reward], ends[model.reward]) for name in given]
    if model.reward:
        changed |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    write_json(folder / "config.json", changed)


def write_arguments(
    folder: Path, config: Any, model: Architecture, layout: Layout, dtype: torch.dtype
) -> None:
    """Megatron's own names and values that go with the weights, as plain JSON."""
    counts = [[len(chunk) for chunk in stage] for stage in layout.stages]
    values = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.feedforward,
        "num_attention_heads": model.heads,
        "group_query_attention": model.groups < model.heads,
        "num_query_groups": model.groups,
        "kv_channels": model.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": _whole(config.rope_parameters["rope_theta"]),
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "padded_vocab_size": layout.vocabulary,
        "untie_embeddings_and_output_weights": not model.tied,
        "params_dtype": WORDS[dtype],
        "transformer_impl": "transformer_engine" if layout.fused_norms else "local",
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "layers_per_stage": counts,
    }
    values |= rope_scaling(config.rope_parameters)
    if layout.virtual > 1:
        values["num_layers_per_virtual_pipeline_stage"] = counts[0][0]
    if model.expert_layers:
        values |= {
            "num_experts": model.experts,
            "moe_ffn_hidden_size": model.expert_feedforward,
            "moe_router_topk": config.num_experts_per_tok,
            # Shares of all experts, or of the chosen ones alone.
            "moe_router_pre_softmax": config.model_type == "qwen3_moe" and not config.norm_topk_prob,
            "moe_layer_freq": [int(i in model.expert_layers) for i in range(model.layers)],
            "moe_grouped_gemm": layout.experts is not Experts.APART,
            "moe_use_legacy_grouped_gemm": layout.experts is Experts.FUSED,
            "expert_model_parallel_size": layout.expert,
            "expert_tensor_parallel_size": layout.expert_tensor,
        }
    write_json(folder / ARGUMENTS, values)


def rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Of positions, what Megatron has a name for: Llama 3's scaling with its usual bounds. Any other is kept as
    Transformers writes it, for whoever starts Megatron."""
    if rope.get("rope_type", "default") == "default":
        return {}
    if all(rope.get(name) == value for name, value in LLAMA3.items()):
        return {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    return {"rope_parameters": dict(rope)}


def _whole(number: float) -> float:
    """As an integer where it is one: Megatron's argument takes no other."""
    return int(number) if number == int(number) else number
