"""Loss and gradient of one fixed batch through Tandem's actor, and what the batch needs to be scored by another."""

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from job import Job
from reward import scrambled

from contenders.tandem_step import recipe

SETTINGS = {"default": {}}
REQUIRES = ("tandem",)


def fixed_answers(job: Job, vocab: int) -> list[list[int]]:
    """Answers of many lengths up to the job's, prompt by prompt; the same in every process."""
    rng = random.Random(job.seed)
    count = job.prompts_per_step * job.answers
    lengths = [rng.randint(1, job.max_tokens) for _ in range(count)]
    return [[rng.randrange(1, vocab) for _ in range(length)] for length in lengths]


def measure(job: Job) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    from tandem.device import pick
    from tandem.learner import Actor
    from tandem.model import load, tokenizer_of

    with tempfile.TemporaryDirectory() as folder:
        # Without clipping, what the optimizer's step sees is the gradient of the loss.
        run = recipe(job, Path(folder), clip_grad=None)
    model = load(run.model, tokenizer_of(run.model), pick(job.device))
    actor = Actor(model, run)
    experience, kept = assessed(job, actor, fixed_answers(job, model.vocab_size))
    gradients: dict[str, Any] = {}

    def keep(*_: Any) -> None:
        for name, weight in model.trainable().items():
            gradients[f"gradient.{name}"] = weight.grad.cpu().clone()

    actor.optimizer.adamw.register_step_pre_hook(keep)
    figures = actor.update([experience], job.beta)
    save_file(
        {**gradients, **kept, "loss": torch.tensor(figures["actor/loss"])}, Path(job.folder) / "tandem.grad"
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
    kept = {"advantage": experience.advantage_BT.amax(-1) + experience.advantage_BT.amin(-1)}
    if ref_BT is not None:
        kept["reference"] = pad([row[m].tolist() for row, m in zip(ref_BT, batch.mask_BT)], torch.float32)
    return experience, kept


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
