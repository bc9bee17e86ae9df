"""The least time that the hardware allows, from bytes moved and operations done.

    a decoding step of B answers at context c  >=  max(W / BW, 2 N B / F) + max(B c K / BW, 4 L h d c B / F)
    prompts                                    >=  2 N_b sum(P) / F, each prompt once
    operations of a GRPO step                   =  sampling + 6 N T + 12 L h d sum(context)

N weights that every token is multiplied by (N_b without the output head), W their bytes, K bytes of keys and values per
token, L layers, h heads of d, F operations per second, BW bytes per second. T counts each prompt and each answer once.
"""

from collections.abc import Sequence

from shape import DTYPE_BYTES, Shape

PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}
"""Dense bf16 operations and bytes per second, by a part of the device's name; from the data sheets."""


def peaks(accelerator: str | None) -> tuple[float, float] | None:
    found = [peak for name, peak in PEAKS.items() if accelerator is not None and name in accelerator]
    return found[0] if found else None


def rollout_seconds(
    shape: Shape, prompts: Sequence[int], answers: int, max_tokens: int, peak: tuple[float, float]
) -> float:
    """Of answers that all have `max_tokens` tokens."""
    flops, bandwidth = peak
    batch = len(prompts) * answers
    n, size = shape.matmul_parameters, DTYPE_BYTES[shape.dtype]
    weights = max(n * size / bandwidth, 2 * n * batch / flops)
    context = sum(prompts) * answers * max_tokens + batch * max_tokens * (max_tokens - 1) // 2
    cache_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * size
    attention = 4 * shape.layers * shape.heads * shape.head_dim
    reading = max(context * cache_bytes / bandwidth, context * attention / flops)
    return max_tokens * weights + reading + 2 * shape.block_parameters * sum(prompts) / flops


def step_operations(shape: Shape, prompts: Sequence[int], answers: int, max_tokens: int) -> float:
    """Of one GRPO step without a reference: sampling, forward and backward."""
    batch = len(prompts) * answers
    tokens = sum(prompts) + batch * max_tokens
    context = sum(p * p // 2 for p in prompts)
    context += sum(prompts) * answers * max_tokens + batch * max_tokens * max_tokens // 2
    attention = 4 * shape.layers * shape.heads * shape.head_dim * context
    return 4 * (2 * shape.matmul_parameters * tokens + attention)
