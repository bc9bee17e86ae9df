"""One contender's process: python -m contenders NAME JOB RESULT."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import machine
from job import Job


def main() -> None:
    name, task, result = sys.argv[1:]
    contender = importlib.import_module(f"contenders.{name}")
    missing = [package for package in contender.REQUIRES if importlib.util.find_spec(package) is None]
    if missing:
        report = {"not_run": f"{missing[0]} is not installed"}
    else:
        job = Job.read(Path(task))
        import torch

        torch.set_num_threads(job.threads)
        report = {**contender.measure(job), "versions": machine.versions()}
    Path(result).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
