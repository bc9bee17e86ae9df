"""Keys and values while answers decode: of every prompt once, of every answer in a slot of its own."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tandem.model.attention import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much a cache holds."""

    slots: int
    """Answers at a time."""
    answer_columns: int
    lanes: int
    """Prompts at a time."""
    prompt_columns: int
    seats: int
    """Answers to one prompt at a time."""

    def joined(self, other: "Room") -> "Room":
        """The least that holds both."""
        sizes = {f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(Room)}
        return Room(**sizes)


class Slots:
    """A preallocated cache and the layout of one decoding step.

    Prompts lie in lanes, [lanes, heads, columns, D], answers in slots, [slots, heads, columns, D]. Row b of a step is
    the answer of slot b; it attends to the prompt of lane `lane_B[b]`, which is read once for all rows of that lane,
    and to its own earlier tokens.
    """

    def __init__(self, room: Room, layers: int, heads: int, dim: int, like: Tensor) -> None:
        self.room, self.heads, self.dim = room, heads, dim
        lanes, slots = (
            (room.lanes, heads, room.prompt_columns, dim),
            (room.slots, heads, room.answer_columns, dim),
        )
        self.prompt_keys = [like.new_zeros(lanes) for _ in range(layers)]
        self.prompt_values = [like.new_zeros(lanes) for _ in range(layers)]
        self.keys = [like.new_zeros(slots) for _ in range(layers)]
        self.values = [like.new_zeros(slots) for _ in range(layers)]
        self.caches = (*self.prompt_keys, *self.prompt_values, *self.keys, *self.values)
        device = like.device
        self.prompt_length_P = torch.ones(room.lanes, dtype=torch.long, device=device)
        self._lane_B, self._seat_B = (
            torch.zeros(room.slots, dtype=torch.long, device=device) for _ in range(2)
        )
        self._member_PS = torch.zeros(room.lanes * room.seats, dtype=torch.long, device=device)
        """Row in each seat of each lane; what stands in a seat that nobody has is of no matter."""
        self._bias_room = torch.zeros(room.lanes * heads, 1, room.prompt_columns, device=like.device)
        self._column_T = torch.arange(max(room.prompt_columns, room.answer_columns), device=device)
        self._head_start_BK = (torch.arange(room.slots * heads, device=device) * room.answer_columns).view(
            -1, heads
        )

    def put_prompts(self, layer: int, lane_P: Tensor, k_PKTD: Tensor, v_PKTD: Tensor) -> None:
        columns = k_PKTD.shape[2]
        self.prompt_keys[layer][lane_P, :, :columns] = k_PKTD
        self.prompt_values[layer][lane_P, :, :columns] = v_PKTD

    def keep(self, slots: list[int], columns: int) -> None:
        """Move the given slots to the front, in order, with their first `columns` columns; forget the others."""
        if slots == list(range(len(slots))):
            return
        index = torch.tensor(slots, device=self.prompt_length_P.device)
        for cache in (*self.keys, *self.values):
            cache[: len(slots), :, :columns] = cache[index, :, :columns]

    def keep_lanes(self, lanes: list[int]) -> None:
        """The same for prompts."""
        if lanes == list(range(len(lanes))):
            return
        index = torch.tensor(lanes, device=self.prompt_length_P.device)
        for cache in (*self.prompt_keys, *self.prompt_values, self.prompt_length_P):
            cache[: len(lanes)] = cache[index]

    def seat(self, lanes: list[int], rows: int | None = None) -> None:
        """Say which lane each row's prompt is in. With `rows`, a number not below theirs, a step has a shape that
        depends on nothing else: it takes that many rows and all lanes, seats and columns of the room."""
        taken = dict.fromkeys(lanes, 0)
        seats = []
        for lane in lanes:
            seats.append(taken[lane])
            taken[lane] += 1
        length_P, room = self.prompt_length_P, self.room
        if rows is None:
            self.rows, self.lanes, self.seats = len(lanes), max(lanes) + 1, max(taken.values())
            self.prompt_columns = int(length_P[: self.lanes].max())
        else:
            self.rows, self.lanes, self.seats = rows, room.lanes, room.seats
            self.prompt_columns = room.prompt_columns
        places = [lane * self.seats + seat for lane, seat in zip(lanes, seats)]
        # Rows in the order of lanes, all of them full, need no moving between [rows] and [lanes, seats].
        self.in_order = rows is None and places == list(range(self.lanes * self.seats))
        device = length_P.device
        self._lane_B[: len(lanes)] = torch.tensor(lanes, device=device)
        self._seat_B[: len(lanes)] = torch.tensor(seats, device=device)
        self._member_PS.zero_()
        self._member_PS[torch.tensor(places, device=device)] = torch.arange(len(lanes), device=device)
        hidden_PT = self._column_T[: self.prompt_columns] >= length_P[: self.lanes, None]
        bias = self._bias(hidden_PT)
        self._prompt_bias = self._bias_room[: len(bias), :, : self.prompt_columns].copy_(bias)

    def begin(self, count_B: Tensor, columns: int) -> Tensor:
        """Prepare a step whose token is number `count_B` - 1 of each row's answer, at most number `columns` - 1.
        Returns the token's position in its row."""
        column_B = count_B[: self.rows] - 1
        self._answer_bias = self._bias(self._column_T[:columns] > column_B[:, None])
        self._place = (self._head_start_BK[: self.rows] + column_B[:, None]).flatten()
        self.columns = columns
        return self.prompt_length_P[self._lane_B[: self.rows]] + column_B

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        """Here N is B: one token per row. K are the key heads, R the query heads that share one."""
        batch, heads, dim = self.rows, self.heads, self.dim
        q_BKRD = q_HND.transpose(0, 1).reshape(batch, heads, -1, dim)
        share = q_BKRD.shape[2]
        for cache, new_HND in ((self.keys[layer], k_HND), (self.values[layer], v_HND)):
            cache.view(-1, dim).index_copy_(0, self._place, new_HND.transpose(0, 1).reshape(-1, dim))
        # Batched products: attention kernels for long queries are slower with the one or few that a head has here.
        prompt_keys, prompt_values = (
            self._prompts(self.prompt_keys[layer]),
            self._prompts(self.prompt_values[layer]),
        )
        keys, values = self._answers(self.keys[layer]), self._answers(self.values[layer])
        prompt_scores = scores(self._to_lanes(q_BKRD), prompt_keys, self._prompt_bias, scale)
        answer_scores = scores(q_BKRD.reshape(-1, share, dim), keys, self._answer_bias, scale)
        scores_BKRT = torch.cat(
            [self._to_rows(prompt_scores, share), answer_scores.view(batch, heads, share, -1)], dim=-1
        )
        weights_BKRT = scores_BKRT.softmax(-1).to(q_BKRD.dtype)
        prompt_BKRT, answer_BKRT = weights_BKRT.split((self.prompt_columns, self.columns), dim=-1)
        out_BKRD = self._to_rows(torch.bmm(self._to_lanes(prompt_BKRT), prompt_values), share)
        answer = answer_BKRT.reshape(batch * heads, share, -1)
        return out_BKRD.reshape(-1, share, dim).baddbmm_(answer, values).view(batch, -1, dim)

    def _prompts(self, cache: Tensor) -> Tensor:
        return cache[: self.lanes].flatten(0, 1)[:, : self.prompt_columns]

    def _answers(self, cache: Tensor) -> Tensor:
        return cache[: self.rows].flatten(0, 1)[:, : self.columns]

    def _to_lanes(self, x_BKRX: Tensor) -> Tensor:
        """[B, K, R, X] -> [lanes * K, seats * R, X]."""
        x = x_BKRX if self.in_order else x_BKRX.index_select(0, self._member_PS[: self.lanes * self.seats])
        _, heads, share, size = x.shape
        x_PSKRX = x.unflatten(0, (self.lanes, self.seats))
        return x_PSKRX.transpose(1, 2).reshape(self.lanes * heads, self.seats * share, size)

    def _to_rows(self, x: Tensor, share: int) -> Tensor:
        """Back again, from [lanes * K, seats * R, X]."""
        x_PSKRX = x.view(self.lanes, self.heads, self.seats, share, -1).transpose(1, 2)
        if self.in_order:
            return x_PSKRX.flatten(0, 1)
        return x_PSKRX[self._lane_B[: self.rows], self._seat_B[: self.rows]]

    def _bias(self, hidden: Tensor) -> Tensor:
        """[n, T] -> [n * K, 1, T]: -inf where hidden."""
        bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
        return bias.repeat_interleave(self.heads, 0)[:, None]


