"""The role that scores whole answers with a model, which does not learn."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tandem.errors import RunError
from tandem.learner import Role
from tandem.model import row_values
from tandem.types import Batch, Group, collate


class RewardModel(Role):
    """A sequence classifier with one output."""

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """`score_B`, float32 on the CPU: the head's output at the last token of each row, prompt and answer."""
        longest = int(batch.length_B.max())
        if longest > self.model.max_positions:
            raise RunError(
                f"prompt and answer have {longest} tokens and the reward model has {self.model.max_positions} "
                f"positions (reward.model.path={self.model.source}); lower sampling.max_answer_tokens or "
                "data.max_prompt_tokens"
            )
        return self._each(batch, self._row_values)[:, 0].clone()

    def timed_scores(self, batch: Batch) -> tuple[Tensor, float]:
        """`scores`, and the seconds that they took."""
        began = time.monotonic()
        score_B = self.scores(batch)
        return score_B, time.monotonic() - began

    def begin(self, unit: Sequence[Group]) -> Callable[[], tuple[Tensor, float]]:
        """The scores of some groups, computed when they are asked for: sampling has the device till then."""
        return lambda: self.timed_scores(collate(unit))

    def _row_values(self, batch: Batch) -> Tensor:
        """[B, 1]"""
        score_B = row_values(
            self.model,
            batch.tokens_BT,
            batch.length_B,
            prompt_length_B=batch.prompt_length_B,
            group_B=batch.group_B,
            attention=self.run.learner.attention,
        )
        return score_B[:, None]
