"""The embedded engine: it decodes with the very weights that are trained, so there are none to move.

Answers decode in slots. A prompt is computed once for all its answers and read once per step; a finished answer makes
room for the next one; when none waits, the slots still in use are moved together. None of this changes a sample:
every draw is keyed.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tandem.device import captures, free_bytes, give_back
from tandem.engine.answers import Answers, Completion, Pause, Request
from tandem.engine.cache import Begun, Prefill, Room, Slots
from tandem.engine.lines import Lines, lines_for
from tandem.engine.sampling import SamplingParams
from tandem.engine.steps import CapturedSteps, Steps
from tandem.engine.text import has_stop_text
from tandem.errors import RunError
from tandem.model import LanguageModel
from tandem.model.fused import Forward, sampling_forward
from tandem.model.kept import Kept

Prompt = tuple[int, ...]
Poll = Callable[[int, int], None]
OnToken = Callable[[int, int], None]
OnDone = Callable[[int, Completion], None]


class EmbeddedEngine:
    """Tokens in, tokens out, in this process."""

    def __init__(
        self, model: LanguageModel, slots: int, tokens_per_prefill: int = 8192, kept: Kept | None = None
    ) -> None:
        self.model, self.kept = model, kept
        self.slots = slots
        self.tokens_per_prefill = tokens_per_prefill
        self._held: _Held | None = None

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        poll: Poll = lambda answers, tokens: None,
        on_done: OnDone = lambda index, completion: None,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """One completion per request, in order.

        `poll(answers done, tokens so far)` is called between tokens and may raise to abandon the work, or `Pause`;
        `on_done(index, completion)` sees each answer as soon as it is done, `on_token(index, token)` each token as it
        is chosen. What the layers make of requests that are to be kept goes into the engine's `kept`.
        """
        if not requests:
            return []
        self.model.module.eval()
        room = room_for(requests, params, self.slots, self.model.max_positions)
        lines = lines_for(requests, params, self.kept)
        steps = self._steps(room, params, self.kept if lines.kept else None)
        return _Decode(self, requests, steps, lines, on_done, on_token).run(poll)

    def release(self) -> None:
        """Give back the memory held for the next call; on the CPU none is held."""
        self._held = None
        give_back(self.model.device)

    def _steps(self, room: Room, params: SamplingParams, kept: Kept | None) -> Steps:
        """With a cache that holds `room`; captured steps are kept for calls that sample alike."""
        model, stop_tokens = self.model, self.model.stop_tokens | params.stop_tokens
        if not captures(model.device):
            room = fitting(room, model)
            return Steps(
                forward(room, model, kept), cache(room, model), answers(room, params, stop_tokens, model)
            )
        if self._held is None or room.joined(self._held.wanted) != self._held.wanted:
            wanted = room if self._held is None else room.joined(self._held.wanted)
            self.release()  # before the larger one is made
            self._held = _Held(wanted, cache(fitting(wanted, model), model))
        slots, known = self._held.slots, self._held.steps
        if (params, stop_tokens) not in known:
            # Of the whole cache: they outlive this call, and the next one's prompts may be longer.
            fresh = answers(slots.room, params, stop_tokens, model)
            known[params, stop_tokens] = CapturedSteps(forward(slots.room, model), slots, fresh)
        return known[params, stop_tokens]


@dataclass(slots=True)
class _Held:
    """What is kept for the next call."""

    wanted: Room
    """All that the calls so far would have had; the cache holds fewer slots where memory is short."""
    slots: Slots
    steps: dict[tuple[SamplingParams, frozenset[int]], Steps] = field(default_factory=dict)


def forward(room: Room, model: LanguageModel, kept: Kept | None = None) -> Forward:
    return sampling_forward(model, room.prompt_columns + room.answer_columns, room.slots, kept)


def cache(room: Room, model: LanguageModel) -> Slots:
    return Slots(room, model.layers, model.key_heads, model.head_dim, model.embedding)


def answers(room: Room, params: SamplingParams, stop_tokens: frozenset[int], model: LanguageModel) -> Answers:
    return Answers(room.slots, params, stop_tokens, model.vocab_size, model.device)


def room_for(requests: Sequence[Request], params: SamplingParams, slots: int, positions: int) -> Room:
    """What the requests need, in as many slots as are asked for; RunError above the model's `positions`."""
    longest = max(len(r.tokens) for r in requests)
    limit = max(min(r.max_tokens or params.max_tokens, params.max_tokens) for r in requests)
    if longest + limit > positions:
        raise RunError(
            f"prompt and answer take up to {longest + limit} tokens, above the model's limit of {positions}; "
            "lower data.max_prompt_tokens or sampling.max_answer_tokens"
        )
    count_P = Counter(r.tokens for r in requests)
    width = min(slots, len(requests))
    return Room(
        slots=width,
        answer_columns=limit,
        lanes=min(width, len(count_P)),
        prompt_columns=longest,
        seats=min(width, max(count_P.values())),
    )


