"""Attention over rows of different lengths, behind the one hook that Transformers models offer.

Models see all tokens of all rows in a single line of N tokens, so that projections never touch padding. Where
rows lie in that line is the business of a `Layout`, which reaches `attend` through the model's keyword arguments.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tandem.errors import ConfigError

NAME = "tandem"


class Layout(Protocol):
    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        """Attention output [N, H, D] for one layer; keys and values have fewer heads than queries."""
        ...


class Rows:
    """Rows of a right-padded batch, laid end to end; each attends to itself alone, causally."""

    def __init__(self, length_B: Tensor) -> None:
        rows, longest = len(length_B), int(length_B.max())
        column_T = torch.arange(longest, device=length_B.device)
        self.real_BT = column_T < length_B[:, None]
        self.padless = bool(self.real_BT.all())
        self.shape = (rows, longest)
        self.position_N = column_T.expand(rows, longest)[self.real_BT]
        start_B = length_B.cumsum(0) - length_B
        # Padding borrows the row's last token: causality hides it from all others, its output is dropped.
        last_B1 = (length_B - 1)[:, None]
        self.source = (start_B[:, None] + torch.minimum(column_T, last_B1)).flatten()
        self.flat_N = self.real_BT.flatten().nonzero().squeeze(1)

    def line(self, values_BT: Tensor) -> Tensor:
        """[B, T] -> [N], padding left out."""
        return values_BT[self.real_BT]

    def _square(self, x_HND: Tensor) -> Tensor:
        heads, _, dim = x_HND.shape
        padded = x_HND if self.padless else x_HND.index_select(1, self.source)
        return padded.view(heads, *self.shape, dim).transpose(0, 1)

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        out_BHTD = scaled_dot_product_attention(
            self._square(q_HND),
            self._square(k_HND),
            self._square(v_HND),
            is_causal=True,
            scale=scale,
            enable_gqa=q_HND.shape[0] != k_HND.shape[0],
        )
        out_LHD = out_BHTD.transpose(1, 2).flatten(0, 1)
        return out_LHD if self.padless else out_LHD.index_select(0, self.flat_N)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: Layout,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that Transformers calls in every layer, with one batch row that holds all tokens.

    A sliding window needs nothing here: rows are never longer than it (`LanguageModel.max_positions`).
    """
    if softcap is not None or s_aux is not None:
        raise ConfigError(
            f"model.path: {type(module).__name__} caps its attention scores or adds sinks to them, which is not "
            "supported; use a Qwen2, Qwen2.5, Qwen3 or Llama model"
        )
    layer = module.layer_idx
    assert isinstance(layer, int)
    out_NHD = layout.attend(layer, query[0], key[0], value[0], scaling)
    return out_NHD[None], None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
