"""Random numbers by counter: each depends on its key and position alone, never on batch order or worker.

The mixing function is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

import torch
from torch import Tensor

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def key(*parts: int) -> int:
    """One 64-bit key from (seed, step, prompt, sample)."""
    state = 0
    for part in parts:
        state = _mix_int((state + GAMMA + part) & MASK)
    return state


def uniforms(key_B: Tensor, count: int) -> Tensor:
    """[B, count] floats in [0, 1): column t is the draw for position t of the row's key."""
    counter_T = torch.arange(1, count + 1, dtype=torch.int64, device=key_B.device)
    bits_BT = _mix(key_B[:, None] + counter_T * _signed(GAMMA))
    # 23 bits: the product with a float32 total then stays below that total.
    return _shift(bits_BT, 41).to(torch.float32) * 2.0**-23


def keys_tensor(keys: list[int], device: torch.device) -> Tensor:
    """[B] int64 with the bits of the 64-bit keys."""
    return torch.tensor([_signed(k) for k in keys], dtype=torch.int64, device=device)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(MIX_2)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)
