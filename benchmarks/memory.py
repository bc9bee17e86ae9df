"""The peak memory of a contender's own process, above what its imports and the loaded model take.

On Linux it is VmHWM of /proc: `ru_maxrss` survives exec, so that a child begins with the peak of the process that
started it. Writing 5 to clear_refs starts VmHWM anew. Elsewhere it is `ru_maxrss`. On an accelerator it is the peak of
allocated tensors.
"""

import re
import resource
import sys
from pathlib import Path

MIB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Watch:
    """Starts when the model is loaded; `report` says what came on top."""

    def __init__(self, device: str) -> None:
        import psutil

        self.device = device
        self.process = psutil.Process()
        self.loaded = self.process.memory_info().rss
        self.allocated = 0
        if CLEAR.exists():
            CLEAR.write_text("5")
        if device != "cpu":
            import torch

            torch.accelerator.reset_peak_memory_stats()
            self.allocated = torch.accelerator.memory_allocated()

    def report(self) -> dict[str, float]:
        """MiB: the process with imports and model, its peak since, the difference, and its child processes."""
        children = sum(child.memory_info().rss for child in self.process.children(recursive=True))
        figures = {
            "loaded_mb": self.loaded / MIB,
            "peak_mb": peak_bytes() / MIB,
            "step_mb": (peak_bytes() - self.loaded) / MIB,
            "children_mb": children / MIB,
        }
        if self.device != "cpu":
            import torch

            figures["device_step_mb"] = (torch.accelerator.max_memory_allocated() - self.allocated) / MIB
        return {name: round(value, 1) for name, value in figures.items()}


def peak_bytes() -> int:
    """Highest resident size of this process."""
    if STATUS.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        if found is not None:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
