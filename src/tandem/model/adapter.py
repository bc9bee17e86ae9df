"""What PEFT has put around a model, told without importing PEFT: a start is shorter where there is no adapter."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from peft import PeftConfig


def adapter_of(module: nn.Module) -> "PeftConfig | None":
    """The settings of the adapter around a model (`PeftModel`); None where there is none."""
    return module.peft_config["default"] if hasattr(module, "get_base_model") else None


def is_adapted(layer: nn.Module) -> bool:
    """Whether it stands around a layer, or around a weight, and adds an adapter's part to it (`LoraLayer`)."""
    return hasattr(layer, "lora_A")


def adapts_weight(layer: nn.Module) -> bool:
    """Whether it stands around a weight that is no linear layer's, called `parameter_name` (`ParamWrapper`)."""
    return is_adapted(layer) and hasattr(layer, "parameter_name")
