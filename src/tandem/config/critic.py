"""The section of the critic: where it starts, how it learns, how it lies on its processes."""

from pydantic import Field, model_validator

from tandem.config.layout import Layout, refuse_pipeline
from tandem.config.section import Section
from tandem.config.sections import Optimizer


class CriticOptimizer(Optimizer):
    """The critic's AdamW; its updates are as many as the policy's."""

    lr: float = Field(5e-6, ge=0)
    """Peak learning rate of AdamW. A critic stands a higher one than the policy."""


class Critic(Section):
    """The model that predicts the rewards to come, for algorithm.advantage=gae. All its weights are trained; sizes of
    its forward passes are those of `learner`."""

    path: str | None = None
    """Folder (or hub name) of a reward model (a sequence classifier with one output), or of a causal language model,
    whose values then begin at 0; null for the policy as it is at the start, with values of 0. Its tokenizer must be
    the policy's."""
    optimizer: CriticOptimizer = CriticOptimizer()
    layout: Layout = Layout()

    @model_validator(mode="after")
    def _no_pipeline(self) -> "Critic":
        refuse_pipeline(self.layout, "critic.layout")
        return self
