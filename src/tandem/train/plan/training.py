"""Seconds of the learner's passes in a layout: products, and what its processes say to each other."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.config.sections import Optimizer
from tandem.model.load import DTYPES
from tandem.train.footprint import FLOAT, Shape, held
from tandem.train.plan.axes import Axes
from tandem.train.plan.device import Rates
from tandem.train.plan.link import Links
from tandem.train.plan.stages import Stages, fullest_of, stages_of
from tandem.train.plan.work import Lengths, Tokens, forward, share, update

OPTIMIZER_BYTES = 28
"""Read and written for each trained weight in an update: two moments, master, gradient, weight."""
BETWEEN_BYTES = 80
"""Read and written for each number of a token's hidden state by the two norms and the two sums of a layer, forward; and
twice as much backward."""
TURN_COPIES = 4
"""Times that what attention's heads exchange is read or written, to be in order before and after."""
INDEX = 8
"""Bytes of a number that counts or chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Seconds of one pass over a step's answers."""

    products: float = 0.0
    layers: float = 0.0
    """Communication inside the layers, which nothing hides: tensor, context and expert."""
    weights: float = 0.0
    """Gathering weights and summing gradients, which runs beside the products."""
    bubble: float = 0.0
    """Waiting while a pipeline fills and drains."""
    optimizer: float = 0.0
    hidden: bool = True
    """What runs beside the products hides behind them."""

    @property
    def seconds(self) -> float:
        return self.products + self.exposed + self.bubble + self.optimizer

    @property
    def exposed(self) -> float:
        """Of them, those spent on communication."""
        beside = self.products + self.layers if self.hidden else 0.0
        return self.layers + max(0.0, self.weights - beside)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A model on the learners of a run, in one layout."""

    run: Run
    shape: Shape
    lengths: Lengths
    axes: Axes
    rates: Rates
    links: Links
    layout: Layout
    optimizer: Optimizer | None
    """Of a model that learns."""

    def update(self, spared: float = 0.0) -> Pass:
        """All updates of a step; in the first, this share of the forward pass's products is known from sampling."""
        tokens, learner = share(self.run, self.lengths, self.axes.data), self.run.learner
        whole, layers = (update(self.run, shape, tokens).total for shape in self._shapes)
        passes = 2 + learner.checkpointing
        products = self._shared(whole, layers, self.rates.update, self._repeated(tokens, 1 + passes))
        one = self._pass(tokens, products, passes, gathers=2, learns=True)
        every = times(one, learner.updates_per_step * learner.epochs_per_step)
        known = spared * forward(self.shape, tokens).products / self.rates.forward
        return replace(every, products=every.products - known)

    def reading(self) -> Pass:
        """A forward pass over a step's answers: log-probabilities, or values."""
        tokens = share(self.run, self.lengths, self.axes.data)
        whole, layers = (forward(shape, tokens).total for shape in self._shapes)
        products = self._shared(whole, layers, self.rates.forward, self._repeated(tokens, 1))
        return times(self._pass(tokens, products, 1, gathers=1), self.run.learner.updates_per_step)

    @property
    def _shapes(self) -> tuple[Shape, Shape]:
        """With and without the output head."""
        return self.shape, replace(self.shape, head=0)

    def _shared(self, whole: float, layers: float, rate: float, more: float) -> list[float]:
        """Seconds of each process of the pipeline for operations of which those of all `layers` are shared out, and
        the others are the last one's; and `more` for each of its layers."""
        here = rate * self.axes.tensor * self.axes.context
        return [
            (layers * stages.layers / self.shape.layers + (whole - layers) * stages.last) / here
            + more * stages.layers
            for stages in stages_of(self.axes, self.shape.layers)
        ]

    def _repeated(self, tokens: Tokens, times: int) -> float:
        """Seconds for a layer's norms and sums so many times, of the tokens that a process would not have if `tensor`
        shared them out. Those that it would have are in the rates."""
        axes = self.axes
        more = 1 / axes.token_shares(self.layout.sequence) - 1 / axes.tensor
        numbers = more * tokens.line / axes.context * self.shape.hidden
        return times * numbers * BETWEEN_BYTES / self.rates.bandwidth

    def _pass(
        self, tokens: Tokens, products: list[float], passes: int, *, gathers: int, learns: bool = False
    ) -> Pass:
        """`products` are seconds of each process of the pipeline."""
        parts, chunks, ranks = tokens.forwards, self.axes.pipeline_chunks, self.axes.pipeline
        most, joining = max(products), parts * (passes * self._joining(tokens) + self._choosing(tokens))
        joining += parts * (passes - learns) * self._announcing(tokens)
        moving = parts * gathers * self.gathering()
        if learns:
            moving += parts * self._scattering()
        between = self._between() if learns else 0.0
        if self.layout.offload_parameters:
            between += parts * gathers * self._held[0] * self._word / self.rates.host
        if self.rates.exchanges is not None:
            joining, moving = joining + moving, 0.0
        # While the first micro-batch comes and the last one goes, the others' stages are at work. Interleaved stages
        # take turns after as many micro-batches as there are processes, be they there or not.
        others = sum(products) - most + (ranks - 1) * joining
        turns = (chunks - 1) * (-parts % ranks) * (most + joining)
        return Pass(
            products=most,
            layers=joining,
            weights=moving + between,
            bubble=(others + turns) / (parts * chunks),
            optimizer=self._optimizer() if learns else 0.0,
            hidden=self.rates.exchanges is None,
        )

    @property
    def _word(self) -> int:
        return DTYPES[self.run.model.dtype].itemsize

    @cached_property
    def _most(self) -> Stages:
        """Those of the process that has the most weights."""
        return max(fullest_of(self.axes, self.shape.layers), key=lambda stages: held(self.shape, stages)[0])

    @cached_property
    def _held(self) -> tuple[int, int]:
        """Weights on that process, and trained ones among them."""
        return held(self.shape, self._most)

    @cached_property
    def _layers(self) -> int:
        """Of the process that has the most."""
        return max(stages.layers for stages in fullest_of(self.axes, self.shape.layers))

    def _joining(self, tokens: Tokens) -> float:
        """Communication of the forward pass of one micro-batch inside the layers of a stage; backward it is as much."""
        axes, shape, layers = self.axes, self.shape, self._layers
        line = tokens.line / tokens.forwards / axes.context
        wide = line * shape.hidden * self._word
        joined = turned = routed = between = 0.0
        if axes.tensor > 1:
            # Around attention and a feed-forward that is split, and before and after the layers.
            joined = ((1 if shape.experts else 2) * layers + 1) * self._into_and_out(wide)
        if axes.context > 1:
            query, key_value = shape.query / axes.tensor, shape.key_value / shape.layers / axes.tensor
            for width in (query + key_value, query):
                size = line * width * self._word
                turned += layers * self.links.exchange(size, axes.context, axes.tensor)
                turned += layers * TURN_COPIES * size / self.rates.bandwidth
        if axes.expert > 1:
            copies = shape.active * wide / axes.tensor
            routed = 2 * layers * self.links.exchange(copies, axes.expert, axes.tensor)
        if axes.pipeline > 1:
            size = wide / axes.token_shares(self.layout.sequence)
            between = axes.pipeline_chunks * self.links.send(size, axes.world // axes.pipeline)
        return joined + turned + routed + between

    def _announcing(self, tokens: Tokens) -> float:
        """Before the copies of one micro-batch come forward: how many, and for which of a process's experts each."""
        axes = self.axes
        if axes.expert == 1:
            return 0.0
        copies = self.shape.active * tokens.line / tokens.forwards / axes.context / axes.tensor
        sizes = (axes.expert * INDEX, copies * INDEX)
        return self._layers * sum(self.links.exchange(size, axes.expert, axes.tensor) for size in sizes)

    def _choosing(self, tokens: Tokens) -> float:
        """Two sums, for everyone, of numbers of the predicted tokens of one micro-batch, behind the output head."""
        size = tokens.predicted / tokens.forwards * FLOAT
        axes = self.axes
        over_context = self.links.all_reduce(size, axes.context, axes.tensor)
        return 2 * (over_context + self.links.all_reduce(size, axes.tensor, 1))

    def _into_and_out(self, size_bytes: float) -> float:
        """Of a part that `tensor` splits: all tokens are gathered, and the sums go to those that have them; or sums for
        everyone on the way there or back."""
        tensor = self.axes.tensor
        if self.axes.token_shares(self.layout.sequence) == 1:
            return self.links.all_reduce(size_bytes, tensor, 1)
        return self.links.all_gather(size_bytes, tensor, 1) + self.links.reduce_scatter(size_bytes, tensor, 1)

    def gathering(self) -> float:
        """Seconds to gather what each process holds of a stage, layer by layer and then the rest."""
        return self._moving(self._held[0], self._word, self.links.all_gather)

    def _scattering(self) -> float:
        """Seconds to sum gradients within the shards, in float32."""
        return self._moving(self._held[1], FLOAT, self.links.reduce_scatter)

    def _moving(self, held_here: int, word: int, move: Callable[[float, int, int], float]) -> float:
        axes, shape = self.axes, self.shape
        if axes.cut == 1:
            return 0.0
        stage, layers = held_here * axes.cut, self._layers
        experts = 0.0
        if axes.expert > 1:
            rest = (shape.parameters - shape.expert_parameters) / axes.tensor
            experts = stage * shape.expert_parameters / (rest + shape.expert_parameters)
        # The whole's time counts the messages of one layer.
        seconds = move((stage - experts) * word, axes.cut, axes.tensor)
        seconds += layers * move(0.0, axes.cut, axes.tensor)
        if axes.expert > 1:
            few, stride = axes.cut // axes.expert, axes.tensor * axes.expert
            seconds += move(experts / axes.expert * word, few, stride) + (layers - 1) * move(0.0, few, stride)
        if self.rates.exchanges is not None:
            # Into the messages, or out of them.
            seconds += 2 * stage * word / self.rates.bandwidth
        return seconds

    def _between(self) -> float:
        """Seconds to sum gradients between the copies, once per update, layer by layer and then the rest."""
        axes, trained = self.axes, self._held[1]
        stride = axes.tensor * axes.cut
        messages = self._layers * self.links.all_reduce(0.0, axes.replicate, stride)
        return self.links.all_reduce(trained * FLOAT, axes.replicate, stride) + messages

    def _optimizer(self) -> float:
        trained = self._held[1]
        assert self.optimizer is not None
        away = self.optimizer.offload and self.rates.host_memory > 0
        rate = self.rates.host if away else self.rates.bandwidth
        return trained * OPTIMIZER_BYTES / rate


def times(one: Pass, many: int) -> Pass:
    """So many such passes."""
    return Pass(
        products=many * one.products,
        layers=many * one.layers,
        weights=many * one.weights,
        bubble=many * one.bubble,
        optimizer=many * one.optimizer,
        hidden=one.hidden,
    )
