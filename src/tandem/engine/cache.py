"""Keys and values of the answers that decode now: one slot per answer, prompt and answer side by side."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tandem.model.attention import Rows


class Prefill(Rows):
    """Rows that keep their keys and values; each layer is [N, heads, D]."""

    def __init__(self, length_B: Tensor) -> None:
        super().__init__(length_B)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        self.keys.append(k_HND.transpose(0, 1))
        self.values.append(v_HND.transpose(0, 1))
        return super().attend(layer, q_HND, k_HND, v_HND, scale)


class Slots:
    """A preallocated cache and the layout of one decoding step: slot b holds `length_B[b]` tokens so far.

    The step's token of each of the first `active` slots is written at its own position and attends to all
    earlier ones of its slot. Tensors are [slots, columns, heads, D], so that a token's keys lie together.
    """

    def __init__(self, layers: int, slots: int, heads: int, columns: int, dim: int, like: Tensor) -> None:
        shape = (slots, columns, heads, dim)
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.length_B = torch.zeros(slots, dtype=torch.long, device=like.device)
        self.active = 0
        self._column_T = torch.arange(columns, device=like.device)
        self._start_B = torch.arange(slots, device=like.device) * columns
        self._place_B = self._start_B
        self._bias_B1T: Tensor | None = None

    def put(self, slot: int, keys: list[Tensor], values: list[Tensor]) -> None:
        """Start a slot with a prompt's keys and values, each [T, heads, D]."""
        columns = len(keys[0])
        for cache, new in zip((*self.keys, *self.values), (*keys, *values)):
            cache[slot, :columns] = new
        self.length_B[slot] = columns

    def keep(self, slots: list[int]) -> None:
        """Move the given slots to the front, in order, and forget the others."""
        index = torch.tensor(slots, dtype=torch.long, device=self.length_B.device)
        columns = int(self.length_B[index].max()) if slots else 0
        for cache in (*self.keys, *self.values):
            cache[: len(slots), :columns] = cache[index, :columns]
        self.length_B[: len(slots)] = self.length_B[index]
        self.active = len(slots)

    def begin(self) -> Tensor:
        """Prepare a step; returns the position of its token in each active slot."""
        # A slot whose answer has ended idles on, at the last column at most, until it is taken again.
        position_B = self.length_B[: self.active].clamp(max=len(self._column_T) - 1)
        columns = int(position_B.max()) + 1
        hidden_BT = self._column_T[:columns] > position_B[:, None]
        bias_BT = torch.zeros(hidden_BT.shape, dtype=self.keys[0].dtype, device=hidden_BT.device)
        self._bias_B1T = bias_BT.masked_fill_(hidden_BT, float("-inf"))[:, None]
        self._place_B = self._start_B[: self.active] + position_B
        self.length_B[: self.active] += 1
        return position_B

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        """Here N is B: one token per slot."""
        assert self._bias_B1T is not None
        heads, batch, dim = k_HND.shape
        columns = self._bias_B1T.shape[-1]
        keys, values = self.keys[layer], self.values[layer]
        keys.view(-1, heads, dim).index_copy_(0, self._place_B, k_HND.transpose(0, 1))
        values.view(-1, heads, dim).index_copy_(0, self._place_B, v_HND.transpose(0, 1))
        # The query heads that share a key head stand where query tokens would: no key is copied.
        q_BHRD = q_HND.view(heads, -1, batch, dim).permute(2, 0, 1, 3)
        out_BHRD = scaled_dot_product_attention(
            q_BHRD,
            keys[:batch, :columns].transpose(1, 2),
            values[:batch, :columns].transpose(1, 2),
            attn_mask=self._bias_B1T[:, None],
            scale=scale,
        )
        return out_BHRD.reshape(batch, -1, dim)
