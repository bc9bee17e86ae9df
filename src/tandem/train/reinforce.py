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
    actor, reference, stream, algorithm = roles.actor, roles.reference, roles.stream, run.algorithm
    limit, updates = run.sampling.max_answer_tokens, run.learner.updates_per_step
    for step in range(start, run.steps):
        observer.before(step)
        with timer("all"):
            groups = stream.take(step)
            batch = collate(groups)
            with timer("old_log_p"):
                old_logp_BT = OLD_LOGP[run.old_logp](actor, batch)
            with timer("reference_model"):
                ref_logp_BT = reference.logprobs(batch) if reference else None
            if step == start:
                check_agreement(actor, collate(stream.newest))
            with timer("adv"):
                experience, figures = assess(
                    batch,
                    algorithm,
                    max_answer_tokens=limit,
                    kl_coef=roles.kl.coef,
                    old_logp_BT=old_logp_BT,
                    ref_logp_BT=ref_logp_BT,
                )
            with timer("update"):
                for epoch in range(run.learner.epochs_per_step):
                    order_G = shuffled(len(groups), key(run.seed, step, epoch))
                    parts = split(experience, updates, algorithm, limit, order_G)
                    figures |= actor.update(parts, roles.kl.coef)
            figures["kl/coef"] = roles.kl.coef
            roles.kl.observe(figures["kl/reference"], batch.size)
            if reference and run.refreshes_reference(step + 1):
                reference.refresh(actor)
            roles.publish(step + 1)
        observer.after(step, groups, experience, figures)
    observer.before(run.steps)


OLD_LOGP = {
    "none": lambda actor, batch: None,
    "recompute": lambda actor, batch: actor.logprobs(batch),
    "rollout": lambda actor, batch: batch.policy_logp_BT,
}
"""The ratio's denominator, by `Run.old_logp`."""


def shuffled(count: int, seed: int) -> torch.Tensor:
    """A seeded order of the step's groups."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed & (2**63 - 1)))
