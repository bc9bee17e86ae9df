"""The tensors of a Hugging Face model: their names and shapes, from its config alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tandem.errors import ConfigError

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""Values of `model_type`; Qwen2.5 is qwen2."""

EMBEDDING, NORM, LM_HEAD, REWARD_HEAD = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "score.weight",
)
IGNORED = ("rotary_emb.inv_freq", "masked_bias", "_extra_state")
"""Ends of names that hold no weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes of a decoder; heads of width `head_dim`, `groups` of them for keys and values."""

    hidden: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    feedforward: int
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    """The output head is the embedding."""
    reward: bool = False
    """The output head gives one number per token, a reward or a value."""
    experts: int = 0
    expert_feedforward: int = 0
    expert_layers: frozenset[int] = frozenset()
    mixtral_names: bool = False

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    def head(self) -> str:
        """Name of the tensor that gives the outputs."""
        if self.reward:
            return REWARD_HEAD
        return EMBEDDING if self.tied else LM_HEAD

    def router(self, layer: int) -> str:
        return f"model.layers.{layer}.{'block_sparse_moe' if self.mixtral_names else 'mlp'}.gate.weight"

    def mlp(self, layer: int, expert: int | None = None) -> tuple[str, str, str]:
        """Names of gate, up and down of a layer, or of one of its experts."""
        room = "block_sparse_moe" if self.mixtral_names else "mlp"
        if expert is not None:
            room += f".experts.{expert}"
        words = ("w1", "w3", "w2") if self.mixtral_names else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (f"model.layers.{layer}.{room}.{word}.weight" for word in words)
        return gate, up, down

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model with its shape, in the order of the forward pass."""
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            shapes |= self._attention(layer) | self._feedforward(layer)
        shapes[NORM] = (self.hidden,)
        if self.head() != EMBEDDING:
            shapes[self.head()] = (1 if self.reward else self.vocabulary, self.hidden)
        return shapes

    def _attention(self, layer: int) -> dict[str, tuple[int, ...]]:
        at = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {f"{at}.input_layernorm.weight": (self.hidden,)}
        for letter, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
            name, rows = f"{at}.self_attn.{letter}_proj", heads * self.head_dim
            shapes[f"{name}.weight"] = (rows, self.hidden)
            if self.qkv_bias:
                shapes[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes |= {f"{at}.self_attn.{letter}_norm.weight": (self.head_dim,) for letter in "qk"}
        shapes[f"{at}.self_attn.o_proj.weight"] = (self.hidden, self.heads * self.head_dim)
        shapes[f"{at}.post_attention_layernorm.weight"] = (self.hidden,)
        return shapes

    def _feedforward(self, layer: int) -> dict[str, tuple[int, ...]]:
        if layer not in self.expert_layers:
            return self._gated(self.mlp(layer), self.feedforward)
        shapes: dict[str, tuple[int, ...]] = {self.router(layer): (self.experts, self.hidden)}
        for expert in range(self.experts):
            shapes |= self._gated(self.mlp(layer, expert), self.expert_feedforward)
        return shapes

    def _gated(self, names: tuple[str, str, str], width: int) -> dict[str, tuple[int, ...]]:
        gate, up, down = names
        return {gate: (width, self.hidden), up: (width, self.hidden), down: (self.hidden, width)}


def read_config(folder: Path) -> Any:
    """The Transformers config of a model folder; `ConfigError` for what cannot be converted."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as cause:
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ConfigError(f"{folder / 'config.json'} cannot be used: {reason}") from cause
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{folder / 'config.json'}: model_type {config.model_type!r} cannot be converted; "
            f"supported are {', '.join(FAMILIES)}"
        )
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise ConfigError(
                f"{folder / 'config.json'}: {key}=true means biases that Megatron-Core has no place for; "
                "only models without them can be converted"
            )
    return config


def architecture(config: Any, *, reward: bool) -> Architecture:
    """Sizes from a config that `read_config` accepted; `reward` if the head gives one number."""
    family, heads = config.model_type, config.num_attention_heads
    experts = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}.get(family)
    return Architecture(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        groups=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        feedforward=config.intermediate_size,
        qkv_bias=family == "qwen2",
        qk_norm=family.startswith("qwen3"),
        tied=bool(config.tie_word_embeddings) and not reward,
        reward=reward,
        experts=getattr(config, experts) if experts else 0,
        expert_feedforward=config.moe_intermediate_size
        if family == "qwen3_moe"
        else config.intermediate_size,
        expert_layers=_expert_layers(config),
        mixtral_names=family == "mixtral",
    )


def _expert_layers(config: Any) -> frozenset[int]:
    every = range(config.num_hidden_layers)
    if config.model_type == "mixtral":
        return frozenset(every)
    if config.model_type == "qwen3_moe":
        dense = set(config.mlp_only_layers or ())
        return frozenset(i for i in every if i not in dense and (i + 1) % config.decoder_sparse_step == 0)
    return frozenset()


def check_complete(
    where: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """`ConfigError` that lists what is missing, unexpected or of another shape."""
    problems = [
        _listed("missing", [name for name in wanted if name not in found]),
        _listed("unexpected", [name for name in found if name not in wanted]),
        _listed(
            "of another shape",
            [
                f"{name} {list(found[name])} instead of {list(wanted[name])}"
                for name in wanted
                if name in found and tuple(found[name]) != tuple(wanted[name])
            ],
        ),
    ]
    text = "; ".join(problem for problem in problems if problem)
    if text:
        raise ConfigError(f"{where} does not hold the weights that its config.json asks for: {text}")


def _listed(what: str, names: list[str], most: int = 20) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what}: {', '.join(names[:most])}{more}"
