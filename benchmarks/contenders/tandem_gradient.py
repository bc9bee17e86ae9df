"""Loss and gradient of one batch that Tandem samples, through its actor, and what another needs to score it."""

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from job import Job
from reward import scrambled

from contenders.tandem_step import recipe

SETTINGS = {"keep_mb=512": {}}
REQUIRES = ("tandem",)


def sampled_answers(job: Job, model: Any, kept: Any) -> list[list[int]]:
    """Answers of many lengths up to the job's, prompt by prompt."""
    from tandem.engine import EmbeddedEngine, Request, SamplingParams

    rng = random.Random(job.seed)
    requests = [
        Request(
            tokens=tuple(prompt),
            key=rng.getrandbits(32),
            max_tokens=rng.randint(1, job.max_tokens),
            keep=True,
        )
        for prompt in job.prompts[: job.prompts_per_step]
        for _ in range(job.answers)
    ]
    engine = EmbeddedEngine(model, len(requests), kept=kept)
    done = engine.generate(requests, SamplingParams(max_tokens=job.max_tokens))
    return [list(completion.tokens) for completion in done]


def measure(job: Job) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    from tandem.device import pick
    from tandem.learner import MIB, Actor
    from tandem.model import load, tokenizer_of
    from tandem.model.fused import kept_of
    from tandem.types import pad

    with tempfile.TemporaryDirectory() as folder:
        # Without clipping, what the optimizer's step sees is the gradient of the loss.
        run = recipe(job, Path(folder), clip_grad=None)
    model = load(run.model, tokenizer_of(run.model), pick(job.device))
    kept = kept_of(model, run.learner.keep_mb * MIB) if run.keeps else None
    actor = Actor(model, run, kept=kept)
    # The first update of a run computes everything; those that are timed come later.
    actor.optimizer.updates = 1
    answers = sampled_answers(job, model, kept)
    experience, shared = assessed(job, actor, answers)
    shared["answers"] = pad(answers, torch.long, -1)
    gradients: dict[str, Any] = {}

    def keep(*_: Any) -> None:
        for name, weight in model.trainable().items():
            gradients[f"gradient.{name}"] = weight.grad.cpu().clone()

    actor.optimizer.adamw.register_step_pre_hook(keep)
    figures = actor.update([experience], job.beta)
    save_file(
        {**gradients, **shared, "loss": torch.tensor(figures["actor/loss"])}, Path(job.folder) / "tandem.grad"
    )
    return {}


def assessed(job: Job, actor: Any, answers: list[list[int]]) -> tuple[Any, dict[str, Any]]:
    """The batch as the loop makes it, with rewards of every answer's own, and a reference some way off."""
    import torch

    from tandem.algorithms import assess
    from tandem.types import collate, pad

    batch = collate(groups(job, answers))
    policy_BT = actor.logprobs(batch)
    batch = replace(batch, rollout_logp_BT=policy_BT, policy_logp_BT=policy_BT)
    noise_BT = torch.randn(policy_BT.shape, generator=torch.Generator().manual_seed(job.seed))
    ref_BT = (policy_BT + 0.3 * noise_BT) * batch.mask_BT if job.beta else None
    experience, _ = assess(batch, actor.run.algorithm, job.max_tokens, job.beta, ref_logp_BT=ref_BT)
    # An answer has one advantage, the prompt has 0: their sum is the answer's.
    shared = {"advantage": experience.advantage_BT.amax(-1) + experience.advantage_BT.amin(-1)}
    if ref_BT is not None:
        shared["reference"] = pad([row[m].tolist() for row, m in zip(ref_BT, batch.mask_BT)], torch.float32)
    return experience, shared


def groups(job: Job, answers: list[list[int]]) -> list[Any]:
    """The answers in the form that the sampler hands to the loop."""
    from tandem.types import Group, Prompt, Rollout, Score

    made = []
    for i, tokens in enumerate(job.prompts[: job.prompts_per_step]):
        prompt = Prompt(id=i, tokens=tuple(tokens), text="", question="", truth=None, row={})
        rollouts = []
        for answer in answers[i * job.answers :][: job.answers]:
            row = (*tokens, *answer)
            rollouts.append(
                Rollout(
                    tokens=row,
                    sampled=(False,) * len(tokens) + (True,) * len(answer),
                    logp=(0.0,) * len(row),
                    policy_logp=(0.0,) * len(row),
                    text="",
                    finish="stop",
                    versions=(-1,) * len(tokens) + (0,) * len(answer),
                    score=Score(reward=scrambled(str(answer))),
                )
            )
        made.append(Group(prompt=prompt, rollouts=tuple(rollouts)))
    return made
