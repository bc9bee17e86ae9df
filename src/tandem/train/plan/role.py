"""Models beside the policy, each on all learners in a layout of its own: what they take, and how long they work."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.config.sections import Optimizer
from tandem.errors import ConfigError
from tandem.model import describe
from tandem.model.parallel.fit import check_fit
from tandem.model.value import REWARD_KEY
from tandem.train import footprint
from tandem.train.critic_bytes import critic_shape
from tandem.train.footprint import Shape
from tandem.train.layouts import holds_reference
from tandem.train.memory import Memory
from tandem.train.plan.axes import ALONE, Axes
from tandem.train.plan.stages import Stages
from tandem.train.plan.training import Pass, Trainer
from tandem.train.reward_model import reward_model_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A model that reads a step's answers, and learns from them where it has an optimizer."""

    name: str
    """Of its section in the recipe."""
    reading: str
    """The phase of its forward pass."""
    shape: Shape
    config: PreTrainedConfig
    layout: Layout
    optimizer: Optimizer | None = None

    def axes(self, learners: int) -> Axes:
        """Of one process there is only one layout."""
        return ALONE if learners == 1 else Axes.of(self.layout, learners)

    def refusal(self, learners: int) -> str | None:
        """Why it cannot lie on so many; None where it can."""
        if learners == 1:
            return None
        try:
            check_fit(self.layout, self.config, learners, f"{self.name}.layout")
        except ConfigError as cause:
            return str(cause)
        return None

    def memory(self, run: Run, longest_prompt: int, stages: Stages) -> Memory:
        """What it takes on the processes with these stages."""
        if self.optimizer is None:
            return footprint.frozen_at(run, self.shape, self.layout, stages)
        return footprint.learning_at(run, self.shape, self.layout, self.optimizer, longest_prompt, stages)

    def passes(self, trainer: Trainer) -> dict[str, Pass]:
        """Those of a step, by phase; `trainer` is its own."""
        found = {self.reading: trainer.reading()}
        return found if self.optimizer is None else found | {f"{self.name} update": trainer.update()}


def roles_of(run: Run, policy: Shape) -> list[Role]:
    """Of the models that the run holds beside the policy."""
    found = []
    if holds_reference(run):
        path = run.reference.path
        reference = Role(
            name="reference",
            reading="reference",
            shape=policy if path is None else footprint.shape_of(run.model, None, path),
            config=footprint.config_of(run.model, None, path),
            layout=run.reference.layout,
        )
        found.append(reference)
    if run.needs_critic:
        critic = Role(
            name="critic",
            reading="values",
            shape=critic_shape(run, policy, None),
            config=footprint.config_of(run.model, None, run.critic.path),
            layout=run.critic.layout,
            optimizer=run.critic.optimizer,
        )
        found.append(critic)
    if (judge := run.reward.model) is not None:
        reward_model = Role(
            name="reward.model",
            reading="reward model",
            shape=reward_model_shape(run, judge.path),
            config=describe(judge.path, run.model.trust_remote_code, REWARD_KEY).get_text_config(),
            layout=judge.layout,
        )
        found.append(reward_model)
    return found
