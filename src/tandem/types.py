"""The types that flow: Prompt -> Rollout -> Group -> Batch -> Experience -> loss.

Shapes: B sequences, T tokens (columns), V vocabulary entries, G answers per prompt. Column t of every `*_BT`
tensor speaks about token t. Rows are right-padded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

ScoredBy = Literal["rule", "model"]
"""Who scores the answers to a row: the reward functions or the reward model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, tokenized. `id` is its row in the source, and keys the sampler's random numbers."""

    id: int
    tokens: tuple[int, ...]
    text: str
    """What the model reads: the question inside its template."""
    question: str
    truth: str | None
    """The checkable answer, or None where the reward needs none."""
    row: Mapping[str, Any]
    """The source row, for reward functions that want more columns."""
    scored_by: ScoredBy | None = None
    """As the row's `reward.column` says; None where all terms of the reward score it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the reward functions said of one answer. Exactly one of `reward` and `failure` is set."""

    reward: float | None = None
    merit: float | None = None
    """The reward before the penalty of length, where there is such a penalty."""
    failure: str | None = None
    """timeout | error | invalid | died; a failure is never a zero."""
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Unweighted value of each term of the reward that scored it, by name."""

    def __post_init__(self) -> None:
        assert (self.reward is None) != (self.failure is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One prompt with one answer: `tokens[prompt_length:]` is the answer, its end token included.

    Example: tokens (5, 6, 9, 2), sampled (F, F, T, T), logp (0., 0., -.7, -.1), finish "stop".
    """

    tokens: tuple[int, ...]
    sampled: tuple[bool, ...]
    """True at tokens the policy chose; False at prompt tokens."""
    logp: tuple[float, ...]
    """Log-probability of each token under the distribution it was drawn from; 0 where not sampled."""
    policy_logp: tuple[float, ...]
    """The same under the policy at the sampling temperature, before top-k, top-p, min-p and penalties."""
    text: str
    """The answer up to, not including, its end token."""
    finish: str
    """stop (end token or stop string) | length (ran into max_answer_tokens)."""
    versions: tuple[int, ...]
    """Version of the weights that chose each token; -1 where not sampled."""
    score: Score | None = None

    @property
    def oldest_version(self) -> int:
        return min(version for version, chosen in zip(self.versions, self.sampled) if chosen)

    @property
    def newest_version(self) -> int:
        return max(version for version, chosen in zip(self.versions, self.sampled) if chosen)

    @property
    def answer_length(self) -> int:
        return sum(self.sampled)

    @property
    def prompt_length(self) -> int:
        return self.sampled.index(True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The answers to one prompt, scored."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> list[float]:
        """Rewards of the answers that have one."""
        return [r.score.reward for r in self.rollouts if r.score is not None and r.score.reward is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rollouts as right-padded tensors. `mask_BT` is True at the tokens that were sampled."""

    tokens_BT: Tensor
    mask_BT: Tensor
    rollout_logp_BT: Tensor
    """Under the distribution each token was drawn from."""
    policy_logp_BT: Tensor
    """Under the sampler's policy at the sampling temperature, without truncation."""
    reward_B: Tensor
    """float64; NaN where scoring failed."""
    group_B: Tensor
    """Index of the row's prompt within the batch."""
    length_B: Tensor
    """Tokens in the row, prompt and answer."""
    prompt_length_B: Tensor
    """Tokens before the first sampled one, the same in all rows of a group."""
    truncated_B: Tensor
    """True where the answer ran into the length limit."""
    version_B: Tensor
    """Version of the oldest weights that sampled a token of the row."""

    @property
    def size(self) -> int:
        return self.tokens_BT.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(Batch):
    """A batch with everything the loss needs; `mask_BT` is narrowed to the tokens that are trained.

    A field is None only where the mathematics does not use it.
    """

    advantage_BT: Tensor
    correction_BT: Tensor
    """Truncated importance weight between the distribution sampled from and the policy; 1 where they agree."""
    weight_BT: Tensor
    """The aggregation of the loss, made once per update: loss = (loss_BT * weight_BT).sum()."""
    old_logp_BT: Tensor | None
    """Before the step's first update; None when the policy has not moved since (the ratio is then 1)."""
    ref_logp_BT: Tensor | None
    value_BT: Tensor | None = None
    """What the critic expected before each token was chosen, before the step's first update."""
    return_BT: Tensor | None = None
    """What it should have expected: value + advantage, before advantages are scaled."""


BatchT = TypeVar("BatchT", bound=Batch)


def pad(rows: Sequence[Sequence[Any]], dtype: torch.dtype, fill: float | int | bool = 0) -> Tensor:
    """[B, T] with rows right-padded by `fill`."""
    out = torch.full((len(rows), max(map(len, rows))), fill, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return out


def collate(groups: Sequence[Group]) -> Batch:
    """Groups in order, answers in order within each, as one right-padded batch on the CPU."""
    rollouts = [r for g in groups for r in g.rollouts]
    rewards = [
        float("nan") if r.score is None or r.score.reward is None else r.score.reward for r in rollouts
    ]
    return Batch(
        tokens_BT=pad([r.tokens for r in rollouts], torch.long),
        mask_BT=pad([r.sampled for r in rollouts], torch.bool, False),
        rollout_logp_BT=pad([r.logp for r in rollouts], torch.float32),
        policy_logp_BT=pad([r.policy_logp for r in rollouts], torch.float32),
        reward_B=torch.tensor(rewards, dtype=torch.float64),
        group_B=torch.tensor([i for i, g in enumerate(groups) for _ in g.rollouts]),
        length_B=torch.tensor([len(r.tokens) for r in rollouts]),
        prompt_length_B=torch.tensor([r.prompt_length for r in rollouts]),
        truncated_B=torch.tensor([r.finish == "length" for r in rollouts]),
        version_B=torch.tensor([r.oldest_version for r in rollouts]),
    )


def take(batch: BatchT, rows: Tensor) -> BatchT:
    """The given rows, trimmed to their longest."""
    longest = int(batch.length_B[rows].max())
    cut = {}
    for name in (f.name for f in fields(batch)):
        value = getattr(batch, name)
        if value is not None:
            cut[name] = value[rows, :longest] if name.endswith("_BT") else value[rows]
    return replace(batch, **cut)


def to_device(batch: BatchT, device: torch.device) -> BatchT:
    moved = {}
    for name in (f.name for f in fields(batch)):
        value = getattr(batch, name)
        moved[name] = None if value is None else value.to(device, dtype=_narrow(value), non_blocking=True)
    return replace(batch, **moved)


def _narrow(value: Tensor) -> torch.dtype:
    """Not every accelerator has float64, and only the advantages need it, on the CPU."""
    return torch.float32 if value.dtype == torch.float64 else value.dtype
