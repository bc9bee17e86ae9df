"""The embedded engine: it decodes with the very module that is trained, so there are no weights to move.

Answers decode in slots. A prompt is computed once for all its answers; a finished answer makes room for the next
one; when none waits, the slots still in use are moved together. None of this changes a sample: every draw is keyed.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tandem.engine.cache import Prefill, Slots
from tandem.engine.random import keys_tensor, uniforms
from tandem.engine.sampling import SamplingParams, choose
from tandem.errors import RunError
from tandem.model import LanguageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to sample. Requests with equal `tokens` share the computation of their prompt."""

    tokens: tuple[int, ...]
    key: int
    """Key of its random numbers: equal keys give equal answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to a request; `logp` and `policy_logp` as in `Rollout`, one per token."""

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    policy_logp: tuple[float, ...]
    finish: str


@dataclass(slots=True, kw_only=True)
class _Row:
    """An answer in the making."""

    index: int
    request: Request
    uniform: Tensor
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    policy_logp: list[float] = field(default_factory=list)
    finish: str | None = None


class EmbeddedEngine:
    """Tokens in, tokens out, in this process."""

    def __init__(self, model: LanguageModel, slots: int, tokens_per_prefill: int = 8192) -> None:
        self.model = model
        self.slots = slots
        self.tokens_per_prefill = tokens_per_prefill

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        poll: Callable[[int, int], None] = lambda answers, tokens: None,
        on_token: Callable[[int, int], None] = lambda index, token: None,
    ) -> list[Completion]:
        """One completion per request, in order.

        `poll(answers done, tokens so far)` is called between tokens and may raise to abandon the work;
        `on_token(index, token)` sees each token
        as it is chosen.
        """
        if not requests:
            return []
        self.model.module.eval()
        return _Decode(self, requests, params, on_token).run(poll)


