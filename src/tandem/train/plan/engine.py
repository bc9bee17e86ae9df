"""What an engine takes and how long it samples."""

from collections.abc import Iterator
from dataclasses import dataclass

from tandem.config.run import Run
from tandem.engine.embedded import FREE_SHARE
from tandem.model.load import DTYPES
from tandem.train.footprint import Shape, asked, drawing, lays_out
from tandem.train.plan.axes import Rules, divisors
from tandem.train.plan.device import Rates
from tandem.train.plan.link import Links
from tandem.train.plan.work import Decoding, Lengths, decoding, forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One of many equal engines."""

    tensor: int
    """Devices that share its weights."""
    count: int
    slots: int
    """Answers that decode at the same time."""
    copied: bool
    """It has weights of its own, beside those that are trained."""
    weights: float
    """Bytes on each device."""
    cache: float
    logits: float
    seconds: float
    communication: float
    """Part of the seconds."""
    reads: str
    """What bounds a decoding step."""

    @property
    def bytes(self) -> float:
        return self.weights + self.cache + self.logits


def engines(
    run: Run,
    shape: Shape,
    lengths: Lengths,
    rates: Rates,
    links: Links,
    rules: Rules,
    free: float,
    *,
    whole: bool,
    samplers: int,
) -> Iterator[Engine | float]:
    """The engines that fit into `free` bytes of each device, and the bytes that others lack. `whole`: each
    device holds all weights already, so an engine on it can use them. `samplers`: devices that are the engines'
    alone; 0 where they lie on those of the learners, which are all."""
    devices = samplers or links.count
    # Engines on several devices are vLLM's, which reads the base of an adapter from its folder.
    based = run.model.lora is None or run.model.path is not None
    spread = based and (samplers > 0 or run.engine.kind == "vllm")
    for tensor in divisors(devices) if spread else [1]:
        if rules.serves(tensor) and links.hold(devices // tensor, tensor):
            split = (tensor, min(tensor, rules.config.num_key_value_heads))
            here, copied = (run if tensor == 1 else by_vllm(run)), not (whole and tensor == 1)
            yield _engine(here, shape, lengths, rates, links, devices, split, free, copied=copied)


def by_vllm(run: Run) -> Run:
    return run.model_copy(update={"engine": run.engine.model_copy(update={"kind": "vllm"})})


def _engine(
    run: Run,
    shape: Shape,
    lengths: Lengths,
    rates: Rates,
    links: Links,
    devices: int,
    split: tuple[int, int],
    free: float,
    *,
    copied: bool,
) -> Engine | float:
    """The engine; or the bytes that are missing for a single answer. `devices`: of all engines. `split`: parts of the
    weights, of the cache."""
    tensor, keys = split
    word = DTYPES[run.engine_dtype].itemsize
    count = devices // tensor
    answers = -(-run.rollouts_per_step // count)
    on_host = not rates.host_memory and lays_out(run, min(run.sampling.slots, answers))
    weights = (copied + on_host) * shape.parameters * word / tensor
    column, logits = shape.key_value * word / keys, drawing(run, shape)
    slots, cache = _cache(run, lengths, count, column, logits, free - weights)
    if weights + cache + slots * logits > free:
        return weights + cache + slots * logits - free
    at_once = min(slots, answers)
    joined = run.engine.kind == "embedded"
    work = decoding(run, shape, lengths, answers, at_once, joined=joined)
    seconds, communication, reads = times(work, shape, rates, links, tensor, word)
    return Engine(
        tensor=tensor,
        count=count,
        slots=slots,
        copied=copied,
        weights=weights,
        cache=cache,
        logits=slots * logits,
        seconds=seconds,
        communication=communication,
        reads=reads,
    )


def _cache(
    run: Run, lengths: Lengths, count: int, column: float, logits: float, free: float
) -> tuple[int, float]:
    """Answers at a time, at least one, and bytes of the keys and values of all slots and of the prompts in them;
    `column` are those of one token."""
    answers, prompts = asked(run, count)
    prompt, answer = column * lengths.longest_prompt, column * lengths.longest_answer
    if run.engine.kind == "vllm":
        # Its blocks are taken as they are needed, those of a prompt once for its group.
        each = answer + prompt / min(run.sampling.answers_per_prompt, answers)
        slots = max(1, min(run.engine.max_num_seqs, answers, int(free // (each + logits))))
        return slots, slots * each
    # As the engine does where memory is short: each slot has room for a prompt of its own.
    each = max((prompt + answer) / FREE_SHARE, prompt + answer + logits)
    slots = max(1, min(run.sampling.slots, answers, int(free // each)))
    return slots, slots * answer + min(slots, prompts) * prompt


def times(
    work: Decoding, shape: Shape, rates: Rates, links: Links, tensor: int, word: int
) -> tuple[float, float, str]:
    """Seconds of sampling, the part of them for communication, and what bounds a decoding step."""
    reading = work.weights / tensor / rates.bandwidth
    multiplying = work.step.products / tensor / rates.decode
    cache = max(
        work.cache / tensor / work.steps / rates.bandwidth, work.step.attention / tensor / rates.decode
    )
    fixed = rates.step_s + shape.layers * rates.layer_s
    prompts = forward(shape, work.prompts).total / tensor / rates.forward + shape.layers * rates.start_s
    sums = 2 * shape.layers

    def joining(tokens: float) -> float:
        return sums * links.all_reduce(tokens * shape.hidden * word, tensor, 1)

    weights = max(reading, multiplying) if rates.overlaps else reading + multiplying
    step = weights + cache + fixed
    communication = work.steps * joining(work.slots) + joining(work.prompts.line)
    bounds = {
        "reading weights": reading,
        "products": multiplying,
        "keys and values": cache,
        "fixed time": fixed,
    }
    return work.steps * step + prompts + communication, communication, max(bounds, key=lambda n: bounds[n])
