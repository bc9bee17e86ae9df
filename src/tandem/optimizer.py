"""AdamW with a learning-rate schedule; float32 master weights where the model's are shorter or state is offloaded.

Of a sharded weight it steps the part that is here: AdamW treats every number alone, so only the norm is shared.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tandem.config.sections import Optimizer as OptimizerConfig
from tandem.model.parallel.mesh import local, norm_of


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
        self,
        weights: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        total_updates: int,
        *,
        norm: Callable[[Mapping[str, Tensor]], Tensor] = norm_of,
        offload_gradients: bool = False,
    ) -> None:
        """`norm` completes gradients that are only parts, and measures them; `offload_gradients` adds them up in
        host memory, where `collect` brings them."""
        self.config, self.total = config, total_updates
        self.names = list(weights)
        self._weights = list(weights.values())
        self._norm, self._offload_gradients = norm, offload_gradients
        self._collected: dict[str, Tensor] = {}
        self.updates = 0
        self._here = [local(w) for w in self._weights]
        self._masters = [self._master(here) for here in self._here]
        decay = [m for m in self._masters if m.ndim > 1]
        rest = [m for m in self._masters if m.ndim <= 1]
        self.adamw = torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def _master(self, here: Tensor) -> Tensor:
        if here.dtype == torch.float32 and not self.config.offload:
            return here
        device = torch.device("cpu") if self.config.offload else here.device
        return here.detach().to(device=device, dtype=torch.float32, copy=True).requires_grad_(True)

    @property
    def lr(self) -> float:
        """Rate of the next update."""
        return learning_rate(self.config, self.updates, self.total)

    def zero_grad(self) -> None:
        self._collected.clear()
        for weight in self._weights:
            weight.grad = None

    def collect(self) -> None:
        """After each backward pass: bring its gradients to where they add up, if that is not where they are."""
        if not self._offload_gradients:
            return
        for name, weight in zip(self.names, self._weights):
            if weight.grad is not None:
                gradient = local(weight.grad).to(device="cpu", dtype=torch.float32)
                before = self._collected.get(name)
                self._collected[name] = gradient if before is None else before.add_(gradient)
                weight.grad = None

    def _gradients(self) -> dict[str, Tensor]:
        """What is here of each gradient."""
        if self._offload_gradients:
            return self._collected
        pairs = zip(self.names, self._weights)
        return {name: local(weight.grad) for name, weight in pairs if weight.grad is not None}

    def gradient_norm(self) -> Tensor:
        """2-norm over all gradients, in float32; 0 where no weight has one. Once per update."""
        return self._norm(self._gradients())

    def step(self, norm: Tensor) -> None:
        """One update, the gradient scaled down where its norm is above the bound."""
        bound = self.config.clip_grad
        scale = 1.0 if bound is None else min(1.0, bound / (float(norm) + 1e-6))
        gradients = self._gradients()
        for name, master in zip(self.names, self._masters):
            if name in gradients:
                # Under offload the device's copy stays as it is: the scaled one is made where the master lives.
                gradient = gradients[name].to(device=master.device, dtype=torch.float32)
                master.grad = gradient.mul_(scale) if scale != 1.0 else gradient
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
        self.adamw.step()
        for weight, here, master in zip(self._weights, self._here, self._masters):
            if master is not here:
                here.data.copy_(master.data)
            if master is not weight:
                master.grad = None
        self.updates += 1

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept from update to update, masters among it, and the weights where they are masters."""
        moments = [t for state in self.adamw.state.values() for t in state.values()]
        return [*moments, *self._masters]

    @property
    def masters(self) -> dict[str, Tensor]:
        """What AdamW steps, by the name of its weight."""
        return dict(zip(self.names, self._masters))

    @property
    def master_tensors(self) -> dict[str, Tensor]:
        """Masters that are not the weights themselves; a checkpoint needs them beside the weights."""
        triples = zip(self.names, self._masters, self._here)
        return {name: master.detach() for name, master, here in triples if master is not here}

    def restore_masters(self, tensors: Mapping[str, Tensor]) -> None:
        """Masters that are not among the tensors were the weights themselves, which have to be restored before."""
        with torch.no_grad():
            for name, master, here in zip(self.names, self._masters, self._here):
                if master is not here:
                    master.copy_(tensors.get(name, here))

    @property
    def parameter_names(self) -> list[str]:
        """Names in the order of the optimizer's own parameter list (decayed ones first)."""
        named = list(zip(self.names, self._masters))
        return [n for n, m in named if m.ndim > 1] + [n for n, m in named if m.ndim <= 1]