class _Decode:
    """One call of `generate`: its slots, the requests that wait, and the answers done."""

    def __init__(
        self,
        engine: EmbeddedEngine,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: Callable[[int, int], None],
    ) -> None:
        self.engine, self.model, self.params, self.on_token = engine, engine.model, params, on_token
        self.stop_tokens = self.model.stop_tokens | params.stop_tokens
        self.waiting = deque(enumerate(requests))
        self.rows: list[_Row] = []
        self.done: list[Completion | None] = [None] * len(requests)
        self.prompts = _Prompts(self.model, requests, engine.tokens_per_prefill)
        longest = max(len(r.tokens) for r in requests) + params.max_tokens
        if longest > self.model.max_positions:
            raise RunError(
                f"prompt and answer take up to {longest} tokens, above the model's limit of "
                f"{self.model.max_positions}; lower data.max_prompt_tokens or sampling.max_answer_tokens"
            )
        self.width = min(engine.slots, len(requests))
        self.finished = self.tokens = 0
        self.cache: Slots | None = None
        self.columns = longest

    def run(self, poll: Callable[[int, int], None]) -> list[Completion]:
        while self.rows or self.waiting:
            poll(self.finished, self.tokens)
            self._make_room()
            if self.rows:
                self._step()
        return [c for c in self.done if c is not None]

    def _make_room(self) -> None:
        """Refill freed slots; with none waiting, move the rows together once a quarter of the slots is idle."""
        live = [i for i, row in enumerate(self.rows) if row.finish is None]
        free = self.width - len(live)
        refill = self.waiting and (free >= max(1, self.width // 8) or not live)
        if not refill and len(live) > 0.75 * len(self.rows):
            return
        if len(live) < len(self.rows):
            self.rows = [self.rows[i] for i in live]
            if self.cache is not None:
                self.cache.keep(live)
        if refill:
            self._admit(min(free, len(self.waiting)))

    def _admit(self, count: int) -> None:
        """Start waiting requests: prompts are computed where they were not yet, their first tokens drawn."""
        admitted = [self.waiting.popleft() for _ in range(count)]
        self.prompts.compute([request for _, request in admitted])
        keys = keys_tensor([request.key for _, request in admitted], self.model.device)
        uniform_BT = uniforms(keys, self.params.max_tokens)
        new = [_Row(index=i, request=r, uniform=u) for (i, r), u in zip(admitted, uniform_BT)]
        first = len(self.rows)
        logits = []
        for slot, row in enumerate(new, start=first):
            keys, values, logits_V = self.prompts.take(row.request)
            if self.cache is None:
                _, heads, dim = keys[0].shape
                self.cache = Slots(self.model.layers, self.width, heads, self.columns, dim, keys[0])
            self.cache.put(slot, keys, values)
            logits.append(logits_V)
        assert self.cache is not None
        self.rows.extend(new)
        self.cache.active = len(self.rows)
        self._choose(new, torch.stack(logits))

    def _step(self) -> None:
        """One token for every row; a row that has finished idles until its slot is taken."""
        assert self.cache is not None
        if all(row.finish is not None for row in self.rows):
            return
        tokens_B = torch.tensor([row.tokens[-1] for row in self.rows], device=self.model.device)
        position_B = self.cache.begin()
        hidden_BH = self.model.hidden(tokens_B, position_B, self.cache)
        self._choose(self.rows, self.model.logits(hidden_BH))

    def _choose(self, rows: list[_Row], logits_BV: Tensor) -> None:
        params = self.params
        uniform_B = torch.stack([row.uniform[min(len(row.tokens), params.max_tokens - 1)] for row in rows])
        held_BV = self._held_back(rows, logits_BV)
        seen_BV = self._seen(rows, logits_BV) if params.repetition_penalty != 1 else None
        token_B, logp_B, policy_logp_B = choose(logits_BV, uniform_B, params, held_BV, seen_BV)
        columns = zip(rows, token_B.tolist(), logp_B.tolist(), policy_logp_B.tolist())
        for row, token, logp, policy_logp in columns:
            if row.finish is not None:
                continue
            self.tokens += 1
            row.tokens.append(token)
            row.logp.append(logp)
            row.policy_logp.append(policy_logp)
            self.on_token(row.index, token)
            row.finish = self._finish(row)
            if row.finish is not None:
                self.finished += 1
                self.done[row.index] = Completion(
                    tokens=tuple(row.tokens),
                    logp=tuple(row.logp),
                    policy_logp=tuple(row.policy_logp),
                    finish=row.finish,
                )

    def _finish(self, row: _Row) -> str | None:
        if row.tokens[-1] in self.stop_tokens:
            return "stop"
        if self.params.stop and len(row.tokens) >= self.params.min_tokens:
            # A stop text of n bytes lies within the last n + 1 tokens: a token may hold no more than one byte.
            longest = max(len(stop.encode()) for stop in self.params.stop)
            tail = decode(self.model.tokenizer, row.tokens[-longest - 1 :])
            if any(stop in tail for stop in self.params.stop):
                return "stop"
        return "length" if len(row.tokens) >= self.params.max_tokens else None

    def _held_back(self, rows: list[_Row], logits_BV: Tensor) -> Tensor | None:
        short = [i for i, row in enumerate(rows) if len(row.tokens) < self.params.min_tokens]
        if not short:
            return None
        held_BV = torch.zeros(logits_BV.shape, dtype=torch.bool, device=logits_BV.device)
        known = [token for token in self.stop_tokens if token < logits_BV.shape[-1]]
        ends = torch.tensor(known, dtype=torch.long, device=logits_BV.device)
        held_BV[torch.tensor(short, device=logits_BV.device)[:, None], ends] = True
        return held_BV

    def _seen(self, rows: list[_Row], logits_BV: Tensor) -> Tensor:
        seen_BV = torch.zeros(logits_BV.shape, dtype=torch.bool, device=logits_BV.device)
        for mask_V, row in zip(seen_BV, rows):
            mask_V[torch.tensor((*row.request.tokens, *row.tokens), device=mask_V.device)] = True
        return seen_BV


class _Prompts:
    """Keys, values and next-token logits of prompts, computed once and held until their last answer has started."""

    def __init__(self, model: LanguageModel, requests: Sequence[Request], tokens_per_prefill: int) -> None:
        self.model, self.budget = model, tokens_per_prefill
        self.pending: dict[tuple[int, ...], int] = {}
        for request in requests:
            self.pending[request.tokens] = self.pending.get(request.tokens, 0) + 1
        self.ready: dict[tuple[int, ...], tuple[list[Tensor], list[Tensor], Tensor]] = {}

    def compute(self, needed: list[Request]) -> None:
        """Prefill the prompts of `needed` that are not ready, in packs of at most the token budget."""
        prompts = list(dict.fromkeys(r.tokens for r in needed if r.tokens not in self.ready))
        start = 0
        while start < len(prompts):
            end, total = start, 0
            while end < len(prompts) and (end == start or total + len(prompts[end]) <= self.budget):
                total += len(prompts[end])
                end += 1
            self._prefill(prompts[start:end])
            start = end

    def _prefill(self, prompts: list[tuple[int, ...]]) -> None:
        device = self.model.device
        length_B = torch.tensor([len(p) for p in prompts], device=device)
        rows = Prefill(length_B)
        line_N = torch.tensor([t for p in prompts for t in p], device=device)
        hidden_NH = self.model.hidden(line_N, rows.position_N, rows)
        logits_BV = self.model.logits(hidden_NH[rows.end_B - 1])
        for i, (prompt, end) in enumerate(zip(prompts, rows.end_B.tolist())):
            cut = slice(end - len(prompt), end)
            keys = [layer[cut] for layer in rows.keys]
            values = [layer[cut] for layer in rows.values]
            self.ready[prompt] = (keys, values, logits_BV[i])

    def take(self, request: Request) -> tuple[list[Tensor], list[Tensor], Tensor]:
        state = self.ready[request.tokens]
        self.pending[request.tokens] -= 1
        if not self.pending[request.tokens]:
            del self.ready[request.tokens]
        return state


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Text of an answer's tokens, control tokens left out."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
