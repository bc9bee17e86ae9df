"""AdamW with a learning-rate schedule; float32 master weights where the model's are shorter or state is offloaded."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tandem.config.sections import Optimizer as OptimizerConfig


def learning_rate(config: OptimizerConfig, update: int, total: int) -> float:
    """The rate of update number `update` (from 0) of `total`: linear warm-up, then the schedule down to end_lr."""
    if update < config.warmup_updates:
        return config.lr * (update + 1) / config.warmup_updates
    span = max(1, total - config.warmup_updates - 1)
    progress = min(1.0, (update - config.warmup_updates) / span)
    return config.end_lr + (config.lr - config.end_lr) * SCHEDULES[config.schedule](progress)


SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


class Optimizer:
    """Steps the model's weights. Masters are the weights themselves unless they must differ in type or place."""

    def __init__(
        self, weights: Mapping[str, nn.Parameter], config: OptimizerConfig, total_updates: int
    ) -> None:
        self.config, self.total = config, total_updates
        self.names = list(weights)
        self._weights = list(weights.values())
        self.updates = 0
        self._masters = [self._master(w) for w in self._weights]
        decay = [m for m in self._masters if m.ndim > 1]
        rest = [m for m in self._masters if m.ndim <= 1]
        self.adamw = torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def _master(self, weight: nn.Parameter) -> Tensor:
        if weight.dtype == torch.float32 and not self.config.offload:
            return weight
        device = torch.device("cpu") if self.config.offload else weight.device
        return weight.detach().to(device=device, dtype=torch.float32, copy=True).requires_grad_(True)

    @property
    def lr(self) -> float:
        """Rate of the next update."""
        return learning_rate(self.config, self.updates, self.total)

    def zero_grad(self) -> None:
        for weight in self._weights:
            weight.grad = None

    def gradient_norm(self) -> Tensor:
        """2-norm over all gradients, in float32; 0 where no weight has one."""
        norms = [torch.linalg.vector_norm(w.grad.float()) for w in self._weights if w.grad is not None]
        return torch.stack(norms).norm() if norms else torch.zeros(())

    def step(self, norm: Tensor) -> None:
        """One update, the gradient scaled down where its norm is above the bound."""
        bound = self.config.clip_grad
        scale = 1.0 if bound is None else min(1.0, bound / (float(norm) + 1e-6))
        for weight, master in zip(self._weights, self._masters):
            if weight.grad is not None:
                # Under offload the device's copy stays as it is: the scaled one is made where the master lives.
                gradient = weight.grad.to(device=master.device, dtype=torch.float32)
                master.grad = gradient.mul_(scale) if scale != 1.0 else gradient
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
        self.adamw.step()
        for weight, master in zip(self._weights, self._masters):
            if master is not weight:
                weight.data.copy_(master.data)
                master.grad = None
        self.updates += 1

    @property
    def master_tensors(self) -> dict[str, Tensor]:
        """Masters that are not the weights themselves; a checkpoint needs them beside the weights."""
        pairs = zip(self.names, self._masters, self._weights)
        return {name: master.detach() for name, master, weight in pairs if master is not weight}

    def restore_masters(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, master, weight in zip(self.names, self._masters, self._weights):
                if master is not weight:
                    master.copy_(tensors[name])

    @property
    def parameter_names(self) -> list[str]:
        """Names in the order of the optimizer's own parameter list (decayed ones first)."""
        named = list(zip(self.names, self._masters))
        return [n for n, m in named if m.ndim > 1] + [n for n, m in named if m.ndim <= 1]
