"""Load a model that predicts one value: a critic, on one process or on many."""

import copy
from collections.abc import Collection

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
from tandem.model.load import DTYPES, check_vocabulary, existing, first_line, load_tokenizer

KEY = "critic.path"
HEAD = f"{VALUE}.weight"


def load_value(
    path: str, dtype: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, trust: bool = False
) -> LanguageModel:
    """The model in a folder, which has a head with one output, or none of that kind: its values then begin at 0."""
    source = existing(path, KEY)
    check_vocabulary(tokenizer, load_tokenizer(source, trust, KEY), KEY, path)
    network = read_network(source, DTYPES[dtype], trust)
    return LanguageModel(network.to(device), tokenizer, source)


def value_like(policy: LanguageModel) -> LanguageModel:
    """The policy's layers, any adapter merged, with values of 0. All processes of the policy make it in step."""
    network = empty_value(policy.network.config, policy.network.dtype)
    device = policy.device
    network._apply(lambda t: torch.zeros_like(t, device=device) if t.is_meta else t.to(device))
    model = LanguageModel(network, policy.tokenizer, policy.source)
    model.take_over(policy)
    return model


def empty_value(config: PreTrainedConfig, dtype: torch.dtype, trust: bool = False) -> PreTrainedModel:
    """The architecture that goes with a config; its weights have shapes but no storage, its buffers are real."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForSequenceClassification.from_config(
                config, dtype=dtype, attn_implementation=NAME, trust_remote_code=trust
            )
    except ValueError as cause:
        raise ConfigError(f"{KEY}: no critic can be made of this model: {first_line(cause)}") from cause


def check_head(source: str, names: Collection[str]) -> None:
    """ConfigError where a folder has weights of these names and would not be read whole."""
    if f"{VALUE}.bias" in names:
        raise unfit(source, "has a head with a bias")


def unfit(source: str, what: str) -> ConfigError:
    return ConfigError(
        f"{KEY}={source} {what}; give a sequence classifier with one output, or a language model"
    )


def read_network(source: str, dtype: torch.dtype, trust: bool) -> PreTrainedModel:
    """Weights from safetensors only; every tensor but the head must be there."""
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
            f"{KEY}={source} cannot be loaded as a model of values: {first_line(cause)}"
        ) from cause
    finally:
        logging.set_verbosity(said)
    missing = sorted(set(report["missing_keys"]) - {HEAD})
    if missing:
        raise unfit(source, f"lacks {len(missing)} weights: {', '.join(missing[:5])}")
    check_head(source, report["unexpected_keys"])
    if HEAD in report["missing_keys"]:
        torch.nn.init.zeros_(network.score.weight)
    return network
