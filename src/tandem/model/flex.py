"""Attention over a line of tokens with FlexAttention: a mask of documents instead of padded rows.

On CUDA it is compiled to one kernel that skips what no token may see. Elsewhere it runs as plain operations that make
all scores, which is what the tests compare with the padded layouts.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tandem.model.attention import Branches, Rows, lay


class Documents:
    """The line of a padded layout, attended without its padding."""

    def __init__(self, layout: Rows | Branches) -> None:
        self.layout = layout
        self.position_N, self.previous_N = layout.position_N, layout.previous_N
        document_N, trunk_N = documents(layout)

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = (document_N[key] == document_N[query]) | (document_N[key] == trunk_N[query])
            return same & (key <= query)

        size = len(document_N)
        self.mask: BlockMask = create_block_mask(seen, None, None, size, size, device=document_N.device)

    def line(self, values_BT: Tensor) -> Tensor:
        return self.layout.line(values_BT)

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        kernel = compiled() if q_HND.device.type == "cuda" else flex_attention
        gqa = q_HND.shape[0] != k_HND.shape[0]
        out_1HND = kernel(
            q_HND[None], k_HND[None], v_HND[None], block_mask=self.mask, scale=scale, enable_gqa=gqa
        )
        return out_1HND[0].transpose(0, 1)


def arranged(
    attention: str, length_B: Tensor, prompt_length_B: Tensor | None = None, group_B: Tensor | None = None
) -> Rows | Branches | Documents:
    """The layout of a batch under `learner.attention`; other arguments as for `lay`."""
    padded = lay(length_B, prompt_length_B, group_B)
    return Documents(padded) if attention == "documents" else padded


def documents(layout: Rows | Branches) -> tuple[Tensor, Tensor]:
    """For each token the document that it is of, and the one that this document goes on from (itself for none)."""
    if isinstance(layout, Rows):
        document_N = layout.row_N
        return document_N, document_N
    prompts = len(layout.first_P)
    leaf_N = layout.leaves.row_N
    document_N = torch.cat([layout.trunk.row_N, prompts + leaf_N])
    return document_N, torch.cat([layout.trunk.row_N, layout.prompt_B[leaf_N]])


@cache
def compiled() -> Callable[..., Tensor]:
    # Lines have a new length in every micro-batch.
    return torch.compile(flex_attention, dynamic=True)