def scores(q_nRD: Tensor, k_nTD: Tensor, bias_n1T: Tensor, scale: float) -> Tensor:
    """scale x q k + bias [n, R, T], in float32: shorter scores would be too coarse for a softmax."""
    if k_nTD.dtype == torch.float32:
        return torch.baddbmm(bias_n1T, q_nRD, k_nTD.mT, alpha=scale)
    if k_nTD.device.type == "cuda":
        return torch.bmm(q_nRD, k_nTD.mT, out_dtype=torch.float32).mul_(scale).add_(bias_n1T)
    return torch.baddbmm(bias_n1T, q_nRD.float(), k_nTD.float().mT, alpha=scale)


class Begun(Rows):
    """Rows of prompt and answer so far; the answers' keys and values go into their slots."""

    def __init__(self, length_B: Tensor, prompt_length_B: Tensor, slots: Slots, slot_B: Tensor) -> None:
        super().__init__(length_B)
        self.slots = slots
        column_N = self.position_N - prompt_length_B[self.row_N]
        self.chosen_M = (column_N >= 0).nonzero().squeeze(1)
        self.place_M = (slot_B[self.row_N[self.chosen_M]], column_N[self.chosen_M])

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        slot_M, column_M = self.place_M
        for cache, new_HND in ((self.slots.keys[layer], k_HND), (self.slots.values[layer], v_HND)):
            cache[slot_M, :, column_M] = new_HND[:, self.chosen_M].transpose(0, 1)
        return super().attend(layer, q_HND, k_HND, v_HND, scale)


class Prefill(Rows):
    """Prompts, whose keys and values go into their lanes."""

    def __init__(self, length_P: Tensor, slots: Slots, lane_P: Tensor) -> None:
        super().__init__(length_P)
        self.slots, self.lane_P = slots, lane_P

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        q, k, v = self.square(q_HND), self.square(k_HND), self.square(v_HND)
        self.slots.put_prompts(layer, self.lane_P, k, v)
        gqa = q.shape[1] != k.shape[1]
        return self.flat(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa))
