"""Contenders in turns, each in a process of its own: A B C A B C, so that a slow minute hits all of them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import machine
from job import Job

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A contender (a module of `contenders`) under one of its settings."""

    contender: str
    setting: str


@dataclass(slots=True, kw_only=True)
class Row:
    """What an entry did, over all rounds; `not_run` says why there is nothing."""

    entry: Entry
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Tokens of all answers, for each of `seconds`."""
    load: list[float] = field(default_factory=list)
    """Load average at the start of each round."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    """What the process said, one per round."""
    not_run: str | None = None

    @property
    def rate(self) -> float | None:
        """Median tokens per second."""
        return median(t / s for t, s in zip(self.tokens, self.seconds)) if self.seconds else None

    def void(self, why: str) -> None:
        """Its figures do not count."""
        if self.not_run is None:
            self.not_run, self.seconds = f"void: {why}", []

    def public(self) -> dict[str, Any]:
        """As the results file has it."""
        if self.not_run is not None:
            return {
                "contender": self.entry.contender,
                "setting": self.entry.setting,
                "not_run": self.not_run,
            }
        assert self.rate is not None
        return {
            "contender": self.entry.contender,
            "setting": self.entry.setting,
            "median_seconds": round(median(self.seconds), 4),
            "tokens_per_second": round(self.rate, 1),
            "seconds": [round(s, 4) for s in self.seconds],
            "tokens": self.tokens,
            "load": self.load,
            "memory": [report["memory"] for report in self.reports],
            "versions": self.reports[0]["versions"],
        }


def race(
    entries: Sequence[Entry], job: Job, rounds: int, folder: Path, pythons: Mapping[str, str]
) -> list[Row]:
    """`rounds` processes of each entry, alternating; an entry that cannot run is left out of later rounds."""
    rows = [Row(entry=entry) for entry in entries]
    for turn in range(rounds):
        for row in rows:
            if row.not_run is None:
                print(f"  round {turn + 1}: {row.entry.contender}, {row.entry.setting}", file=sys.stderr)
                row.load.append(machine.load())
                turn_job = replace(job, setting=row.entry.setting, seed=job.seed + turn * job.repeats)
                report = run(row.entry.contender, turn_job, folder, pythons)
                row.not_run = report.get("not_run")
                if row.not_run is None:
                    row.seconds += report["seconds"]
                    row.tokens += report["tokens"]
                    row.reports.append(report)
    return rows


def run(contender: str, job: Job, folder: Path, pythons: Mapping[str, str]) -> dict[str, Any]:
    """One process of a contender; its report, or {"not_run": reason}."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        task, result, log = Path(own) / "job.json", Path(own) / "result.json", Path(own) / "log"
        job.write(task)
        command = [
            pythons.get(contender, sys.executable),
            "-m",
            "contenders",
            contender,
            str(task),
            str(result),
        ]
        with log.open("w") as output:
            code = subprocess.run(
                command,
                env=environment(job.threads, Path(own)),
                stdout=output,
                stderr=output,
            ).returncode
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return {
            "not_run": f"failed with exit status {code}: {lines[-1][:200] if lines else 'it said nothing'}"
        }


def environment(threads: int, own: Path) -> dict[str, str]:
    """The same for all: this process's own, the same number of threads, no network, nothing compiled before."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor"),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def best(rows: Sequence[Row], contender: str) -> Row | None:
    """The contender's fastest setting."""
    ran = [row for row in rows if row.entry.contender == contender and row.seconds]
    return max(ran, key=lambda row: row.rate or 0.0, default=None)


def ratio(ours: Row | None, theirs: Row | None) -> float | None:
    """How many times as many tokens per second we make; above 1 we are faster."""
    if ours is None or theirs is None or ours.rate is None or theirs.rate is None:
        return None
    return round(ours.rate / theirs.rate, 3)


def check(rows: Sequence[Row], job: Job) -> None:
    """Void the rows whose work was not the work asked for: answers missing, of another length, or without tokens."""
    wanted = job.answers * (job.prompts_per_step or len(job.prompts))
    for row in rows:
        full = wanted * job.max_tokens
        if row.seconds and not job.end_tokens and any(count != full for count in row.tokens):
            row.void(f"it made {sorted(set(row.tokens))} tokens and {full} were asked for")
