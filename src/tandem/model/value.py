"""Load a model that predicts one value: a critic or a reward model, on one process or on many."""

import copy
from collections.abc import Collection
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from tandem.errors import ConfigError
from tandem.model.attention import NAME
from tandem.model.head import VALUE
from tandem.model.language_model import LanguageModel
from tandem.model.load import (
    DTYPES,
    check_vocabulary,
    describe,
    existing,
    first_line,
    load_tokenizer,
    shapes_in,
    without_dropout,
)

KEY, REWARD_KEY = "critic.path", "reward.model.path"
HEAD, BIAS = f"{VALUE}.weight", f"{VALUE}.bias"


def load_value(
    path: str, dtype: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, trust: bool = False
) -> LanguageModel:
    """The model in a folder, which has a head with one output, or none of that kind: its values then begin at 0."""
    source = check_value(path, tokenizer, trust)
    network = read_network(source, DTYPES[dtype], trust, KEY, optional=frozenset({HEAD}))
    return LanguageModel(network.to(device), tokenizer, source)


def load_reward_model(
    path: str, dtype: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, trust: bool = False
) -> LanguageModel:
    """The model in a folder, which has a head with one output; it is only read."""
    source = check_value(path, tokenizer, trust, REWARD_KEY)
    network = read_network(source, DTYPES[dtype], trust, REWARD_KEY)
    return LanguageModel(network.to(device).requires_grad_(False).eval(), tokenizer, source)


def check_value(path: str, tokenizer: PreTrainedTokenizerBase, trust: bool = False, key: str = KEY) -> str:
    """Where a critic or a reward model, which `key` tells, is read from; ConfigError where it means other texts by its
    tokens than the policy, or where no such model can be made of it. No weight is read."""
    source = existing(path, key)
    check_vocabulary(tokenizer, load_tokenizer(source, trust, key), key, path)
    empty_value(describe(source, trust, key), torch.float32, trust, key)
    if Path(source).is_dir():
        check_head(Path(source), key)
    return source


def check_head(folder: Path, key: str) -> None:
    """ConfigError where the weights of a folder are not those of a sequence classifier with one output. A critic needs
    no head."""
    found = shapes_in(folder, key)
    if HEAD not in found and key == REWARD_KEY:
        raise unfit(key, str(folder), f"has no head ({HEAD})")
    if HEAD in found and found[HEAD][0] != 1:
        raise unfit(key, str(folder), f"has a head ({HEAD}) with {found[HEAD][0]} outputs")
    check_bias(key, str(folder), found)


def value_like(policy: LanguageModel) -> LanguageModel:
    """The policy's layers, any adapter merged, with values of 0. All processes of the policy make it in step."""
    network = empty_value(policy.network.config, policy.network.dtype)
    device = policy.device
    network._apply(lambda t: torch.zeros_like(t, device=device) if t.is_meta else t.to(device))
    model = LanguageModel(network, policy.tokenizer, policy.source)
    model.take_over(policy)
    return model


def empty_value(
    config: PreTrainedConfig, dtype: torch.dtype, trust: bool = False, key: str = KEY
) -> PreTrainedModel:
    """The architecture that goes with a config; its weights have shapes but no storage, its buffers are real."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    try:
        with init_empty_weights(include_buffers=False):
            network = AutoModelForSequenceClassification.from_config(
                config, dtype=dtype, attn_implementation=NAME, trust_remote_code=trust
            )
    except ValueError as cause:
        raise ConfigError(
            f"{key}: no model of values can be made of this one: {first_line(cause)}"
        ) from cause
    return without_dropout(network)


def check_bias(key: str, source: str, names: Collection[str]) -> None:
    """ConfigError where a folder has weights of these names and would not be read whole."""
    if BIAS in names:
        raise unfit(key, source, f"has a head with a bias ({BIAS})")


def unfit(key: str, source: str, what: str) -> ConfigError:
    or_else = ", or a language model" if key == KEY else ""
    return ConfigError(f"{key}={source} {what}; give a sequence classifier with one output{or_else}")


def read_network(
    source: str, dtype: torch.dtype, trust: bool, key: str, optional: frozenset[str] = frozenset()
) -> PreTrainedModel:
    """Weights from safetensors only; every tensor that is not optional must be there, and a head that is not is 0."""
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # It tells of a missing head at length.
    try:
        network, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=1,
            dtype=dtype,
            attn_implementation=NAME,
            use_safetensors=True,
            trust_remote_code=trust,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as cause:
        raise ConfigError(
            f"{key}={source} cannot be loaded as a model of values: {first_line(cause)}"
        ) from cause
    finally:
        logging.set_verbosity(said)
    missing = sorted(set(report["missing_keys"]) - optional)
    if missing:
        raise unfit(key, source, f"lacks {len(missing)} weights: {', '.join(missing[:5])}")
    check_bias(key, source, report["unexpected_keys"])
    if HEAD in report["missing_keys"]:
        torch.nn.init.zeros_(network.score.weight)
    return without_dropout(network)
