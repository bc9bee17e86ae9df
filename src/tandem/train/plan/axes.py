"""Ways to lay a model on so many processes, and why some of them cannot be."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from transformers import PreTrainedConfig

from tandem.config.layout import Layout
from tandem.config.sections import Lora
from tandem.errors import ConfigError
from tandem.model.mixture import is_mixture
from tandem.model.parallel.fit import PIPELINED, check_adapter, check_fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """How many processes share what, as in `Layout`. Their number is the product of all but `expert`."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    """Of the processes of `shard` and `context`, neighbours that split the experts."""
    pipeline_chunks: int = 1
    """Stages on each process of the pipeline."""
    pipeline_layers: tuple[int, ...] | None = None
    """Layers of each stage; None for equal ones."""

    @classmethod
    def of(cls, layout: Layout, world: int) -> "Axes":
        """Those of a layout on `world` processes; ConfigError where it cannot be."""
        try:
            replicate, shard, context, tensor = layout.sizes(world)
        except ValueError as cause:
            raise ConfigError(str(cause)) from None
        return cls(
            replicate=replicate,
            shard=shard,
            context=context,
            tensor=tensor,
            pipeline=layout.pipeline,
            expert=layout.expert,
            pipeline_chunks=layout.pipeline_chunks,
            pipeline_layers=tuple(layout.pipeline_layers) if layout.pipeline_layers else None,
        )

    @property
    def world(self) -> int:
        return self.data * self.context * self.tensor * self.pipeline

    @property
    def data(self) -> int:
        """Processes (or groups of them) that have sequences of their own."""
        return self.replicate * self.shard

    @property
    def cut(self) -> int:
        """Processes that weights are sharded over, after `tensor` and `pipeline` have split them. Experts are split
        over `expert` of these first, and then sharded over the rest."""
        return self.shard * self.context

    def token_shares(self, sequence: bool) -> int:
        """Processes of `tensor` that share the tokens between the parts of a layer that it splits, which experts need
        in any case."""
        return self.tensor if sequence or self.expert > 1 else 1

    def sizes(self) -> dict[str, int]:
        """Of the axes that are above 1."""
        return {name: size for name, size in asdict(self).items() if isinstance(size, int) and size > 1}

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes().items()) or "one process"


ALONE = Axes()
CHUNKS = (1, 2, 4)
"""Stages on a process of a pipeline that are tried."""


class Rules:
    """What of a model can be split, from its config and its adapter."""

    def __init__(
        self, config: PreTrainedConfig, experts: int, per_node: int, lora: Lora | None = None
    ) -> None:
        self.config, self.per_node, self.lora = config, per_node, lora
        self.experts = experts if is_mixture(config) else 0
        """That can be split."""
        self._known: dict[tuple[int, int], str | None] = {}

    def refusal(self, tensor: int, context: int) -> str | None:
        """Why these two cannot be; None where they can."""
        if (tensor, context) not in self._known:
            self._known[tensor, context] = self._refusal(tensor, context)
        return self._known[tensor, context]

    def _refusal(self, tensor: int, context: int) -> str | None:
        if tensor > self.per_node:
            return f"tensor={tensor} would join every layer between nodes of {self.per_node}"
        layout = Layout(tensor=tensor, context=context)
        try:
            check_fit(layout, self.config, tensor * context, "layout")
            check_adapter(layout, self.lora, "layout")
        except ConfigError as cause:
            return str(cause)
        return None

    def serves(self, tensor: int) -> bool:
        """Whether an engine can split the model so: query heads are divided, key heads divided or copied."""
        heads, keys = self.config.num_attention_heads, self.config.num_key_value_heads
        return heads % tensor == 0 and (keys % tensor == 0 or tensor % keys == 0)


def layouts(count: int, rules: Rules, sequences: int) -> Iterator[Axes | str]:
    """Every layout of `count` processes that the model allows, and the reasons for those that it does not.

    At most `sequences` processes can have sequences of their own.
    """
    layers = rules.config.num_hidden_layers
    for tensor in divisors(count):
        for context in divisors(count // tensor):
            reason = rules.refusal(tensor, context)
            if reason is not None:
                yield reason
                continue
            for pipeline in divisors(count // (tensor * context)):
                data = count // (tensor * context * pipeline)
                if pipeline > 1 and rules.config.model_type not in PIPELINED:
                    yield f"pipeline={pipeline}: not for models of type {rules.config.model_type}"
                    continue
                if pipeline > layers:
                    yield f"pipeline={pipeline} is more than the model's {layers} layers"
                    continue
                if data > sequences:
                    yield f"{data} shares of an update's {sequences} answers"
                    continue
                for chunks in CHUNKS if pipeline > 1 else CHUNKS[:1]:
                    if pipeline * chunks <= layers:
                        yield from _shared(data, rules.experts, tensor, context, pipeline, chunks)


def _shared(data: int, experts: int, tensor: int, context: int, pipeline: int, chunks: int) -> Iterator[Axes]:
    """The ways to hold weights on processes with sequences of their own."""
    for replicate in divisors(data):
        shard = data // replicate
        together = math.gcd(shard * context, experts) if experts else 1
        for expert in divisors(together):
            yield Axes(
                replicate=replicate,
                shard=shard,
                context=context,
                tensor=tensor,
                pipeline=pipeline,
                expert=expert,
                pipeline_chunks=chunks,
            )


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
