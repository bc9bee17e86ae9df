"""Pipeline parallelism: the model's layers in stages, on processes that hand on what they make of each micro-batch.

Every process sees all micro-batches, so it knows how many tokens the stage before it is going to send: lengths change
from one micro-batch to the next as they like.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tandem.model.attention import Layout
from tandem.model.finite import check_read
from tandem.model.flex import arranged
from tandem.model.head import is_tied, replace_head
from tandem.model.parallel.context import Cut, spread
from tandem.model.parallel.grid import Axis
from tandem.model.parallel.model import ShardedModel
from tandem.model.parallel.schedule import Action, Schedule, Tick
from tandem.model.parallel.tensor import Edges
from tandem.types import BatchT


class Elsewhere(nn.Module):
    """Stands where another process has a part of the model."""


class PipelinedModel(ShardedModel):
    """A process's stages of a model. What is computed behind the last layer is computed on the last process alone, and
    only inside `forward_each` and `backward_each`."""

    def _leave_out(self) -> None:
        axis, layout, decoder = self.grid.pipeline, self.grid.layout, self.decoder
        chunks = layout.pipeline_chunks
        self.schedule = Schedule(kind=layout.pipeline_schedule, ranks=axis.size, chunks=chunks)
        self._layers_of = layout.stage_layers(len(decoder.layers))
        self._dtype = self.network.dtype
        self._arrived_nH: Tensor | None = None
        """What the stage before has sent, while the last one computes."""
        self._first, self._last = axis.rank == 0, axis.rank == axis.size - 1
        named = self.module.named_parameters() if is_tied(self.network) else ()
        self._tied = {name for name, weight in named if weight is decoder.embed_tokens.weight}
        for stage in range(self.schedule.stages):
            if stage % axis.size != axis.rank:
                for layer in self._layers_of[stage]:
                    decoder.layers[layer] = Elsewhere()
        if not (self._first or (self._last and self._tied)):
            decoder.embed_tokens = Elsewhere()
        if not self._last:
            decoder.norm = Elsewhere()
            replace_head(self.network, Elsewhere())

    def _tie(self) -> None:
        if self._last and self._tied:
            self.head.weight = self.decoder.embed_tokens.weight

    def check_forward(self) -> None:
        """`check_fit` has let in only models whose layers follow each other as `_through` has them."""
        check_read(self)

    def forward_each(
        self,
        pieces: Iterable[tuple[Tensor, BatchT]],
        work: Callable[[Tensor, BatchT], object],
        *,
        attention: str = "padded",
    ) -> None:
        _Flow(self, list(pieces), work, attention).run(train=False)

    def backward_each(
        self,
        pieces: Iterable[tuple[Tensor, BatchT]],
        loss: Callable[[Tensor, BatchT], Tensor],
        after: Callable[[], None],
        *,
        attention: str = "padded",
    ) -> None:
        _Flow(self, list(pieces), loss, attention, after).run(train=True)

    def with_arrived(
        self, arrived_nH: Tensor, work: Callable[[Tensor, BatchT], Tensor], rows: Tensor, part: BatchT
    ) -> Tensor:
        """`work` behind the last layer, where this is what the stage before it has sent."""
        self._arrived_nH = arrived_nH
        made = work(rows, part)
        self._arrived_nH = None
        return made

    def _hidden(self, cut: Cut, line_N: Tensor, layout: Layout) -> Tensor:
        return self._through(self.schedule.stages - 1, self._arrived_nH, cut, line_N, layout)

    def _through(
        self, stage: int, arrived_nH: Tensor | None, cut: Cut, line_N: Tensor, layout: Layout
    ) -> Tensor:
        """[n, hidden] of this process's tokens behind the layers of a stage; inside the root."""
        decoder, position_1n = self.decoder, cut(layout.position_N)[None]
        x_1nH = decoder.embed_tokens(cut(line_N)[None]) if arrived_nH is None else arrived_nH[None]
        angles = decoder.rotary_emb(x_1nH, position_ids=position_1n)
        spread_out = spread(layout, cut)
        for layer in self._layers_of[stage]:
            x_1nH = decoder.layers[layer](
                x_1nH,
                attention_mask=None,
                position_ids=position_1n,
                position_embeddings=angles,
                use_cache=False,
                layout=spread_out,
            )
        if stage == self.schedule.stages - 1:
            x_1nH = decoder.norm(x_1nH)
            if self.grid.tensor.size > 1:
                x_1nH = Edges(axis=self.grid.tensor, sequence=self._sequence).into(x_1nH)
        return x_1nH[0]

    def buffer(self, cut: Cut) -> Tensor:
        """Room for what arrives for a line that is cut so."""
        tokens = cut.size // (self.grid.tensor.size if self._sequence else 1)
        width = self.network.config.hidden_size
        return torch.empty(tokens, width, dtype=self._dtype, device=self.device)

    def gradient_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        for name in self._tied & gradients.keys() if self._first or self._last else ():
            _add_other_end(gradients[name], self.grid.pipeline)
        return super().gradient_norm(gradients)

    def _copies(self, name: str) -> int:
        return super()._copies(name) * (2 if name in self._tied else 1)

    def wholes(self, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        return _from_all(super().wholes(named), self.grid.pipeline, self.device)

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        return _from_all(super().whole_weights(), self.grid.pipeline, self.device)


class _Flow:
    """The way of some micro-batches through the stages, there and, to train, back."""

    def __init__(
        self,
        model: PipelinedModel,
        pieces: Sequence[tuple[Tensor, BatchT]],
        work: Callable[[Tensor, BatchT], object],
        attention: str,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.pieces, self.work, self.after = model, pieces, work, after
        self.attention = attention
        self.schedule, self.axis = model.schedule, model.grid.pipeline
        self.last = self.schedule.stages - 1
        self._lines = [self._line(part) for _, part in pieces]
        self._arriving: dict[Action, tuple[Tensor, list[dist.Work]]] = {}
        """By the pass that makes it."""
        self._leaving: deque[tuple[Tensor, list[dist.Work]]] = deque()
        self._held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        """What came in and what went out, by stage and micro-batch, until the way back."""

    def run(self, *, train: bool) -> None:
        for tick in self.schedule.ticks(len(self.pieces), train=train):
            action, made_nH = tick[self.axis.rank], None
            if action is not None:
                made_nH = self._backward(action) if action.backward else self._forward(action, train)
            self._send_on(tick, made_nH)
        for _, works in self._leaving:
            _wait(works)

    def _line(self, part: BatchT) -> tuple[Cut, Tensor, Layout]:
        layout = arranged(self.attention, part.length_B, part.prompt_length_B, part.group_B)
        line_N = layout.line(part.tokens_BT)
        return self.model._cut(len(line_N)), line_N, layout

    def _forward(self, action: Action, train: bool) -> Tensor | None:
        stage, part = action.stage, action.part
        arrived_nH = self._take(Action(False, stage - 1, part)) if stage else None
        if arrived_nH is not None:
            arrived_nH.requires_grad_(train)
        if stage == self.last:
            made = self.model.with_arrived(arrived_nH, self.work, *self.pieces[part])
        else:
            made = self.model.root(self.model._through, stage, arrived_nH, *self._lines[part])
        if train:
            self._held[stage, part] = arrived_nH, made
        return None if stage == self.last else made.detach()

    def _backward(self, action: Action) -> Tensor | None:
        stage, part = action.stage, action.part
        arrived_nH, made = self._held.pop((stage, part))
        gradient = None if stage == self.last else self._take(Action(True, stage + 1, part))
        self.model.last_backward(part == len(self.pieces) - 1)
        # Before the first adapter there is nothing to train.
        if made.requires_grad:
            torch.autograd.backward(made, gradient)
        self.after()
        return None if arrived_nH is None else arrived_nH.grad

    def _take(self, made_by: Action) -> Tensor:
        arrived_nH, works = self._arriving.pop(made_by)
        _wait(works)
        return arrived_nH

    def _send_on(self, tick: Tick, made_nH: Tensor | None) -> None:
        """What all processes have made meanwhile goes to where it is needed. All of a tick is posted at once, in the
        same order everywhere, so no process waits for one that waits for it."""
        operations, arriving = [], {}
        for sender, action in enumerate(tick):
            to = None if action is None else self.schedule.next_stage(action)
            if to is None:
                continue
            if sender == self.axis.rank:
                leaving = made_nH.contiguous()
                operations.append(self._operation(dist.isend, leaving, to % self.axis.size))
            elif to % self.axis.size == self.axis.rank:
                arriving[action] = self.model.buffer(self._lines[action.part][0])
                operations.append(self._operation(dist.irecv, arriving[action], sender))
        if not operations:
            return
        works = dist.batch_isend_irecv(operations)
        self._arriving |= {action: (buffer_nH, works) for action, buffer_nH in arriving.items()}
        if made_nH is not None:
            self._leaving.append((made_nH, works))
        while len(self._leaving) > self.axis.size:
            _wait(self._leaving.popleft()[1])

    def _operation(self, what: Callable[..., dist.Work], x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(what, x, group=self.axis.group, group_peer=peer)


def _wait(works: list[dist.Work]) -> None:
    """Empties the list, which those who wait for the same share: Gloo never returns from waiting a second time."""
    while works:
        works.pop().wait()


def _add_other_end(gradient: Tensor, axis: Axis) -> None:
    """On the two ends of a pipeline: the sum of what both have, in place."""
    if not gradient.numel():
        return
    peer, theirs = axis.size - 1 - axis.rank, torch.empty_like(gradient)
    mine = gradient.contiguous()
    both = [
        dist.P2POp(what, x, group=axis.group, group_peer=peer)
        for what, x in ((dist.isend, mine), (dist.irecv, theirs))
    ]
    _wait(dist.batch_isend_irecv(both))
    gradient.add_(theirs)


def _from_all(
    mine: Iterator[tuple[str, Tensor]], axis: Axis, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """What all processes of a pipeline have, one after another; of what several have, the first one's."""
    seen = set()
    for stage in range(axis.size):
        here = stage == axis.rank
        while True:
            found = next((item for item in mine if item[0] not in seen), None) if here else None
            said = [None if found is None else (found[0], found[1].shape, found[1].dtype)]
            dist.broadcast_object_list(said, group_src=stage, group=axis.group)
            if said[0] is None:
                break
            name, shape, dtype = said[0]
            whole = found[1].contiguous() if here else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(whole, group_src=stage, group=axis.group)
            seen.add(name)
            yield name, whole
