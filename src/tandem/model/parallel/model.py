"""A language model of which each process has a part: the same methods as the whole one, called by all at once."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tandem.errors import ConfigError
from tandem.model.attention import Layout, Rows, lay
from tandem.model.flex import Documents
from tandem.model.language_model import LanguageModel
from tandem.model.logprobs import chosen_logprobs, slices
from tandem.model.parallel import tensor
from tandem.model.parallel.context import Cut, spread
from tandem.model.parallel.folder import write_adapter, write_folder
from tandem.model.parallel.grid import Grid
from tandem.model.parallel.mesh import local
from tandem.model.parallel.shard import Root, fully_shard_all, on_grid


class ShardedModel(LanguageModel):
    """Takes a model whose weights are whole or have no storage yet (meta device), and keeps this process's part."""

    def __init__(
        self,
        module: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        grid: Grid,
        where: str,
    ) -> None:
        super().__init__(module, tokenizer, source)
        self.mesh = self.grid = grid
        self._sequence = grid.tensor.size > 1 and grid.layout.sequence
        check_heads(self.network, grid, where)
        self.parts = tensor.split(module, self.network, grid.tensor, self._sequence, where)
        self.root = Root(module)
        fully_shard_all(self.root, self.decoder.layers, grid)
        self._place()

    def _place(self) -> None:
        """Give storage to weights that have none, and bring the others to where they belong."""
        keeps_host = self.grid.layout.offload_parameters
        device = torch.device("cpu") if keeps_host else self.grid.device
        self.root._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        for buffer_owner in self.root.modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, name, buffer.to(self.grid.device))
        self.network.tie_weights()

    @property
    def device(self) -> torch.device:
        return self.grid.device

    def token_logprobs(
        self,
        tokens_BT: Tensor,
        mask_BT: Tensor,
        length_B: Tensor,
        *,
        prompt_length_B: Tensor | None = None,
        group_B: Tensor | None = None,
        temperature: float,
        logits_bytes: int,
        entropy_gradient: bool = False,
        attention: str = "padded",
    ) -> tuple[Tensor, Tensor]:
        """As `tandem.model.token_logprobs`; the result and its gradient are those of one process."""
        padded = lay(length_B, prompt_length_B, group_B)
        layout = Documents(padded) if attention == "documents" else padded
        line_N, masked_N = layout.line(tokens_BT), layout.line(mask_BT)

        def head(hidden_MH: Tensor, chosen_M: Tensor) -> tuple[Tensor, Tensor]:
            return self.chosen_logprobs(self.logits(hidden_MH) / temperature, chosen_M, entropy_gradient)

        def heads(hidden_MH: Tensor, chosen_M: Tensor) -> tuple[Tensor, ...]:
            size = max(1, logits_bytes // (4 * self.logits_width))
            if len(chosen_M) <= size:
                return head(hidden_MH, chosen_M)
            parts = [
                checkpoint(head, hidden_MH[cut], chosen_M[cut], use_reentrant=False)
                for cut in slices(len(chosen_M), size)
            ]
            return tuple(torch.cat(column) for column in zip(*parts))

        logp_M, entropy_M = self.at(line_N, layout, layout.previous_N[masked_N], heads, line_N[masked_N])
        empty_BT = torch.zeros(tokens_BT.shape, device=tokens_BT.device)
        return empty_BT.masked_scatter(mask_BT, logp_M), empty_BT.masked_scatter(mask_BT, entropy_M)

    def at(
        self,
        line_N: Tensor,
        layout: Layout,
        at_M: Tensor,
        head: Callable[..., tuple[Tensor, ...]],
        *columns_M: Tensor,
    ) -> tuple[Tensor, ...]:
        """`head(hidden, *columns)` at places of the line: [M] each, the same on all processes. The head runs where
        the weights are gathered, once for the places that are held here."""
        return self.root(self._at, line_N, layout, at_M, head, *columns_M)

    def _at(
        self,
        line_N: Tensor,
        layout: Layout,
        at_M: Tensor,
        head: Callable[..., tuple[Tensor, ...]],
        *columns_M: Tensor,
    ) -> tuple[Tensor, ...]:
        cut = self._cut(len(line_N))
        hidden_nH = self._hidden(cut, line_N, layout)
        mine_M = cut.mine(at_M)
        hidden_mH = hidden_nH.index_select(0, cut.local(at_M[mine_M]))
        made = head(hidden_mH, *(column_M[mine_M] for column_M in columns_M))
        return tuple(cut.join(values_m, mine_M) for values_m in made)

    @property
    def logits_width(self) -> int:
        """Columns of what `logits` returns: this process's part of the vocabulary."""
        return self.vocab_size // self.grid.tensor.size

    def chosen_logprobs(
        self, logits_MV: Tensor, chosen_M: Tensor, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each chosen token and the entropy in nats, from what `logits` returns."""
        if self.grid.tensor.size > 1:
            return tensor.chosen_logprobs(logits_MV, chosen_M, self.grid.tensor, entropy_gradient)
        return chosen_logprobs(logits_MV, chosen_M, entropy_gradient)

    def _cut(self, tokens: int) -> Cut:
        return Cut(tokens, self.grid.context, self.grid.tensor.size if self._sequence else 1)

    def _hidden(self, cut: Cut, line_N: Tensor, layout: Layout) -> Tensor:
        """[n, hidden] of this process's tokens; inside the root."""
        return self.hidden(cut(line_N), cut(layout.position_N), spread(layout, cut))

    def gradient_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Completes the gradients (this process's parts, by name) in place, and returns the norm over the model."""
        tensor.sum_parts(gradients, self.parts, self.grid.tensor)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, gradient in gradients.items():
            # How many processes hold these very values.
            copies = self.grid.replicate * (self.grid.tensor.size if self.parts[name].dim is None else 1)
            total += torch.linalg.vector_norm(gradient.float()).to(total).square() / copies
        dist.all_reduce(total)
        return total.sqrt().float()

    def whole(self, name: str, weight: Tensor) -> Tensor:
        return on_grid(local(weight), weight, self.parts[name], self.grid).full_tensor()

    @torch.no_grad()
    def take_over(self, other: LanguageModel) -> None:
        """Copy the weights of a model of the same shape and any layout."""
        ours = {self.hf_name(name): (name, weight) for name, weight in self.module.named_parameters()}
        for hf_name, values in other.weights():
            name, weight = ours[hf_name]
            piece = on_grid(local(weight), weight, self.parts[name], self.grid)
            everywhere = type(piece).from_local(values.to(self.device), self.grid.weights, run_check=False)
            local(weight).copy_(everywhere.redistribute(placements=piece.placements).to_local())

    def save(self, folder: Path) -> None:
        if isinstance(self.module, PeftModel):
            return write_adapter(folder, self)
        write_folder(folder, self)

    def save_merged(self, folder: Path) -> None:
        write_folder(folder, self)

    @torch.no_grad()
    def check_forward(self) -> None:
        tokens_N = torch.arange(min(8, self.vocab_size), device=self.device)
        rows = Rows(torch.tensor([len(tokens_N)], device=self.device))
        ours_nV, theirs_nV = self.root(self._both_forwards, tokens_N, rows)
        capped = getattr(self.network.config, "final_logit_softcapping", None) is not None
        if capped or not torch.allclose(ours_nV, theirs_nV, atol=1e-4, rtol=1e-4):
            raise ConfigError(self.changes_logits)

    def _both_forwards(self, tokens_N: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        cut = self._cut(len(tokens_N))
        ours_nV = self.logits(self._hidden(cut, tokens_N, rows))
        theirs = self.network(
            input_ids=cut(tokens_N)[None],
            position_ids=cut(rows.position_N)[None],
            use_cache=False,
            layout=spread(rows, cut),
        )
        return ours_nV, theirs.logits[0].float()


def check_heads(network: PreTrainedModel, grid: Grid, where: str) -> None:
    heads, split = network.config.num_attention_heads, grid.tensor.size * grid.context.size
    if heads % split:
        raise ConfigError(
            f"{where}: tensor={grid.tensor.size} x context={grid.context.size} does not divide the model's {heads} "
            f"attention heads; choose them so that their product is one of "
            f"{[n for n in range(1, heads + 1) if heads % n == 0]}"
        )
