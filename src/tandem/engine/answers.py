"""Answers in the making, as tensors: what a step adds to each of them needs no word from the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.random import keys_tensor, uniforms
from tandem.engine.sampling import SamplingParams, choose
from tandem.errors import RunError

PAUSED = "paused"


class Pause(Exception):
    """Raised by `poll` to end a call between two tokens: answers that are not done come back as far as they are, with
    `finish` "paused", and a request can begin with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to a request; `logp`, `policy_logp` and `versions` as in `Rollout`, one per token."""

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    policy_logp: tuple[float, ...]
    versions: tuple[int, ...]
    finish: str


NOTHING = Completion(tokens=(), logp=(), policy_logp=(), versions=(), finish=PAUSED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to sample. Requests with equal `tokens` share the computation of their prompt."""

    tokens: tuple[int, ...]
    key: int
    """Key of its random numbers: equal keys give equal answers."""
    max_tokens: int | None = None
    """Its own limit, where that is below the one of `SamplingParams`."""
    begun: Completion = NOTHING
    """The answer so far: what is sampled comes after it, from the present weights alone."""
    version: int = 0
    """Of the weights that it is asked of."""
    keep: bool = False
    """Whether an update with these weights follows, which can use what is computed for the answer."""


class Answers:
    """Row b is the answer of slot b. A row that is done takes part in steps without being changed by them."""

    def __init__(
        self,
        slots: int,
        params: SamplingParams,
        stop_tokens: frozenset[int],
        vocab: int,
        device: torch.device,
    ) -> None:
        self.params, self.stop_tokens, self.device = params, stop_tokens, device
        columns = params.max_tokens + 1
        # The last column takes what is drawn for rows that are done.
        self.tokens_BT = torch.zeros(slots, columns, dtype=torch.long, device=device)
        self.logp_BT, self.policy_logp_BT, self.uniform_BT = (
            torch.zeros(slots, columns, device=device) for _ in range(3)
        )
        self.token_B, self.count_B, self.limit_B = (
            torch.zeros(slots, dtype=torch.long, device=device) for _ in range(3)
        )
        self.count_B += 1
        self.done_B = torch.ones(slots, dtype=torch.bool, device=device)
        self.stopped_B = torch.zeros(slots, dtype=torch.bool, device=device)
        self._ends_V = torch.zeros(vocab, dtype=torch.bool, device=device)
        self._ends_V[[token for token in stop_tokens if token < vocab]] = True
        self.seen_BV = None
        if params.repetition_penalty != 1:
            self.seen_BV = torch.zeros(slots, vocab, dtype=torch.bool, device=device)

    def start(self, first: int, requests: Sequence[Request]) -> None:
        """Rows from number `first` on become the answers to the requests, with the tokens that these begin with."""
        cut = slice(first, first + len(requests))
        keys_B = keys_tensor([request.key for request in requests], self.device)
        self.uniform_BT[cut, :-1] = uniforms(keys_B, self.params.max_tokens)
        limits = [min(r.max_tokens or self.params.max_tokens, self.params.max_tokens) for r in requests]
        self.limit_B[cut] = torch.tensor(limits, device=self.device)
        counts = [len(request.begun.tokens) for request in requests]
        self.count_B[cut] = torch.tensor(counts, device=self.device)
        self.done_B[cut] = self.stopped_B[cut] = False
        for slot, (count, request) in enumerate(zip(counts, requests), first):
            begun = request.begun
            if count:
                self.tokens_BT[slot, :count] = torch.tensor(begun.tokens, device=self.device)
                self.logp_BT[slot, :count] = torch.tensor(begun.logp, device=self.device)
                self.policy_logp_BT[slot, :count] = torch.tensor(begun.policy_logp, device=self.device)
            if self.seen_BV is not None:
                self.seen_BV[slot] = False
                self.seen_BV[slot, [*request.tokens, *begun.tokens]] = True

    def add(self, cut: slice, logits_BV: Tensor) -> None:
        """Draw the next token of the rows of `cut`."""
        params, count_B, done_B = self.params, self.count_B[cut], self.done_B[cut]
        column_B1 = count_B[:, None].masked_fill(done_B[:, None], self.params.max_tokens)
        held_BV = None
        if params.min_tokens:
            held_BV = (count_B < params.min_tokens)[:, None] & self._ends_V
        seen_BV = None if self.seen_BV is None else self.seen_BV[cut]
        uniform_B = self.uniform_BT[cut].gather(1, column_B1).squeeze(1)
        token_B, logp_B, policy_logp_B = choose(logits_BV, uniform_B, params, held_BV, seen_BV)
        self.tokens_BT[cut].scatter_(1, column_B1, token_B[:, None])
        self.logp_BT[cut].scatter_(1, column_B1, logp_B[:, None])
        self.policy_logp_BT[cut].scatter_(1, column_B1, policy_logp_B[:, None])
        self.token_B[cut] = token_B
        count_B += ~done_B
        # Logits that are not finite end an answer, for `read` to say so: no step waits for word of them.
        done_B |= self._ends_V[token_B] | (count_B >= self.limit_B[cut]) | logp_B.isnan()
        if seen_BV is not None:
            seen_BV.scatter_(1, token_B[:, None], True)

    def stop(self, slots: list[int]) -> None:
        """End some answers with the tokens they have."""
        index = torch.tensor(slots, device=self.device)
        self.done_B[index] = self.stopped_B[index] = True

    def keep(self, slots: list[int]) -> None:
        """Move the given rows to the front, in order; the others are done."""
        index = torch.tensor(slots, dtype=torch.long, device=self.device)
        for tensor in self.state:
            tensor[: len(slots)] = tensor[index]
        self.done_B[len(slots) :] = True
        # A row that is no answer stands at column 0 and writes nowhere else.
        self.count_B[len(slots) :] = 1

    @property
    def state(self) -> list[Tensor]:
        """Everything that says how far the answers are."""
        rows = [self.tokens_BT, self.logp_BT, self.policy_logp_BT, self.uniform_BT]
        seen = [] if self.seen_BV is None else [self.seen_BV]
        return [*rows, self.token_B, self.count_B, self.limit_B, self.done_B, self.stopped_B, *seen]

    def read(self, slots: list[int], requests: Sequence[Request]) -> list[Completion]:
        """The answers of some rows to their requests, as they are now; RunError where logits were not finite."""
        index = torch.tensor(slots, dtype=torch.long, device=self.device)
        columns = (
            self.done_B,
            self.stopped_B,
            self.count_B,
            self.tokens_BT,
            self.logp_BT,
            self.policy_logp_BT,
        )
        read = []
        for request, done, stopped, count, tokens, logp, policy_logp in zip(
            requests, *(column[index].tolist() for column in columns), strict=True
        ):
            if math.isnan(logp[count - 1]):
                raise RunError(
                    f"token {count} of an answer cannot be drawn: the model's logits are not finite. Its weights hold "
                    "NaN or infinities, or are too large for model.dtype; go on from other weights, such as those of "
                    "an earlier checkpoint"
                )
            ended = "stop" if stopped or tokens[count - 1] in self.stop_tokens else "length"
            versions = request.begun.versions
            read.append(
                Completion(
                    tokens=tuple(tokens[:count]),
                    logp=tuple(logp[:count]),
                    policy_logp=tuple(policy_logp[:count]),
                    versions=versions + (request.version,) * (count - len(versions)),
                    finish=ended if done else PAUSED,
                )
            )
        return read
