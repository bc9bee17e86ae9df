"""The one module that knows device names: pick one, wait for it, ask its memory, set its threads."""

import os

import torch

from tandem.errors import ConfigError


def pick(name: str) -> torch.device:
    """The device of a run: `auto` is the accelerator if there is one, else the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as cause:
        reason = str(cause).splitlines()[0]
        raise ConfigError(f"device={name!r} cannot be used here ({reason}); use `auto` or `cpu`") from None
    return device


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work; the CPU has none."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def allocated_bytes(device: torch.device) -> int:
    """Peak bytes of tensors on the accelerator since the start; 0 on the CPU."""
    return 0 if device.type == "cpu" else int(torch.accelerator.max_memory_allocated(device))


def free_bytes(device: torch.device) -> int | None:
    """Memory that the accelerator has left; None where tensors lie in the memory of the host."""
    return None if device.type == "cpu" else int(torch.accelerator.get_memory_info(device)[0])


def describe(device: torch.device) -> str:
    """Name for reports."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


def set_threads(threads: int | None) -> int:
    """CPU threads for tensor work: the cores this process may use unless given. Returns the number set."""
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    return threads
