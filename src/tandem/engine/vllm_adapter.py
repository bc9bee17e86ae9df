"""Which adapters vLLM takes, told before it starts."""

from typing import Any

import torch

from tandem.config.sections import Lora
from tandem.errors import ConfigError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""
EXPERT = ".experts."
"""In the name of every weight of an expert."""


def check_adapter(lora: Lora, folder: str, mixture: bool) -> None:
    """ConfigError where vLLM cannot apply adapters of this kind to the model in `folder`, in this process or one on
    the same devices; `mixture` where the model has experts."""
    if lora.rank > RANKS[-1]:
        raise ConfigError(f"model.lora.rank={lora.rank}: vLLM takes adapters up to rank {RANKS[-1]}")
    # Whatever layers an adapter is for, vLLM computes the experts with a kernel of a GPU as soon as it takes adapters.
    if mixture and not torch.accelerator.is_available():
        raise ConfigError(
            f"engine.kind=vllm: on a CPU vLLM takes no adapters (model.lora) of a mixture of experts, as "
            f"model.path={folder} is; set engine.kind=embedded, or model.lora=null to train all weights"
        )


def adapter_arguments(lora: Lora) -> dict[str, Any]:
    """What vLLM's `LLM` is started with, so that it takes them."""
    room = next(rank for rank in RANKS if rank >= lora.rank)
    return {"enable_lora": True, "max_lora_rank": room, "max_loras": 1, "max_cpu_loras": 2}
