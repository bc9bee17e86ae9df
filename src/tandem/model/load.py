"""Load a Hugging Face folder, or make a small model of one's own, ready to train and to decode."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tandem.config.sections import Lora, Model
from tandem.errors import ConfigError
from tandem.model.attention import NAME
from tandem.model.language_model import LanguageModel
from tandem.model.new import embedding_rows, new_network, new_tokenizer
from tandem.model.place import means_folder, near

if TYPE_CHECKING:
    from peft import PeftModel

REFERENCE_KEY = "reference.path"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
"""What a model's config must say: the engine makes its cache by these, layouts and estimates go by them."""


def tokenizer_of(config: Model) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, without its weights; ConfigError where its folder has those of another kind of model."""
    if config.new is not None:
        return new_tokenizer()
    source = existing(config.path)
    check_speaks(config_in(source, config.trust_remote_code), source)
    return load_tokenizer(source, config.trust_remote_code)


def load(
    config: Model,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    seed: int = 0,
    resume: Path | None = None,
) -> LanguageModel:
    """The policy: weights from `resume` (a checkpoint's model folder) if given, else as the config says."""
    dtype = DTYPES[config.dtype]
    source = "model.new" if config.new is not None else existing(config.path)
    if resume is not None and config.lora is None:
        network = load_network(str(resume), dtype, config.trust_remote_code)
    elif config.new is not None:
        network = new_network(config.new, tokenizer, seed).to(dtype)
    else:
        network = load_network(source, dtype, config.trust_remote_code)
    module: PreTrainedModel | PeftModel = network
    if config.lora is not None:
        module = with_adapter(network, config.lora, seed, resume)
    model = LanguageModel(module.to(device), tokenizer, source)
    model.check_forward()
    return model


def load_frozen(
    path: str, dtype: str, device: torch.device, trust_remote_code: bool = False, key: str = "model.path"
) -> LanguageModel:
    """A model that is only read: a reference; `key` names it in errors."""
    source = existing(path, key)
    network = load_network(source, DTYPES[dtype], trust_remote_code, key).to(device).requires_grad_(False)
    model = LanguageModel(network.eval(), load_tokenizer(source, trust_remote_code, key), source)
    model.check_forward()
    return model


def existing(path: str | None, key: str = "model.path") -> str:
    """A folder with a config.json, or a name to look up on the hub; `key` names it in errors."""
    assert path is not None
    folder = Path(path).expanduser()
    if not means_folder(path):
        return path
    if not (folder / "config.json").is_file():
        what, others = ("has no config.json", "") if folder.is_dir() else ("does not exist", near(folder))
        raise ConfigError(f"{key}={path} {what}; give the folder of a Hugging Face model{others}")
    return str(folder)


def load_tokenizer(
    source: str, trust_remote_code: bool = False, key: str = "model.path"
) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as cause:
        raise ConfigError(f"{key}={source}: the tokenizer cannot be loaded: {first_line(cause)}") from cause


def check_vocabulary(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, key: str, path: str
) -> None:
    """Both models must mean the same text by the same token."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine != other:
        odd = sorted(mine.items() ^ other.items())[:3]
        raise ConfigError(
            f"{key}={path}: its tokenizer has {len(other)} entries and the policy's has {len(mine)}, and they "
            f"differ, for example in {[token for token, _ in odd]}; use a model with the policy's tokenizer"
        )


def vocab_size_of(config: Model, tokenizer: PreTrainedTokenizerBase) -> int:
    """Output rows of the policy, from its description."""
    if config.new is not None:
        return embedding_rows(tokenizer)
    assert config.path is not None
    return int(describe(config.path, config.trust_remote_code).get_text_config().vocab_size)


def check_reference(
    path: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, trust: bool = False
) -> None:
    """ConfigError where a model cannot be the reference of a policy with this tokenizer and so many output rows. No
    weight is read."""
    source = existing(path, REFERENCE_KEY)
    check_vocabulary(tokenizer, load_tokenizer(source, trust, REFERENCE_KEY), REFERENCE_KEY, path)
    config = describe(source, trust, REFERENCE_KEY)
    check_speaks(config, path, REFERENCE_KEY)
    rows = config.get_text_config().vocab_size
    if rows != vocab_size:
        raise ConfigError(
            f"{REFERENCE_KEY}={path} has {rows} output rows and the policy has {vocab_size}: token probabilities "
            "cannot be compared; use a reference of the same family"
        )
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(
                config, attn_implementation=NAME, trust_remote_code=trust
            )
    except ValueError as cause:
        raise ConfigError(
            f"{REFERENCE_KEY}={path} is no causal language model: {first_line(cause)}; give one of the policy's family"
        ) from cause
    if Path(source).is_dir():
        check_output(Path(source), network)


def check_output(folder: Path, network: PreTrainedModel) -> None:
    """ConfigError where a folder has no weights for the output head, as that of a model with another kind of head."""
    there = shapes_in(folder, REFERENCE_KEY)
    head = network.get_output_embeddings().weight
    names = [name for name, weight in network.named_parameters(remove_duplicate=False) if weight is head]
    # One that is the input embedding, too, is there under either name.
    if len(names) == 1 and not any(key.endswith(names[0]) for key in there):
        raise ConfigError(
            f"{REFERENCE_KEY}={folder} has no output head ({names[0]}); give the folder of a causal language model"
        )


def shapes_in(folder: Path, key: str) -> dict[str, list[int]]:
    """Of the tensors in a folder's safetensors, by name, from their headers; ConfigError where there are none."""
    found: dict[str, list[int]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{key}={folder} has no safetensors; give the folder of a Hugging Face model")
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                names = weights.keys()
                found |= {name: weights.get_slice(name).get_shape() for name in names}
        except SafetensorError as cause:
            raise ConfigError(f"{key}={folder}: {file.name} is damaged: {first_line(cause)}") from cause
    return found


def load_network(
    source: str, dtype: torch.dtype, trust_remote_code: bool = False, key: str = "model.path"
) -> PreTrainedModel:
    """Weights from safetensors only; every tensor that the architecture needs must be there."""
    try:
        network, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=NAME,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as cause:
        raise ConfigError(f"{key}={source} cannot be loaded: {first_line(cause)}") from cause
    check_speaks(network.config, source, key)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise ConfigError(
            f"{key}={source} lacks {len(report['missing_keys'])} weights: {missing}; download the folder again"
        )
    return without_dropout(network)


def without_dropout(network: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose updates compute what was computed of its answers before, on any processes."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "jitter_noise"):  # A router's.
            module.jitter_noise = 0.0
    return network


def with_adapter(network: PreTrainedModel, lora: Lora, seed: int, resume: Path | None) -> "PeftModel":
    from peft import LoraConfig, PeftModel, get_peft_model

    if resume is not None:
        return PeftModel.from_pretrained(network, str(resume), is_trainable=True)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # It sets patterns for the experts of a mixture itself, and then remarks that no module of its own has them.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            return get_peft_model(network, config)
    except ValueError as cause:
        raise ConfigError(f"model.lora.targets={lora.targets}: {first_line(cause)}") from cause


def describe(path: str, trust_remote_code: bool = False, key: str = "model.path") -> PreTrainedConfig:
    """The model's config without its weights, for checks before a long start; `key` names it in errors. ConfigError
    where its family is none that Tandem understands."""
    config = config_in(path, trust_remote_code, key)
    text = config.get_text_config()
    absent = [name for name in SIZES if getattr(text, name, None) is None]
    if absent:
        raise ConfigError(
            f"{key}={path}: models of type {config.model_type} are not supported, for their config has no "
            f"{' and no '.join(absent)}; use one of a family that has, such as Qwen2, Qwen3, Llama or Mistral"
        )
    return config


def config_in(path: str, trust_remote_code: bool = False, key: str = "model.path") -> PreTrainedConfig:
    """What a model's config says, of whichever family; `key` names it in errors."""
    try:
        return AutoConfig.from_pretrained(existing(path, key), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as cause:
        raise ConfigError(f"{key}={path}: its config.json cannot be used: {first_line(cause)}") from cause


def check_speaks(config: PreTrainedConfig, path: str, key: str = "model.path") -> None:
    """ConfigError where a model was saved with another head than that of a language model, as by its config: its layers
    would be read, and its head silently left behind or missed."""
    other = [name for name in config.architectures or () if any(head in name for head in OTHER_HEADS)]
    if other:
        raise ConfigError(
            f"{key}={path} is a {other[0]}, which writes no text; give the folder of a causal language model"
        )


OTHER_HEADS = ("Classification", "QuestionAnswering", "Reward")
"""What the architecture of a model that writes no text has in its name."""


def first_line(cause: BaseException) -> str:
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
