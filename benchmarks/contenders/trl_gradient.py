"""Loss and gradient of the same batch through TRL's `compute_loss`."""

import tempfile
from pathlib import Path
from typing import Any

from job import Job
from reward import scrambled_all
from shape import PAD

from contenders.trl_step import policy, trainer

SETTINGS = {"1 micro-batch": 1}
REQUIRES = ("trl",)


def measure(job: Job) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    model = policy(job)
    theirs = load_file(Path(job.folder) / "tandem.grad")
    with tempfile.TemporaryDirectory() as folder:
        trl = trainer(job, Path(folder), model, scrambled_all, [])
        trl.current_gradient_accumulation_steps = 1
        batch = inputs(job, theirs)
        loss = trl.compute_loss(model, {name: value.to(model.device) for name, value in batch.items()})
        loss.backward()
    gradients = {f"gradient.{name}": weight.grad.cpu() for name, weight in model.named_parameters()}
    save_file({**gradients, "loss": loss.detach().cpu()}, Path(job.folder) / "trl.grad")
    return {}


def inputs(job: Job, theirs: dict[str, Any]) -> dict[str, Any]:
    """Prompts padded on the left, answers on the right. Answers, advantages and reference are Tandem's, for the two add
    different constants (1e-4 and 1e-6) to the deviation that divides the advantages."""
    import torch

    prompts = [p for p in job.prompts[: job.prompts_per_step] for _ in range(job.answers)]
    answers = [row[row >= 0].tolist() for row in theirs["answers"]]
    left, right = max(map(len, prompts)), max(map(len, answers))
    made = {
        "prompt_ids": torch.tensor([[PAD] * (left - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (left - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor([a + [PAD] * (right - len(a)) for a in answers]),
        "completion_mask": torch.tensor([[1] * len(a) + [0] * (right - len(a)) for a in answers]),
        "advantages": theirs["advantage"],
        "num_items_in_batch": torch.tensor(sum(map(len, answers))),
    }
    if job.beta:
        made["ref_per_token_logps"] = theirs["reference"]
    return made
