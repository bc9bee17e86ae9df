"""A language model of which each process has a part: the same methods as the whole one, called by all at once."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tandem.errors import ConfigError
from tandem.model.attention import Layout, Rows
from tandem.model.finite import check_read
from tandem.model.language_model import LanguageModel
from tandem.model.parallel import adapter, expert, tensor
from tandem.model.parallel.context import Cut, spread
from tandem.model.parallel.fit import check_fit
from tandem.model.parallel.folder import write_adapter, write_folder
from tandem.model.parallel.grid import Grid
from tandem.model.parallel.mesh import local
from tandem.model.parallel.shard import Root, fully_shard_all, on_grid, sum_copies
from tandem.types import BatchT

if TYPE_CHECKING:
    from peft import PeftModel


class ShardedModel(LanguageModel):
    """Takes a model whose weights are whole or have no storage yet (meta device), and keeps this process's part."""

    def __init__(
        self,
        module: "PreTrainedModel | PeftModel",
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        grid: Grid,
        where: str,
    ) -> None:
        super().__init__(module, tokenizer, source)
        self.mesh = self.grid = grid
        self._sequence = grid.tensor.size > 1 and grid.layout.sequence
        check_fit(grid.layout, self.network.config, grid.world, where)
        adapter.loosen(module)
        self.parts = tensor.split(module, self.network, grid.tensor, self._sequence, where)
        self.parts |= expert.split(module, grid.expert)
        self._leave_out()
        self.root = Root(module)
        fully_shard_all(self.root, self.decoder.layers, grid)
        self._place()

    def _leave_out(self) -> None:
        """Let go of the layers that are another process's."""

    def _tie(self) -> None:
        """Make output head and embedding one weight again, where they are."""
        self.network.tie_weights()

    def _place(self) -> None:
        """Give storage to weights that have none, and bring the others to where they belong."""
        keeps_host = self.grid.layout.offload_parameters
        device = torch.device("cpu") if keeps_host else self.grid.device
        self.root._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        for buffer_owner in self.root.modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, name, buffer.to(self.grid.device))
        self._tie()

    @property
    def device(self) -> torch.device:
        return self.grid.device

    def at(
        self,
        line_N: Tensor,
        layout: Layout,
        at_M: Tensor,
        head: Callable[..., tuple[Tensor, ...]],
        *columns_M: Tensor,
    ) -> tuple[Tensor, ...]:
        """As for a whole model, [M] each and the same on all processes. The head runs where the weights are gathered,
        once, for the places that are held here."""
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

    def backward_each(
        self,
        pieces: Iterable[tuple[Tensor, BatchT]],
        loss: Callable[[Tensor, BatchT], Tensor],
        after: Callable[[], None],
        *,
        attention: str = "padded",
    ) -> None:
        several = list(pieces)

        def loss_of(rows: Tensor, part: BatchT) -> Tensor:
            self.last_backward(part is several[-1][1])
            return loss(rows, part)

        super().backward_each(several, loss_of, after, attention=attention)

    def last_backward(self, last: bool) -> None:
        """Before a backward pass: whether it is the last of an update. Only then are gradients summed between copies
        of the model, once for all micro-batches, unless they are to leave the device after each."""
        layout = self.grid.layout
        if self.grid.replicate > 1 and not (layout.offload_parameters or layout.offload_gradients):
            sum_copies(self.root, last)

    @property
    def logits_width(self) -> int:
        """This process's part of the vocabulary."""
        return self.vocab_size // self.grid.tensor.size

    def chosen_logprobs(
        self, logits_MV: Tensor, chosen_M: Tensor, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.grid.tensor.size > 1:
            return tensor.chosen_logprobs(logits_MV, chosen_M, self.grid.tensor, entropy_gradient)
        return super().chosen_logprobs(logits_MV, chosen_M, entropy_gradient)

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
            total += torch.linalg.vector_norm(gradient.float()).to(total).square() / self._copies(name)
        dist.all_reduce(total)
        return total.sqrt().float()

    def _copies(self, name: str) -> int:
        """How many processes hold the very same values of a weight as this one."""
        part = self.parts[name]
        return self.grid.replicate * (self.grid.tensor.size if part.dim is None or part.expert else 1)

    def whole(self, name: str, weight: Tensor) -> Tensor:
        return on_grid(local(weight), weight, self.parts[name], self.grid).full_tensor()

    @torch.no_grad()
    def take_over(self, other: LanguageModel) -> None:
        """Copy the weights of a model of the same shape and any layout."""
        ours = {self.hf_name(name): (name, weight) for name, weight in self.module.named_parameters()}
        for hf_name, values in other.whole_weights():
            if hf_name not in ours:
                continue
            name, weight = ours[hf_name]
            piece = on_grid(local(weight), weight, self.parts[name], self.grid)
            everywhere = type(piece).from_local(values.to(self.device), piece.device_mesh, run_check=False)
            local(weight).copy_(everywhere.redistribute(placements=piece.placements).to_local())

    def save(self, folder: Path) -> None:
        if self.adapter is not None:
            return write_adapter(folder, self)
        write_folder(folder, self)

    def save_merged(self, folder: Path) -> None:
        write_folder(folder, self)

    @torch.no_grad()
    def check_forward(self) -> None:
        check_read(self)
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
