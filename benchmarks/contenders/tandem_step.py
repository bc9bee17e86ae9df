"""Tandem's training loop as `tandem train` runs it, without journal, evaluation and checkpoints."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from job import Job
from memory import Watch
from shape import text

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "keep_mb=512": {"keep_mb": 512},
    "compiled": {"compile": True},
}
"""Keys of `learner`."""
REQUIRES = ("tandem",)
REWARD = Path(__file__).parents[1] / "reward.py"


class Clock:
    """The observer of the loop: when each step begins, and how long its phases took."""

    def __init__(self, timer: Any, sampler: Any) -> None:
        self.timer, self.sampler = timer, sampler
        self.began: list[float] = []
        self.tokens: list[int] = []
        self.phases: list[dict[str, float]] = []

    def before(self, step: int) -> None:
        self.began.append(time.perf_counter())

    def after(self, step: int, groups: list[Any], experience: Any, figures: dict[str, float]) -> None:
        self.tokens.append(sum(r.answer_length for g in groups for r in g.rollouts))
        self.phases.append(self.timer.take() | self.sampler.take_seconds())


def measure(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return steps(job, Path(folder))


def steps(job: Job, folder: Path) -> dict[str, Any]:
    from tandem.data.prompts import load_prompts
    from tandem.device import pick, set_threads, synchronize
    from tandem.journal import Timer
    from tandem.model import load, tokenizer_of
    from tandem.placement import inline
    from tandem.rewards.scorer import Scorer
    from tandem.train.reinforce import reinforce

    run = recipe(job, folder)
    device = pick(run.device)
    set_threads(run.threads)
    tokenizer = tokenizer_of(run.model)
    model = load(run.model, tokenizer, device)
    watch = Watch(job.device)
    prompts = load_prompts(run.data, run.data.train, tokenizer)
    if [list(p.tokens) for p in prompts.prompts] != job.prompts:
        raise ValueError("the prompts that were read are not those of the job")
    with Scorer(run.reward, run.sampling.max_answer_tokens) as scorer:
        scorer.ready()
        roles = inline.build(run, model, prompts, scorer)
        timer = Timer(lambda: synchronize(device))
        clock = Clock(timer, roles.sampler)
        reinforce(run, roles, clock, timer)
        memory = watch.report()
    seconds = [after - before for before, after in zip(clock.began, clock.began[1:])]
    return {
        "seconds": seconds[1:],
        "first_seconds": seconds[0],
        "tokens": clock.tokens[1:],
        "memory": memory,
        "phases": clock.phases[1:],
    }


def recipe(job: Job, folder: Path, clip_grad: float | None = 1.0) -> Any:
    """The run of a job; one step to warm up, then `repeats`."""
    import yaml

    from tandem.config import load

    questions = folder / "prompts.jsonl"
    questions.write_text("".join(json.dumps({"question": text(p)}) + "\n" for p in job.prompts))
    values = {
        "run_dir": str(folder / "run"),
        "steps": 1 + job.repeats,
        "seed": job.seed,
        "device": job.device,
        "threads": job.threads,
        "model": {"path": job.folder, "dtype": job.dtype},
        "data": {
            "train": str(questions),
            "columns": {"truth": None},
            "template": "plain",
            "shuffle": False,
            "max_prompt_tokens": max(map(len, job.prompts)),
        },
        "sampling": {
            "prompts_per_step": job.prompts_per_step,
            "answers_per_prompt": job.answers,
            "max_answer_tokens": job.max_tokens,
        },
        "reward": {"functions": [{"name": f"{REWARD}:scrambled"}]},
        "algorithm": {"preset": "grpo", "kl": {"coef": job.beta}},
        "learner": {"optimizer": {"lr": 1e-6, "clip_grad": clip_grad}, **SETTINGS[job.setting]},
        "eval": {"every": None},
        "checkpoint": {"every": None},
    }
    path = folder / "step.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load(path)
