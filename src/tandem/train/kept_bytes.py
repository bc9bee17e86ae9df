"""What an update is spared, and the memory that takes, from a run's configuration alone."""

from dataclasses import dataclass, replace

from tandem.config.run import Run
from tandem.device import pick
from tandem.model.kept import worthiest
from tandem.train.footprint import FLOAT, MIB, Shape
from tandem.train.memory import Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Spared:
    """Of the first update of each step."""

    bytes: int = 0
    share: float = 0.0
    """Of the products of its forward pass."""


def spared(run: Run, shape: Shape, longest_prompt: int) -> Spared:
    """What sampling keeps of answers that are all as long as they may be; nothing where it keeps nothing."""
    if not run.keeps or shape.experts or pick(run.device).type != "cpu":
        return Spared()
    s = run.sampling
    lines = 1 + s.prompts_per_step * (longest_prompt + s.answers_per_prompt * s.max_answer_tokens)
    key_value = shape.key_value // shape.layers
    layer = [
        (shape.hidden, shape.query + key_value),
        (shape.query, shape.hidden),
        (shape.hidden, 2 * shape.feed_forward),
        (shape.feed_forward, shape.hidden),
    ]
    tables = [*layer * shape.layers, (shape.hidden, shape.vocabulary)]
    sizes = [(worth, FLOAT * width * lines) for worth, width in tables]
    kept = worthiest(sizes, run.learner.keep_mb * MIB)
    products = [worth * size for worth, size in sizes]
    return Spared(bytes=sum(sizes[i][1] for i in kept), share=sum(products[i] for i in kept) / sum(products))


def with_kept(need: Memory, run: Run, shape: Shape, longest_prompt: int) -> Memory:
    """The memory of a process that keeps it."""
    size = spared(run, shape, longest_prompt).bytes
    return replace(need, lasting=need.lasting | {"kept from sampling": size}) if size else need
