"""What must hold for a figure to count: the contenders sampled from the model, and computed the same gradient."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import Answer, Job

if TYPE_CHECKING:
    from torch import Tensor

LOGP_ERROR = {"fp32": 1e-5, "bf16": 1e-2}
"""Largest |difference| / (1 + |log-probability|) in fp32, mean |difference| in bf16."""
SAMPLED = 5.0
"""Standard deviations that the mean log-probability of sampled tokens may lie from its expectation, -entropy."""
COSINE, GRADIENT_ERROR = 0.9999, 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of a contender's answers with a plain forward pass of Transformers."""

    logp_error: float | None
    """None where the contender returned no log-probabilities."""
    deviations: float
    tokens: int
    passed: bool

    def public(self) -> dict[str, Any]:
        return {
            "logp_error": None if self.logp_error is None else float(f"{self.logp_error:.2g}"),
            "deviations": round(self.deviations, 2),
            "tokens": self.tokens,
            "passed": self.passed,
        }


def sampled(job: Job, answers: list[Answer]) -> Agreement:
    """Every answer alone through the model, without padding or cache."""
    from contenders.transformers_generate import loaded

    model = loaded(job)
    errors, surprise, variance = [], 0.0, 0.0
    for answer in answers:
        truth_T, entropy_T, spread_T = forward(model, job.prompts[answer.prompt], answer.tokens)
        surprise += float((truth_T + entropy_T).sum())
        variance += float(spread_T.sum())
        if answer.logp:
            difference_T = (truth_T - truth_T.new_tensor(answer.logp)).abs()
            errors.append(difference_T / (1 + truth_T.abs()) if job.dtype == "fp32" else difference_T)
    error = None
    if errors:
        import torch

        all_M = torch.cat(errors)
        error = float(all_M.max() if job.dtype == "fp32" else all_M.mean())
    deviations = surprise / max(variance, 1e-12) ** 0.5
    fits = error is None or error < LOGP_ERROR[job.dtype]
    return Agreement(
        logp_error=error,
        deviations=deviations,
        tokens=sum(len(a.tokens) for a in answers),
        passed=fits and abs(deviations) < SAMPLED,
    )


def forward(model: Any, prompt: list[int], tokens: list[int]) -> "tuple[Tensor, Tensor, Tensor]":
    """Log-probability of each answer token; entropy and variance of the log-probability where it was drawn."""
    import torch

    with torch.inference_mode():
        ids_1T = torch.tensor([prompt + tokens], device=model.device)
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logp_TV = logits_TV.log_softmax(-1)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
        spread_T = (logp_TV.exp() * logp_TV.square()).sum(-1) - entropy_T.square()
        chosen_T = logp_TV.gather(-1, ids_1T[0, len(prompt) :, None]).squeeze(-1)
    return chosen_T, entropy_T, spread_T


def same_gradient(ours: Path, theirs: Path) -> dict[str, Any]:
    """Loss and gradient of two contenders for one fixed batch, from the files they wrote."""
    import torch
    from safetensors.torch import load_file

    mine, other = load_file(ours), load_file(theirs)
    names = sorted(name for name in mine if name.startswith("gradient."))
    if names != sorted(name for name in other if name.startswith("gradient.")):
        return {"passed": False, "why": "the gradients are of different parameters"}
    a = torch.cat([mine[name].double().flatten() for name in names])
    b = torch.cat([other[name].double().flatten() for name in names])
    cosine = float(a @ b / (a.norm() * b.norm()))
    error = float((a - b).norm() / b.norm())
    loss = abs(float(mine["loss"]) - float(other["loss"]))
    return {
        "cosine": round(cosine, 8),
        "relative_l2": float(f"{error:.2g}"),
        "loss_difference": float(f"{loss:.2g}"),
        "passed": cosine > COSINE and error < GRADIENT_ERROR and loss < GRADIENT_ERROR,
    }
