"""Operations and bytes of a step, counted from sizes: the formulas of docs/plan.md."""

import math
from dataclasses import dataclass

from tandem.config.run import Run
from tandem.model.load import DTYPES
from tandem.train.footprint import FLOAT, MIB, Shape

ATTENTION_BACKWARD = 2.5
"""Backward over forward operations of attention: four products for two, and the scores computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of a prompt and of an answer, in the mean and at most."""

    prompt: float
    answer: float
    longest_prompt: int
    longest_answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What goes through a model in one pass."""

    line: float
    """Tokens."""
    predicted: float
    """Of them, those that the output head runs for."""
    pairs: float
    """(query, key) pairs of attention."""
    forwards: int = 1
    """Micro-batches that they are computed in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Operations: those with weights, and those of attention."""

    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.products + self.attention


def forward(shape: Shape, tokens: Tokens) -> Flops:
    return Flops(
        products=2 * (shape.used * tokens.line + shape.head * tokens.predicted),
        attention=4 * shape.query * shape.layers * tokens.pairs,
    )


def update(run: Run, shape: Shape, tokens: Tokens) -> Flops:
    """Forward and backward; frozen weights pass gradients on but have none. What is not kept is computed twice."""
    once = forward(shape, tokens)
    frozen = 0.0
    if shape.trainable < shape.parameters:
        frozen = 2 * ((shape.used - shape.adapter) * tokens.line + shape.head * tokens.predicted)
    products, attention = 3 * once.products - frozen, (1 + ATTENTION_BACKWARD) * once.attention
    head = 2 * shape.head * tokens.predicted
    if run.learner.checkpointing:
        products, attention = products + once.products - head, attention + once.attention
    if tokens.predicted / tokens.forwards * shape.vocabulary * FLOAT > run.learner.logits_mb * MIB:
        products += head
    return Flops(products=products, attention=attention)


def share(run: Run, lengths: Lengths, data: int) -> Tokens:
    """What the process with the most gets of one update, where `data` of them share its sequences.

    A group that is more than a process's share, or than a micro-batch, is divided, and each piece has the prompt.
    """
    s, groups = run.sampling, run.sampling.prompts_per_step // run.learner.updates_per_step
    p, a = lengths.prompt, lengths.answer
    budget = run.learner.room(p + a, p)
    packs = math.ceil(s.answers_per_prompt / max(1, int((budget - p) // a)))
    pieces = min(s.answers_per_prompt, max(1, math.ceil(data / groups - 0.25)))
    mine = math.ceil(groups * pieces / data)
    answers = mine * s.answers_per_prompt / pieces
    prompts = mine * max(1, math.ceil(packs / pieces))
    line = prompts * p + answers * a
    return Tokens(
        line=line,
        predicted=answers * a,
        pairs=prompts * p * p / 2 + answers * (p * a + a * a / 2),
        forwards=math.ceil(line / budget),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """What one engine does in a step."""

    steps: float
    """Decoding steps: the longest answer's, or more where answers wait for a slot."""
    slots: float
    """Answers that decode at the same time, in the mean."""
    prompts: Tokens
    weights: float
    """Bytes of weights that a decoding step reads."""
    cache: float
    """Bytes of keys and values that all decoding steps read together."""
    step: Flops
    """Of a mean decoding step."""


def decoding(run: Run, shape: Shape, lengths: Lengths, answers: int, slots: int, *, joined: bool) -> Decoding:
    """`joined`: a prompt's keys and values are read once for the answers in flight (the embedded engine)."""
    word, p, a = DTYPES[run.engine_dtype].itemsize, lengths.prompt, lengths.answer
    steps = max(float(lengths.longest_answer), answers * a / slots)
    group = min(run.sampling.answers_per_prompt, answers)
    prompts = math.ceil(answers / group)
    pairs = answers * (p * a + a * a / 2)
    readers = min(group, slots) if joined else 1
    entries = answers * (p * a / readers + a * a / 2)
    mean = answers * a / steps
    touched = 1 - (1 - shape.active / shape.experts) ** mean if shape.experts else 0.0
    return Decoding(
        steps=steps,
        slots=mean,
        prompts=Tokens(line=prompts * p, predicted=prompts, pairs=prompts * p * p / 2),
        weights=(shape.dense + shape.expert_parameters * touched + shape.head) * word,
        cache=entries * shape.key_value * word,
        step=forward(shape, Tokens(line=mean, predicted=mean, pairs=pairs / steps)),
    )
