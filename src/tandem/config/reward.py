"""The section of the reward: the functions and the model that score answers, and what happens when scoring fails."""

import json
import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from tandem.config.layout import Layout
from tandem.config.section import Section

if TYPE_CHECKING:
    from tandem.types import ScoredBy

OVERLONG = "overlong"
"""Name of the length penalty among the parts of a reward."""


class RewardFunction(Section):
    """One term of the reward."""

    name: str
    """A built-in verifier, `package.module:function`, or `path.py:function`."""
    weight: float = 1.0
    """Factor in the sum."""
    args: dict[str, Any] = {}
    """Keyword arguments for the function."""

    @field_validator("args")
    @classmethod
    def _can_be_written(cls, args: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(args, allow_nan=False)
        except ValueError:
            raise ValueError(
                f"{args}: inf and nan cannot be written to config.yaml; give finite numbers"
            ) from None
        return args


class RewardModel(Section):
    """A model that scores answers, beside the functions or instead of them: its output at the last token of prompt and
    answer is a term of the reward. null for none. It does not learn; it has the type of `model.dtype`, and the sizes of
    its forward passes are those of `learner`."""

    path: str
    """Folder (or hub name) of a sequence classifier with one output. Its tokenizer must be the policy's."""
    name: str = "reward_model"
    """What the score is called in metrics and rollouts."""
    weight: float = 1.0
    """Factor in the sum."""
    layout: Layout = Layout()

    @model_validator(mode="after")
    def _sound(self) -> "RewardModel":
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"reward.model.name={self.name!r}: use letters, digits, `_`, `-` and `.` only")
        return self


class Reward(Section):
    """What scores an answer, and what happens when scoring fails."""

    functions: list[RewardFunction] = []
    """What scores an answer; the reward is the weighted sum of these and the model."""
    model: RewardModel | None = None
    column: str | None = None
    """Column of the data that says which of the two scores a row's answers: the functions (1, `rule`) or the model
    (0, `model`). null: both score every answer."""
    workers: int = Field(1, gt=0)
    """Processes that score."""
    timeout_s: float = Field(10.0, gt=0, le=86400)
    """Seconds for one answer; then its process is killed and replaced."""
    memory_mb: int = Field(2048, gt=0)
    """Address space of one process."""
    on_failure: Literal["mask", "zero", "raise"] = "mask"
    """A failed score is left out of baseline and loss (`mask`), counts as 0, or ends the run."""
    max_failure_share: float = Field(0.2, ge=0, le=1)
    """The run stops when more than this share fails, three steps in a row."""
    overlong_buffer: int = Field(0, ge=0)
    """DAPO's soft penalty: it grows over the last so many tokens before `max_answer_tokens`. 0 for none."""
    overlong_penalty: float = Field(1.0, ge=0)
    """Penalty at the full length."""
    permute: bool = False
    """Control experiment: rewards are shuffled across the answers of a step, so that nothing can be learned."""

    @property
    def terms(self) -> "list[RewardFunction | RewardModel]":
        """The weighted parts of the sum, in order."""
        return [*self.functions, *([self.model] if self.model else [])]

    def terms_of(self, scored_by: "ScoredBy | None") -> "list[RewardFunction | RewardModel]":
        """Those that score the answers to a row."""
        kept = {"rule": RewardFunction, "model": RewardModel}
        return [term for term in self.terms if scored_by is None or isinstance(term, kept[scored_by])]

    @model_validator(mode="after")
    def _has_two_to_choose_from(self) -> "Reward":
        if self.column is not None and not (self.functions and self.model):
            lacking = "reward.model" if self.functions else "reward.functions"
            raise ValueError(
                f"reward.column={self.column!r} chooses between reward.functions and reward.model, and there is no "
                f"{lacking}; give it, or set reward.column to null"
            )
        return self

    @model_validator(mode="after")
    def _names_terms(self) -> "Reward":
        names = [term.name for term in self.terms]
        if not names:
            raise ValueError(
                "nothing scores an answer: name a function in reward.functions or a model in reward.model"
            )
        if len(set(names)) < len(names) or OVERLONG in names:
            raise ValueError(
                f"each name of reward.functions and reward.model may stand once, and none be {OVERLONG!r}: {names}"
            )
        return self