def fitting(room: Room, model: LanguageModel) -> Room:
    """As much of it as the device has free memory for, in fewer slots."""
    free = free_bytes(model.device)
    if free is None:
        return room
    column = 2 * model.layers * model.key_heads * model.head_dim * model.embedding.element_size()
    fits = int(FREE_SHARE * free) // (column * (room.prompt_columns + room.answer_columns))
    slots = max(1, min(room.slots, fits))
    return replace(room, slots=slots, lanes=min(room.lanes, slots), seats=min(room.seats, slots))


def packs(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """First and one past the last of neighbours that are at most `limit` together, or alone."""
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and total + size > limit:
            yield start, place
            start, total = place, 0
        total += size
    if sizes:
        yield start, len(sizes)


FREE_SHARE = 0.8
"""Of the accelerator's free memory, what the cache may take."""


@dataclass(slots=True, kw_only=True)
class _Row:
    """An answer in the making."""

    index: int
    request: Request
    born: int
    """Steps taken before its first token; below 0 where it began with some."""


class _Decode:
    """One call of `generate`: the requests that wait, the answers in slots, and those done."""

    def __init__(
        self,
        engine: EmbeddedEngine,
        requests: Sequence[Request],
        steps: Steps,
        lines: Lines,
        on_done: OnDone,
        on_token: OnToken | None,
    ) -> None:
        self.lines = lines
        self.model, self.steps, self.on_done, self.on_token = engine.model, steps, on_done, on_token
        self.slots, self.answers, self.params = steps.slots, steps.answers, steps.answers.params
        self.tokens_per_prefill = engine.tokens_per_prefill
        self.width = min(engine.slots, self.slots.room.slots, len(requests))
        self.waiting = deque(enumerate(requests))
        self.pending = Counter(r.tokens for r in requests)
        self.lanes: list[Prompt] = []
        self.first_logits: dict[Prompt, Tensor] = {}
        self.rows: list[_Row] = []
        self.done_B: list[bool] = []
        self.done: list[Completion | None] = [None] * len(requests)
        self.answers.keep([])
        self.clock = self.finished = self.tokens = 0
        # Whoever must see every token as it comes keeps the answers' tokens on the host.
        self.watched: dict[int, list[int]] | None = {} if on_token or self.params.stop else None

    def run(self, poll: Poll) -> list[Completion]:
        while self.rows or self.waiting:
            try:
                poll(self.finished, self.tokens)
            except Pause:
                self._pause()
                break
            self._make_room()
            for _ in range(1 if self.watched is not None else self.steps.look_every):
                if self.rows:
                    self._step()
            self._look()
        self.lines.finish(self.done)
        return [c for c in self.done if c is not None]

    def _pause(self) -> None:
        """Leave what is not done as it is."""
        live = [i for i, done in enumerate(self.done_B) if not done]
        for i, completion in zip(live, self._read(live)):
            self.done[self.rows[i].index] = completion
        for index, request in self.waiting:
            self.done[index] = request.begun

    def _read(self, slots: list[int]) -> list[Completion]:
        return self.answers.read(slots, [self.rows[i].request for i in slots]) if slots else []

    def _make_room(self) -> None:
        """Refill freed slots; with none waiting, move the rows together once a quarter of the slots is idle."""
        live = [i for i, done in enumerate(self.done_B) if not done]
        free = self.width - len(live)
        refill = min(free, len(self.waiting)) if free >= max(1, self.width // 8) or not live else 0
        if not refill and len(live) > 0.75 * len(self.rows):
            return
        if len(live) < len(self.rows):
            self._drop_done(live)
        self._keep_lanes(refill)
        if refill:
            self._admit(refill)
        if self.rows:
            lane_of = {prompt: lane for lane, prompt in enumerate(self.lanes)}
            self.steps.seat([lane_of[row.request.tokens] for row in self.rows])

    def _drop_done(self, live: list[int]) -> None:
        columns = self._columns()
        self.rows = [self.rows[i] for i in live]
        self.done_B = [False] * len(live)
        self.slots.keep(live, columns)
        self.answers.keep(live)

    def _keep_lanes(self, arriving: int) -> None:
        """Prompts of rows stay, and those that waiting requests want as long as `arriving` new ones have a lane."""
        used = {row.request.tokens for row in self.rows}
        spare = self.slots.room.lanes - len(used) - arriving
        wanted = [p for p in self.lanes if p not in used and self.pending[p]]
        kept = used.union(wanted[: max(0, spare)])
        self.slots.keep_lanes([lane for lane, prompt in enumerate(self.lanes) if prompt in kept])
        self.lanes = [prompt for prompt in self.lanes if prompt in kept]

    def _admit(self, count: int) -> None:
        """Start waiting requests: prompts are computed where they were not yet, and answers so far, and the tokens that
        come next are drawn."""
        admitted = [self.waiting.popleft() for _ in range(count)]
        requests = [request for _, request in admitted]
        self._compute(list(dict.fromkeys(r.tokens for r in requests if r.tokens not in self.lanes)))
        first = len(self.rows)
        self.answers.start(first, requests)
        self.rows += [_Row(index=i, request=r, born=self.clock - len(r.begun.tokens)) for i, r in admitted]
        next_logits = self._go_on([i for i, r in enumerate(requests, first) if r.begun.tokens])
        logits_BV = torch.stack(
            [next_logits.get(i, self.first_logits[r.tokens]) for i, r in enumerate(requests, first)]
        )
        self.answers.add(slice(first, first + count), logits_BV)
        self.done_B += [False] * count
        self.pending.subtract(r.tokens for r in requests)
        self.first_logits = {p: logits for p, logits in self.first_logits.items() if self.pending[p]}
        self._seen(first)
        self._look()

    def _compute(self, prompts: list[Prompt]) -> None:
        """Put prompts into lanes."""
        for start, end in packs(list(map(len, prompts)), self.tokens_per_prefill):
            self._prefill(prompts[start:end])

    def _go_on(self, slots: list[int]) -> dict[int, Tensor]:
        """Compute answers so far under the present weights, for rows without a cache; the logits of what is next."""
        requests = [self.rows[slot].request for slot in slots]
        lines = [request.tokens + request.begun.tokens for request in requests]
        device, found = self.model.device, {}
        for start, end in packs(list(map(len, lines)), self.tokens_per_prefill):
            layout = Begun(
                torch.tensor([len(line) for line in lines[start:end]], device=device),
                torch.tensor([len(request.tokens) for request in requests[start:end]], device=device),
                self.slots,
                torch.tensor(slots[start:end], device=device),
            )
            line_N = torch.tensor([t for line in lines[start:end] for t in line], device=device)
            hidden_NH = self.steps.forward.hidden(line_N, layout.position_N, layout)
            found.update(zip(slots[start:end], self.steps.forward.logits(hidden_NH[layout.end_B - 1])))
        return found

    def _prefill(self, prompts: list[Prompt]) -> None:
        device = self.model.device
        lane_P = torch.arange(len(self.lanes), len(self.lanes) + len(prompts), device=device)
        length_P = torch.tensor([len(p) for p in prompts], device=device)
        self.slots.prompt_length_P[lane_P] = length_P
        layout = Prefill(length_P, self.slots, lane_P)
        line_N = torch.tensor([t for p in prompts for t in p], device=device)
        self.lines.prompts(prompts)
        hidden_NH = self.steps.forward.hidden(line_N, layout.position_N, layout)
        self.lines.narrow(layout.end_B - 1)
        logits_PV = self.steps.forward.logits(hidden_NH[layout.end_B - 1])
        self.first_logits.update(zip(prompts, logits_PV))
        self.lanes += prompts

    def _columns(self) -> int:
        """No row has more tokens than this, those it began with included."""
        oldest = min(row.born for row in self.rows)
        return min(self.clock - oldest + 1, self.slots.room.answer_columns)

    def _step(self) -> None:
        if self.lines.kept is not None:
            self.lines.step([row.index for row in self.rows], self.done_B)
        self.steps.take(self._columns())
        self.clock += 1
        self.tokens += len(self.rows) - sum(self.done_B)
        self._seen(0)

    def _look(self) -> None:
        """Ask which rows are done, and report those that were not before."""
        known_B, self.done_B = self.done_B, self.answers.done_B[: len(self.rows)].tolist()
        fresh = [i for i, (known, done) in enumerate(zip(known_B, self.done_B)) if done and not known]
        self.finished += len(fresh)
        for i, completion in zip(fresh, self._read(fresh)):
            self.done[self.rows[i].index] = completion
            self.on_done(self.rows[i].index, completion)

    def _seen(self, first: int) -> None:
        """Show each new token of the rows from number `first` on; end the answers that have a stop text now."""
        if self.watched is None:
            return
        stopped = []
        for slot, token in enumerate(self.answers.token_B[first : len(self.rows)].tolist(), first):
            if self.done_B[slot]:
                continue
            row = self.rows[slot]
            tokens = self.watched.setdefault(row.index, list(row.request.begun.tokens))
            tokens.append(token)
            if self.on_token is not None:
                self.on_token(row.index, token)
            if has_stop_text(self.model.tokenizer, tokens, self.params):
                stopped.append(slot)
        if stopped:
            self.answers.stop(stopped)
