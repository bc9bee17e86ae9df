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
SCORES = 20 * 2**20
"""Bytes of a layer's probabilities up to which a CPU is faster when it writes them out than by PyTorch's kernel for
masks: they are still in its cache when the next product needs them."""


class Layout(Protocol):
    """Where the tokens of a line of N stand in their rows."""

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
        self.row_N = torch.arange(rows, device=length_B.device).repeat_interleave(length_B)
        self.end_B = length_B.cumsum(0)
        self.previous_N = torch.arange(int(self.end_B[-1]), device=length_B.device) - 1
        """Where in the line the token before each token is; meaningless at the first of a row."""
        # Padding borrows the row's last token: causality hides it from all others, its output is dropped.
        last_B1 = (length_B - 1)[:, None]
        self.source = ((self.end_B - length_B)[:, None] + torch.minimum(column_T, last_B1)).flatten()
        self.flat_N = self.real_BT.flatten().nonzero().squeeze(1)

    def line(self, values_BT: Tensor) -> Tensor:
        """[B, T] -> [N], padding left out."""
        return values_BT[:, : self.shape[1]][self.real_BT]

    def square(self, x_HND: Tensor) -> Tensor:
        """[H, N, D] -> [B, H, T, D]."""
        heads, _, dim = x_HND.shape
        padded = x_HND if self.padless else x_HND.index_select(1, self.source)
        return padded.view(heads, *self.shape, dim).transpose(0, 1)

    def flat(self, x_BHTD: Tensor) -> Tensor:
        """[B, H, T, D] -> [N, H, D]."""
        out_LHD = x_BHTD.transpose(1, 2).flatten(0, 1)
        return out_LHD if self.padless else out_LHD.index_select(0, self.flat_N)

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        q, k, v = self.square(q_HND), self.square(k_HND), self.square(v_HND)
        gqa = q.shape[1] != k.shape[1]
        return self.flat(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa))


class Branches:
    """Rows that share beginnings: every prompt once, then what follows it in each of its rows.

    The line is all prompts end to end, then all answers end to end. A prompt attends to itself, an answer to its
    prompt and itself; so the numbers are those of `Rows`, from fewer tokens.
    """

    def __init__(self, length_B: Tensor, prompt_length_B: Tensor, group_B: Tensor) -> None:
        _, prompt_B = group_B.unique(return_inverse=True)
        prompts = int(prompt_B.max()) + 1
        rows = torch.arange(len(group_B), device=group_B.device)
        self.first_P = rows.new_full((prompts,), len(rows)).scatter_reduce(0, prompt_B, rows, "amin")
        self.trunk = Rows(prompt_length_B[self.first_P])
        self.leaves = Rows(length_B - prompt_length_B)
        self.prompt_B, self.prompt_length_B = prompt_B, prompt_length_B
        offset = len(self.trunk.position_N)
        column_BA = torch.arange(self.leaves.shape[1], device=group_B.device).expand(self.leaves.shape)
        self.gather_BA = prompt_length_B[:, None] + column_BA
        self.position_N = torch.cat([self.trunk.position_N, self.leaves.line(self.gather_BA)])
        before_N = self.leaves.previous_N + offset
        before_N[self.leaves.end_B - (length_B - prompt_length_B)] = self.trunk.end_B[prompt_B] - 1
        self.previous_N = torch.cat([self.trunk.previous_N, before_N])
        self.bias_BAC = self._bias(self.trunk.shape[1], self.leaves.shape[1])

    def _bias(self, prompt_columns: int, answer_columns: int) -> Tensor:
        """Zero where an answer's token may look, -inf elsewhere; columns are the prompt's, then the answer's."""
        device = self.prompt_length_B.device
        column_C = torch.arange(prompt_columns + answer_columns, device=device)
        row_A1 = torch.arange(answer_columns, device=device)[:, None] + prompt_columns
        in_prompt_BC = column_C < self.prompt_length_B[:, None]
        in_answer_AC = (column_C >= prompt_columns) & (column_C <= row_A1)
        seen_BAC = in_prompt_BC[:, None, :] | in_answer_AC
        return torch.zeros(seen_BAC.shape, device=device).masked_fill_(~seen_BAC, float("-inf"))

    def line(self, values_BT: Tensor) -> Tensor:
        """[B, T] -> [N]: the prompts by their first row, then the answers."""
        last = values_BT.shape[1] - 1
        answers_BA = values_BT.gather(1, self.gather_BA.clamp(max=last))
        return torch.cat([self.trunk.line(values_BT[self.first_P]), self.leaves.line(answers_BA)])

    def attend(self, layer: int, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        cut = len(self.trunk.position_N)
        trunk_NHD = self.trunk.attend(layer, q_HND[:, :cut], k_HND[:, :cut], v_HND[:, :cut], scale)
        q_BHAD = self.leaves.square(q_HND[:, cut:])
        k_BKCD, v_BKCD = (self._seen(x[:, :cut], x[:, cut:]) for x in (k_HND, v_HND))
        leaves_BHAD = biased(q_BHAD, k_BKCD, v_BKCD, self.bias_BAC, scale)
        return torch.cat([trunk_NHD, self.leaves.flat(leaves_BHAD)])

    def _seen(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Keys or values for each answer, [B, K, C, D]: its prompt's, then its own."""
        of_prompt = self.trunk.square(prompts).index_select(0, self.prompt_B)
        return torch.cat([of_prompt, self.leaves.square(answers)], dim=2)


def biased(q_BHAD: Tensor, k_BKCD: Tensor, v_BKCD: Tensor, bias_BAC: Tensor, scale: float) -> Tensor:
    """Attention with the bias added to the scores, [B, H, A, D]; several heads share a key head."""
    rows, heads, columns, width = q_BHAD.shape
    shared = heads // k_BKCD.shape[1]
    if not written_out(q_BHAD, heads * bias_BAC.numel()):
        bias_B1AC = bias_BAC[:, None].to(q_BHAD.dtype)
        return scaled_dot_product_attention(
            q_BHAD, k_BKCD, v_BKCD, attn_mask=bias_B1AC, scale=scale, enable_gqa=shared > 1
        )
    q_BKSD = (q_BHAD * scale).reshape(rows, -1, shared * columns, width)
    score_BKSC = q_BKSD @ k_BKCD.transpose(-1, -2)
    prob_BHAC = (score_BKSC.view(rows, heads, columns, -1) + bias_BAC[:, None]).softmax(-1)
    return (prob_BHAC.view_as(score_BKSC) @ v_BKCD).view(rows, heads, columns, -1)


def written_out(q_BHAD: Tensor, scores: int) -> bool:
    """Whether so many probabilities are computed as such."""
    plain = q_BHAD.device.type == "cpu" and q_BHAD.dtype == torch.float32
    return plain and scores * q_BHAD.element_size() <= SCORES


def lay(
    length_B: Tensor, prompt_length_B: Tensor | None = None, group_B: Tensor | None = None
) -> Rows | Branches:
    """The layout of a batch: with prompts computed once where that saves a tenth of the tokens."""
    if prompt_length_B is None or group_B is None:
        return Rows(length_B)
    _, count_P = group_B.unique(return_counts=True)
    first = group_B.sort(stable=True).indices[count_P.cumsum(0) - count_P]
    saved = int(prompt_length_B.sum() - prompt_length_B[first].sum())
    if saved * 10 < int(length_B.sum()):
        return Rows(length_B)
    return Branches(length_B, prompt_length_B, group_B)


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
