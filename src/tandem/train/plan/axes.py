"""Ways to lay a model on so many processes, and why some of them cannot be."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from transformers import PreTrainedConfig

from tandem.config.layout import Layout
from tandem.errors import ConfigError
from tandem.model.parallel.fit import check_fit
from tandem.model.parallel.tensor import ASIDE, COLUMN, ROW


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

    def __str__(self) -> str:
        sizes = asdict(self).items()
        return " ".join(f"{name}={size}" for name, size in sizes if size > 1) or "one process"


ALONE = Axes()


class Rules:
    """What of a model can be split, from its config."""

    def __init__(self, config: PreTrainedConfig, experts: int, per_node: int) -> None:
        self.config, self.experts, self.per_node = config, experts, per_node
        self._known: dict[tuple[int, int], str | None] = {}

    def refusal(self, tensor: int, context: int) -> str | None:
        """Why these two cannot be; None where they can."""
        if (tensor, context) not in self._known:
            self._known[tensor, context] = self._refusal(tensor, context)
        return self._known[tensor, context]

    def _refusal(self, tensor: int, context: int) -> str | None:
        if tensor > self.per_node:
            return f"tensor={tensor} would join every layer between nodes of {self.per_node}"
        try:
            check_fit(Layout(tensor=tensor, context=context), self.config, tensor * context, "layout")
        except ConfigError as cause:
            return str(cause)
        styles = set((self.config.base_model_tp_plan or {}).values()) - ASIDE - {COLUMN, ROW}
        if tensor > 1 and styles:
            return f"tensor={tensor}: the model's plan has parts that cannot be split ({', '.join(sorted(styles))})"
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
                if pipeline > layers:
                    yield f"pipeline={pipeline} is more than the model's {layers} layers"
                elif data > sequences:
                    yield f"{data} shares of an update's {sequences} answers"
                else:
                    yield from _shared(data, rules.experts, tensor, context, pipeline)


def _shared(data: int, experts: int, tensor: int, context: int, pipeline: int) -> Iterator[Axes]:
    """The ways to hold weights on processes with sequences of their own."""
    for replicate in divisors(data):
        shard = data // replicate
        together = math.gcd(shard * context, experts) if experts and tensor == 1 else 1
        for expert in divisors(together):
            yield Axes(
                replicate=replicate,
                shard=shard,
                context=context,
                tensor=tensor,
                pipeline=pipeline,
                expert=expert,
            )


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
