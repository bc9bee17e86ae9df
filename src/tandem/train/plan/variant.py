"""The run with more and more in host memory."""

from dataclasses import dataclass, replace

from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.config.sections import Optimizer
from tandem.train.plan.role import Role


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Variant:
    """A run, and the models beside its policy."""

    run: Run
    roles: list[Role]

    @property
    def away(self) -> str:
        """What the learner has in host memory, in words."""
        learner = self.run.learner
        names = {
            "optimizer": learner.optimizer.offload,
            "parameters": learner.layout.offload_parameters,
            "gradients": learner.layout.offload_gradients,
            "all of it while engines sample": learner.sleep,
        }
        return " and ".join(name for name, is_so in names.items() if is_so)

    @property
    def keys(self) -> tuple[str, ...]:
        """The recipe's, for what is in host memory."""
        learner = self.run.learner
        sections = [("learner", learner.layout, learner.optimizer)]
        sections += [(role.name, role.layout, role.optimizer) for role in self.roles]
        found = []
        for name, layout, optimizer in sections:
            if optimizer is not None and optimizer.offload:
                found.append(f"{name}.optimizer.offload=true")
            if layout.offload_parameters:
                found.append(f"{name}.layout.offload_parameters=true")
        return (*found, *["learner.sleep=true"] * learner.sleep)

    def offloading(self, optimizer: bool, parameters: bool) -> "Variant":
        """The same with these too in host memory, of all models."""
        learner = self.run.learner.model_copy(
            update={
                "optimizer": moved(self.run.learner.optimizer, optimizer),
                "layout": laid(self.run.learner.layout, parameters),
            }
        )
        roles = [
            replace(
                role,
                layout=laid(role.layout, parameters),
                optimizer=None if role.optimizer is None else moved(role.optimizer, optimizer),
            )
            for role in self.roles
        ]
        return Variant(run=self.run.model_copy(update={"learner": learner}), roles=roles)

    def resident(self) -> "Variant":
        """The same with the weights and gradients of all models where they compute."""
        learner = self.run.learner.model_copy(update={"layout": resident(self.run.learner.layout)})
        roles = [replace(role, layout=resident(role.layout)) for role in self.roles]
        return Variant(run=self.run.model_copy(update={"learner": learner}), roles=roles)

    def sleeping(self, asleep: bool) -> "Variant":
        """The same with the learner asleep, or awake, while engines sample."""
        learner = self.run.learner.model_copy(update={"sleep": asleep})
        return replace(self, run=self.run.model_copy(update={"learner": learner}))


def variants(given: Variant, *, beside: bool, alone: bool) -> list[Variant]:
    """What the recipe has in host memory, and then more. `beside`: engines of other processes are on the learner's
    devices, and only then can it sleep. `alone`: there is one learner, and of its models only optimizers wait there."""
    sleeps = (given.run.learner.sleep, True) if beside else (False,)
    more = ((False, False), (True, False), *[(True, True)] * (not alone))
    made = [
        given.offloading(optimizer, parameters).sleeping(asleep)
        for optimizer, parameters in more
        for asleep in sleeps
    ]
    return list({variant.keys: variant for variant in reversed(made)}.values())[::-1]


def moved(optimizer: Optimizer, away: bool) -> Optimizer:
    return optimizer.model_copy(update={"offload": True}) if away else optimizer


def laid(layout: Layout, away: bool) -> Layout:
    """With the weights in host memory, and the gradients with them."""
    update = {"offload_parameters": True, "offload_gradients": False}
    return layout.model_copy(update=update) if away else layout


def resident(layout: Layout) -> Layout:
    """With nothing of it in host memory."""
    return layout.model_copy(update={"offload_parameters": False, "offload_gradients": False})
