"""Whether a model can be laid out as asked, told from its config alone, before anything is loaded or started."""

from transformers import PreTrainedConfig

from tandem.config.layout import Layout
from tandem.errors import ConfigError
from tandem.model.mixture import MIXTURES, is_mixture

PIPELINED = frozenset({"llama", "qwen2", "qwen3", *MIXTURES})
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
        held = f"{config.num_experts} experts" if is_mixture(config) else "no experts that Tandem can split"
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
