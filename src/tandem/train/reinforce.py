"""The reinforcement loop."""

from typing import Protocol

import torch

from tandem.algorithms import assess, split
from tandem.config.run import Run
from tandem.engine.random import key
from tandem.journal import Timer
from tandem.placement.inline import Roles
from tandem.train.agreement import check_agreement
from tandem.types import Experience, Group, collate


class Observer(Protocol):
    """What watches the loop: evaluation, journal, checkpoints."""

    def before(self, step: int) -> None:
        """Before a step, and once after the last; `step` steps are done. May raise to stop the run."""

    def after(
        self, step: int, groups: list[Group], experience: Experience, figures: dict[str, float]
    ) -> None:
        """After a step, which was number `step` from 0."""


def reinforce(run: Run, roles: Roles, observer: Observer, timer: Timer, start: int = 0) -> None:
    """Sample, score, assess, update, publish: from step `start` to the end of the run."""
    actor, reference, critic = roles.actor, roles.reference, roles.critic
    stream, kl = roles.stream, roles.kl
    algorithm, limit = run.algorithm, run.sampling.max_answer_tokens
    epochs, updates = run.learner.epochs_per_step, run.learner.updates_per_step
    for step in range(start, run.steps):
        observer.before(step)
        with timer("all"):
            groups = stream.take(step)
            batch = collate(groups)
            if step == start and stream.newest:
                check_agreement(actor, collate(stream.newest))
            with timer("old_log_p"):
                old = actor.old_logprobs(batch)
            with timer("reference_model"):
                ref = reference.logprobs(batch) if reference else None
            with timer("critic_model"):
                value = critic.values(batch) if critic else None
            with timer("adv"):
                experience, figures = assess(
                    batch, algorithm, limit, kl.coef, old_logp_BT=old, ref_logp_BT=ref, value_BT=value
                )
            with timer("update"):
                orders = [shuffled(len(groups), key(run.seed, step, epoch)) for epoch in range(epochs)]
                parts = [
                    p for order_G in orders for p in split(experience, updates, algorithm, limit, order_G)
                ]
                figures |= actor.update(parts, kl.coef)
            with timer("update_critic"):
                figures |= critic.update(parts) if critic else {}
            kl.observe(figures["kl/reference"], batch.size)
            roles.publish(step + 1)
        observer.after(step, groups, experience, figures)
    observer.before(run.steps)


def shuffled(count: int, seed: int) -> torch.Tensor:
    """A seeded order of the step's groups."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed & (2**63 - 1)))
