"""Runs placed with Ray as a user starts them, what they leave behind, and the processes they consist of."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from small_recipe import environment
from tandem.journal import read_metrics, repeatable

RAY = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
RECIPES = Path(__file__).parents[1] / "recipes" / "runs"
LOG = re.compile(r"node (\w+) at .* pid (\d+)")
PID = re.compile(r"tandem\.worker (\w+)-(\d+): .* pid (\d+)")
SMALL = {
    "steps": 20,
    "threads": 1,
    "data": {"eval": "tandem:addition:test", "limit": 200},
    "eval": {"every": 10, "questions": 8, "answers": 2},
    "algorithm": {"kl": {"coef": 0.05}},
    "checkpoint": {"every": None},
    "journal": {"samples": 0, "sinks": ["jsonl"]},
}
"""Over the recipe of `small_recipe`: with a reference and evaluation."""
IMPATIENT_RAY = {"RAY_NUM_REDIS_GET_RETRIES": "2"}
"""Each of which takes a second; it tries as often where it is refused."""
ENDS_S = 300
"""Longest wait for a run to end: its processes start within seconds or, beside other work, within minutes."""
CALLER = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False)
except ConnectionError:
    print("refused")
else:
    print("in")
"""


def small(folder: Path, **more) -> list[str]:
    """Overrides under which a recipe of the project is done in seconds, and still what it is."""
    values = {
        "run_dir": str(folder / "run"),
        "steps": 3,
        "sampling.prompts_per_step": 4,
        "sampling.answers_per_prompt": 4,
        "sampling.max_answer_tokens": 12,
        "eval.every": "null",
        "journal.sinks": "[jsonl]",
        "journal.samples": 0,
        "placement.cpus": 1,
        "threads": 1,
    }
    return [f"{key}={value}" for key, value in (values | more).items()]


def trajectory(folder: Path) -> list[dict[str, Any]]:
    """All that the journal says which no clock decides. A reward function of the test's own has its folder in its
    name."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k == "step" or (repeatable(k) and ":" not in k)} for row in rows]


def pids(folder: Path, role: str) -> list[int]:
    """Of the processes that had a role so far, the latest of each rank last."""
    found = []
    for log in sorted((folder / "logs").glob(f"{role}-*.log")):
        found += [int(match[3]) for match in PID.finditer(log.read_text())]
    return found


def caller(address: str, environ: dict[str, str]) -> str:
    """What a process hears that calls the Ray at this address: in, or refused."""
    command = [sys.executable, "-c", CALLER, address]
    called = subprocess.run(
        command, env=environ | IMPATIENT_RAY, capture_output=True, text=True, timeout=60, check=True
    )
    return called.stdout.strip()


def wait_until(what: str, holds: Any, seconds: float = ENDS_S) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:g} s until {what}"
        time.sleep(0.1)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return sum(1 for row in read_metrics(path) if "reward/mean" in row) if path.exists() else 0


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def alive(processes: list[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        except psutil.NoSuchProcess:
            continue
    return found


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def hanging(monkeypatch) -> Callable[[int], None]:
    """What stops an engine's process as if it hung. Its time is up at once, that of the others is not: no clock
    decides what a test sees."""
    from tandem.placement.cluster.engines import Engines

    hung, tend = set(), Engines._tend

    def hurried(self):
        for seat in self.seats:
            if seat.worker is not None and process(seat.worker) in hung:
                if seat.taking is not None:
                    seat.taking[0].began -= self.placement.engine_timeout_s
                if seat.work is not None:
                    seat.work.changed -= self.placement.engine_timeout_s
        tend(self)

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        hung.add(pid)

    monkeypatch.setattr(Engines, "_tend", hurried)
    return stop


def process(worker: Any) -> int | None:
    """That of a worker whose place is known."""
    found = re.search(r"pid (\d+)$", worker.place)
    return int(found[1]) if found else None


class JoinedNodes:
    """Ray nodes on this machine, started with the commands of docs/cluster.md and the given sizes, the head first."""

    def __init__(self, folder: Path, *sizes: str, port: int = 6399) -> None:
        self.sizes, self.port, self.address = sizes, port, ""
        self._nodes: list[subprocess.Popen[str]] = []
        (folder / "token").write_text("a" * 64)
        self.environ = environment() | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_TMPDIR": "/tmp",
            "RAY_prestart_worker_first_driver": "0",
            # A node that is gone is missed after seconds instead of a quarter of a minute.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
        }

    def __enter__(self) -> "JoinedNodes":
        try:
            said = self.start("--head", f"--port={self.port}", "--include-dashboard=false", self.sizes[0])
            found = re.search(r"--address='([\d.]+:\d+)'", said)
            assert found, said
            self.address = found[1]
            for size in self.sizes[1:]:
                self.start(f"--address={self.address}", size)
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End these nodes and no other ones."""
        processes = [process for node in self._nodes for process in children(node.pid)]
        for process in [*self._nodes, *processes]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self._nodes:
            node.wait()

    def start(self, *words: str, within: Sequence[str] = ()) -> str:
        """One more node, until it runs; it stays a child of this process. `within` are the words of a command that
        runs others."""
        command = [
            *within,
            RAY,
            "start",
            "--block",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
            *words,
        ]
        node = subprocess.Popen(
            command, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._nodes.append(node)
        assert node.stdout is not None
        said = ""
        for line in node.stdout:
            said += line
            if "block forever" in line:
                break
        assert "block forever" in said, said
        return said


def children(pid: int) -> list[psutil.Process]:
    """All below a process; none where it is gone."""
    return psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []


@contextmanager
def driver(
    nodes: JoinedNodes, said: Path, *command: object, folder: Path | None = None, **environ: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of Python in that cluster; what it prints goes to a file."""
    with said.open("w") as output:
        words = [sys.executable, *map(str, command)]
        process = subprocess.Popen(
            words, env=nodes.environ | environ, stdout=output, stderr=subprocess.STDOUT, cwd=folder
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def text(said: Path) -> str:
    """Without line breaks."""
    return " ".join(said.read_text().split())


def places(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Node and process of each worker's lives."""
    logs = (folder / "run" / "logs").glob("*.log")
    return {log.stem: [(n, int(pid)) for n, pid in LOG.findall(log.read_text())] for log in logs}
