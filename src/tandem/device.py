"""The one module that knows device names: pick one, wait for it, ask its memory, set its threads."""

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from tandem.errors import ConfigError

CPUS = Path("/proc/cpuinfo")
INTEL = "GenuineIntel"


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


def free_host_bytes() -> int:
    """Host memory that can still be taken: what the machine has, or less where a control group sets a limit."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return available
    if limit == "max":
        return available
    # File cache that nobody uses counts as used and is given back when memory is short.
    return min(available, int(limit) - used + int(stat["inactive_file"]))


def give_back(device: torch.device) -> None:
    """Let other processes have the memory that no tensor uses; the CPU keeps none."""
    if device.type != "cpu":
        synchronize(device)
        torch.accelerator.empty_cache()


def describe(device: torch.device) -> str:
    """Name for reports."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


def captures(device: torch.device) -> bool:
    """Work on the device can be captured once and replayed, which spares the host's part in it."""
    return device.type == "cuda"


Graph = torch.cuda.CUDAGraph


def graph_pool() -> tuple[int, int]:
    """Memory that graphs share which never run at the same time."""
    return torch.cuda.graph_pool_handle()


def capture(step: Callable[[], None], state: Sequence[Tensor], pool: tuple[int, int]) -> Graph:
    """A graph of the step, which has to run once before; `state` is put back to what it was."""
    saved = [tensor.clone() for tensor in state]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    for tensor, old in zip(state, saved):
        tensor.copy_(old)
    graph = Graph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph


def wide_vectors() -> bool:
    """The CPU has AVX-512 and PyTorch was built with oneDNN."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


@cache
def idle_vectors() -> bool:
    """PyTorch's own float32 products leave the CPU's AVX-512 idle: MKL takes it on Intel's CPUs only."""
    told = CPUS.read_text(encoding="utf-8") if CPUS.is_file() else platform.processor()
    return wide_vectors() and INTEL not in told


def set_threads(threads: int | None) -> int:
    """CPU threads for tensor work: the cores this process may use unless given. Returns the number set."""
    threads = threads or cores()
    torch.set_num_threads(threads)
    keep_freed_memory()
    return threads


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Tensors of one micro-batch are laid where those of the last one lay: fresh pages are slow to come by.

    By default glibc gives each large block back to the system when it is freed.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        # The threshold is the highest that glibc takes.
        for parameter, value in ((M_MMAP_THRESHOLD, 32 * 2**20), (M_TRIM_THRESHOLD, 2**30)):
            libc.mallopt(parameter, value)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of malloc.h."""
