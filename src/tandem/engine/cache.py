"""Keys and values of the answers that decode now: one slot per answer, prompt and answer side by side."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tandem.model.attention import Rows


class Prefill(Rows):
    """Rows that keep their keys and values; each layer is [rows, heads, T, D]."""

    def __init__(self, length_B: Tensor) -> None:
        super().__init__(length_B)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        self.keys.append(self.square(k_HND))
        self.values.append(self.square(v_HND))
        return super().attend(layer, q_HND, k_HND, v_HND, scale)


class Slots:
    """A preallocated cache and the layout of one decoding step: slot b holds `length_B[b]` tokens so far.

    The step's token of each of the first `active` slots is written at its own position and attends to all
    earlier ones of its slot.
    """

    def __init__(self, layers: int, slots: int, heads: int, columns: int, dim: int, like: Tensor) -> None:
        self.keys = [like.new_zeros(slots, heads, columns, dim) for _ in range(layers)]
        self.values = [like.new_zeros(slots, heads, columns, dim) for _ in range(layers)]
        self.length_B = torch.zeros(slots, dtype=torch.long, device=like.device)
        self.active = 0
        self._bias_BT: Tensor | None = None
        self._row_B = torch.arange(slots, device=like.device)
        self._column_T = torch.arange(columns, device=like.device)

    def put(self, slot: int, keys: list[Tensor], values: list[Tensor]) -> None:
        """Start a slot with a prompt's keys and values, each [heads, T, D]."""
        columns = keys[0].shape[1]
        for cache, new in zip((*self.keys, *self.values), (*keys, *values)):
            cache[slot, :, :columns] = new
        self.length_B[slot] = columns

    def keep(self, slots: list[int]) -> None:
        """Move the given slots to the front, in order, and forget the others."""
        index = torch.tensor(slots, dtype=torch.long, device=self.length_B.device)
        columns = int(self.length_B[index].max()) if slots else 0
        for cache in (*self.keys, *self.values):
            cache[: len(slots), :, :columns] = cache[index, :, :columns]
        self.length_B[: len(slots)] = self.length_B[index]
        self.active = len(slots)

    def begin(self) -> Tensor:
        """Prepare a step; returns the position of its token in each active slot."""
        # A slot whose answer has ended idles on, at the last column at most, until it is taken again.
        position_B = self.length_B[: self.active].clamp(max=len(self._column_T) - 1)
        columns = int(position_B.max()) + 1
        hidden_BT = self._column_T[:columns] > position_B[:, None]
        self._bias_BT = torch.zeros(hidden_BT.shape, dtype=self.keys[0].dtype, device=hidden_BT.device)
        self._bias_BT.masked_fill_(hidden_BT, float("-inf"))
        self._position_B = position_B
        self.length_B[: self.active] += 1
        return position_B

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        """Here N is B: one token per slot."""
        assert self._bias_BT is not None
        heads, batch, dim = k_HND.shape
        columns = self._bias_BT.shape[1]
        row_B = self._row_B[:batch]
        self.keys[layer][row_B, :, self._position_B] = k_HND.transpose(0, 1)
        self.values[layer][row_B, :, self._position_B] = v_HND.transpose(0, 1)
        # The query heads that share a key head stand where query tokens would: no key is copied.
        q_BHRD = q_HND.view(heads, -1, batch, dim).permute(2, 0, 1, 3)
        out_BHRD = scaled_dot_product_attention(
            q_BHRD,
            self.keys[layer][:batch, :, :columns],
            self.values[layer][:batch, :, :columns],
            attn_mask=self._bias_BT[:, None, None, :],
            scale=scale,
        )
        return out_BHRD.reshape(batch, -1, dim)
