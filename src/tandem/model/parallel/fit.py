"""Whether a model can be laid out as asked, told from its config alone, before anything is loaded or started."""

from transformers import PreTrainedConfig

from tandem.config.layout import Layout
from tandem.config.sections import Lora
from tandem.errors import ConfigError
from tandem.model.mixture import MIXTURES, is_mixture
from tandem.model.parallel.tensor import COLUMN, ROW, styles

PIPELINED = frozenset({"llama", "mistral", "qwen2", "qwen3", *MIXTURES})
"""Model types whose decoder is an embedding, layers that follow each other, and a norm."""
SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
"""What `tensor` splits."""


def check_fit(layout: Layout, config: PreTrainedConfig, world: int, where: str) -> None:
    """ConfigError where the axes do not give `world` processes or do not divide the model; `where` is the layout's
    key."""
    try:
        layout.sizes(world)
    except ValueError as cause:
        raise ConfigError(f"{where}: {cause}") from None
    _check_pipeline(layout, config, where)
    if layout.expert > 1 and not (is_mixture(config) and config.num_experts % layout.expert == 0):
        none = f"no experts that Tandem can split, as it can those of {', '.join(sorted(MIXTURES))}"
        held = f"{config.num_experts} experts" if is_mixture(config) else none
        raise ConfigError(f"{where}.expert={layout.expert}: the model ({config.model_type}) has {held}")
    for what in SPLIT:
        if getattr(config, what) % layout.tensor:
            raise ConfigError(
                f"{where}.tensor={layout.tensor} does not divide the model's {what}={getattr(config, what)}; "
                "choose a common divisor of heads, key heads, MLP width and vocabulary, or use shard or context"
            )
    heads, split = config.num_attention_heads, layout.tensor * layout.context
    if heads % split:
        products = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(
            f"{where}: tensor={layout.tensor} x context={layout.context} does not divide the model's {heads} attention "
            f"heads; choose them so that their product is one of {products}"
        )
    if layout.tensor > 1 and not config.base_model_tp_plan:
        raise ConfigError(
            f"{where}.tensor={layout.tensor}: {type(config).__name__} carries no plan of how to split its layers; "
            "use shard or context instead"
        )
    odd = sorted(set(styles(config).values()) - {COLUMN, ROW}) if layout.tensor > 1 else []
    if odd:
        raise ConfigError(
            f"{where}.tensor={layout.tensor}: the plan of {type(config).__name__} has parts that are split in ways "
            f"which are not supported ({', '.join(odd)}); use shard or context instead"
        )


def check_adapter(layout: Layout, lora: Lora | None, where: str) -> None:
    """ConfigError where a model with this adapter cannot be laid out so; `where` is the layout's key."""
    if lora is None or layout.tensor == 1:
        return
    if lora.dropout:
        raise ConfigError(
            f"model.lora.dropout={lora.dropout} needs {where}.tensor=1: each part would drop its own"
        )
    outside = [name for name in ("embed_tokens", "lm_head") if name in lora.targets]
    if outside:
        raise ConfigError(
            f"{where}.tensor={layout.tensor}: embedding and output head with an adapter cannot be split; leave "
            f"{' and '.join(outside)} out of model.lora.targets, or use shard instead"
        )


def _check_pipeline(layout: Layout, config: PreTrainedConfig, where: str) -> None:
    if layout.pipeline == 1:
        return
    if config.model_type not in PIPELINED:
        raise ConfigError(
            f"{where}.pipeline={layout.pipeline}: not for models of type {config.model_type}, only for "
            f"{', '.join(sorted(PIPELINED))}; use shard instead"
        )
    try:
        layout.stage_layers(config.num_hidden_layers)
    except ValueError as cause:
        raise ConfigError(f"{where}.pipeline={layout.pipeline}: {cause}") from None
