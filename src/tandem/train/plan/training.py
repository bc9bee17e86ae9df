"""Seconds of the learner's passes in a layout: products, and what its processes say to each other."""

from dataclasses import dataclass

from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.config.sections import Optimizer
from tandem.model.load import DTYPES
from tandem.train.footprint import FLOAT, Shape, held
from tandem.train.plan.axes import Axes
from tandem.train.plan.device import Rates
from tandem.train.plan.link import Links
from tandem.train.plan.stages import Stages, fullest_of
from tandem.train.plan.work import Lengths, Tokens, forward, share, update

OPTIMIZER_BYTES = 28
"""Read and written for each trained weight in an update: two moments, master, gradient, weight."""


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

    @property
    def seconds(self) -> float:
        return max(self.products + self.layers, self.weights) + self.bubble + self.optimizer

    @property
    def exposed(self) -> float:
        """Of them, those spent on communication."""
        return self.layers + max(0.0, self.weights - self.products - self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
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

    def update(self) -> Pass:
        """All updates of a step."""
        tokens, learner = share(self.run, self.lengths, self.axes.data), self.run.learner
        passes = 2 + learner.checkpointing
        products = update(self.run, self.shape, tokens).total / self._processes / self.rates.update
        sums = self._summing(tokens.forwards)
        one = self._pass(tokens, products, passes, gathers=2, more=sums, optimizer=self._optimizer())
        return times(one, learner.updates_per_step * learner.epochs_per_step)

    def reading(self) -> Pass:
        """A forward pass over a step's answers: log-probabilities, or values."""
        tokens = share(self.run, self.lengths, self.axes.data)
        products = forward(self.shape, tokens).total / self._processes / self.rates.forward
        return times(self._pass(tokens, products, 1, gathers=1), self.run.learner.updates_per_step)

    def _pass(
        self,
        tokens: Tokens,
        products: float,
        passes: int,
        *,
        gathers: int,
        more: float = 0.0,
        optimizer: float = 0.0,
    ) -> Pass:
        layers = passes * self._joining(tokens)
        if self.layout.offload_parameters:
            more += tokens.forwards * gathers * held(self.shape, self._most)[0] * self._word / self.rates.host
        ranks, chunks = self.axes.pipeline, self.axes.pipeline_chunks
        # Interleaved stages take turns after as many micro-batches as there are processes, be they there or not.
        idle = (ranks - 1 + (chunks - 1) * (-tokens.forwards % ranks)) / (tokens.forwards * chunks)
        return Pass(
            products=products,
            layers=layers,
            weights=tokens.forwards * gathers * self._moving(held(self.shape, self._most)[0], self._word)
            + more,
            bubble=idle * (products + layers),
            optimizer=optimizer,
        )

    @property
    def _word(self) -> int:
        return DTYPES[self.run.model.dtype].itemsize

    @property
    def _most(self) -> Stages:
        """Those of the process that has the most weights."""
        return max(fullest_of(self.axes, self.shape.layers), key=lambda stages: held(self.shape, stages)[0])

    @property
    def _layers(self) -> int:
        """Of the process that has the most."""
        return max(stages.layers for stages in fullest_of(self.axes, self.shape.layers))

    @property
    def _processes(self) -> float:
        """Those that share the sequences of one data rank, as many as if all had as many layers as the fullest."""
        return self.axes.tensor * self.axes.context * self.shape.layers / self._layers

    def _joining(self, tokens: Tokens) -> float:
        """Communication of one forward pass inside the layers of a stage; backward it is as much."""
        axes, shape, layers = self.axes, self.shape, self._layers
        line = tokens.line / axes.context
        wide = line * shape.hidden * self._word
        joined = 2 * layers * self.links.all_reduce(wide, axes.tensor, 1)
        heads = (2 * shape.query + shape.key_value // shape.layers) / axes.tensor
        turned = layers * self.links.exchange(line * heads * self._word, axes.context, axes.tensor)
        routed = 0.0
        if axes.expert > 1:
            copies = 2 * shape.active * wide / axes.tensor
            routed = layers * self.links.exchange(copies, axes.expert, axes.tensor)
        between = 0.0
        if axes.pipeline > 1:
            hops = wide / axes.tensor / self.links.rate(2, axes.world // axes.pipeline)
            between = axes.pipeline_chunks * hops
        return joined + turned + routed + between

    def _moving(self, held_here: int, word: int) -> float:
        """Seconds to gather, or to scatter, what each process holds of a stage, layer by layer."""
        axes, shape = self.axes, self.shape
        stage = held_here * axes.cut
        rest = (shape.parameters - shape.expert_parameters) / axes.tensor
        experts = stage * shape.expert_parameters / (rest + shape.expert_parameters)
        seconds = self.links.all_gather((stage - experts) * word, axes.cut, axes.tensor)
        if experts:
            few = axes.cut // axes.expert
            seconds += self.links.all_gather(experts / axes.expert * word, few, axes.tensor * axes.expert)
        # The whole's time counts the messages of one layer.
        more = self._layers - 1
        return seconds + more * self.links.all_gather(0.0, axes.cut, axes.tensor)

    def _summing(self, forwards: int) -> float:
        """Gradients of a stage: summed in float32 within the shards each time, between the copies once per update."""
        axes, trained = self.axes, held(self.shape, self._most)[1]
        between = self.links.all_reduce(trained * FLOAT, axes.replicate, axes.tensor * axes.cut)
        return forwards * self._moving(trained, FLOAT) + between

    def _optimizer(self) -> float:
        trained = held(self.shape, self._most)[1]
        assert self.optimizer is not None
        rate = self.rates.host if self.optimizer.offload else self.rates.bandwidth
        return trained * OPTIMIZER_BYTES / rate

    def transfer(self, engine_tensor: int) -> float:
        """Weights to engines with a copy: gathered, and to each engine's devices."""
        size = self.shape.parameters * self._word / engine_tensor
        return self.links.all_gather(size, max(2, self.axes.tensor * self.axes.cut), 1)


def times(one: Pass, many: int) -> Pass:
    """So many such passes."""
    return Pass(
        products=many * one.products,
        layers=many * one.layers,
        weights=many * one.weights,
        bubble=many * one.bubble,
        optimizer=many * one.optimizer,
    )
