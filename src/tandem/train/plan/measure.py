"""What this machine reaches, measured on a short model of the run's widths with random weights."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tandem.config.run import Run
from tandem.device import free_host_bytes, set_threads
from tandem.engine import EmbeddedEngine, Request, SamplingParams
from tandem.model import LanguageModel, token_logprobs
from tandem.model.asleep import Asleep
from tandem.model.attention import NAME
from tandem.model.load import DTYPES
from tandem.model.new import new_tokenizer
from tandem.model.parallel.grid import Grid
from tandem.model.parallel.load import kind_of
from tandem.model.parallel.model import ShardedModel
from tandem.model.product import FEW
from tandem.train import footprint
from tandem.train.footprint import Shape
from tandem.train.memory import several
from tandem.train.plan.device import Rates
from tandem.train.plan.transfer import sending
from tandem.train.plan.typical import typical
from tandem.train.plan.work import Decoding, Lengths, Tokens, decoding, forward, update
from tandem.train.profile import measure_rates

LARGEST = 10**8
"""Weights of the short model at most: above, large products alone are measured."""
SENT = 25 * 10**6
"""The same of a model that is sent to another."""
STEPS = 24
"""Tokens that the engine samples."""
LINK, USABLE = 1e9, 0.9
"""Assumed bytes per second between processes of one machine without fast links, and share of the free memory."""


def measured(run: Run, lengths: Lengths, threads: int | None, grid: Grid | None = None) -> Rates:
    """Rates of the CPU with so many threads, None for one on each core; takes a few seconds. On the processes of a
    grid, which copies the model, those of passes as its processes make them, without what they say to each other."""
    threads, cpu = set_threads(threads), torch.device("cpu")
    dtype = DTYPES[run.model.dtype]
    best = measure_rates(cpu, dtype)
    shape = footprint.shape_of(run.model, None)
    layers = layers_within(shape, LARGEST)
    common = Rates(
        update=best.flops_per_s,
        forward=best.flops_per_s,
        decode=best.flops_per_s,
        bandwidth=best.bytes_per_s,
        step_s=0.0,
        layer_s=0.0,
        near=LINK,
        far=LINK,
        host=best.bytes_per_s,
        usable=USABLE * free_host_bytes(),
        host_memory=0.0,
        origin=f"measured on this machine with {threads} threads, large products alone: the least that a step takes",
    )
    if layers < 1:
        return common
    small = shortened(shape, layers)
    model = short_model(run, layers)
    engine = replace(
        common,
        **engine_rates(run, model, small, lengths, common),
        overlaps=False,
        sending=sending(run, short_model(run, max(1, layers_within(shape, SENT)))),
        host=asleep_rate(model),
    )
    part = f"{layers} of the model's {shape.layers} layers"
    origin = f"measured on this machine with {several(threads, 'thread')} on {part}"
    learner = (
        model if grid is None else kind_of(grid)(model.network, model.tokenizer, model.source, grid, "grid")
    )
    return replace(engine, **learner_rates(run, learner, small, lengths), origin=origin)


def layers_within(shape: Shape, most: int) -> int:
    """Of the model with as many of them as make so many weights."""
    outside = shape.embedding + (0 if shape.tied else shape.head)
    return int(min(shape.layers, (most - outside) // ((shape.parameters - outside) / shape.layers)))


def shortened(shape: Shape, layers: int) -> Shape:
    """The sizes with fewer layers and no adapter."""
    outside = shape.embedding + (0 if shape.tied else shape.head)
    inside = (shape.parameters - shape.adapter - outside) * layers // shape.layers
    return replace(
        shape,
        layers=layers,
        parameters=inside + outside,
        trainable=inside + outside,
        dense=(shape.dense - shape.adapter) * layers // shape.layers,
        key_value=shape.key_value * layers // shape.layers,
        expert_parameters=shape.expert_parameters * layers // shape.layers,
        adapter=0,
    )


def short_model(run: Run, layers: int) -> LanguageModel:
    with torch.device("meta"):
        config = footprint.bare_network(run.model, None).config
    config.num_hidden_layers = layers
    if config.to_dict().get("layer_types"):
        config.layer_types = config.layer_types[:layers]
    network = AutoModelForCausalLM.from_config(
        config, attn_implementation=NAME, dtype=DTYPES[run.model.dtype]
    )
    return LanguageModel(network, new_tokenizer(), "measured")


def learner_rates(run: Run, model: LanguageModel, shape: Shape, lengths: Lengths) -> dict[str, float]:
    """Of one full micro-batch of groups with their prompts computed once."""
    p, a = round(lengths.prompt), round(lengths.answer)
    group = run.sampling.answers_per_prompt
    room = run.learner.room(p + a, p)
    groups = max(1, room // (p + group * a))
    groups = min(groups, run.sampling.prompts_per_step // run.learner.updates_per_step)
    answers = max(1, min(group, (room - p) // a))
    rows = groups * answers
    tokens_BT = torch.randint(0, min(256, model.vocab_size), (rows, p + a))
    mask_BT = torch.arange(p + a).expand(rows, -1) >= p
    group_B = torch.arange(groups).repeat_interleave(answers)

    def logprobs() -> Tensor:
        logp_BT, _ = token_logprobs(
            model,
            tokens_BT,
            mask_BT,
            torch.full((rows,), p + a),
            prompt_length_B=torch.full((rows,), p),
            group_B=group_B,
            temperature=run.sampling.temperature,
            logits_bytes=run.learner.logits_mb * footprint.MIB,
            attention=run.learner.attention,
        )
        return logp_BT

    def learn() -> None:
        model.network.zero_grad()
        logprobs().sum().backward()

    work = Tokens(
        line=groups * p + rows * a,
        predicted=rows * a,
        pairs=groups * p * p / 2 + rows * (p * a + a * a / 2),
    )
    model.network.train()
    if isinstance(model, ShardedModel):
        model.last_backward(False)
    if run.learner.checkpointing:
        model.network.gradient_checkpointing_enable({"use_reentrant": False})
    learning = typical(learn)
    model.network.eval()
    with torch.no_grad():
        reading = typical(logprobs)
    return {
        "update": update(run, shape, work).total / learning,
        "forward": forward(shape, work).total / reading,
    }


def asleep_rate(model: LanguageModel) -> float:
    """Bytes per second to where weights wait, and back."""
    tensors = [weight.data for weight in model.network.parameters()]
    seconds = typical(lambda: Asleep(tensors, model.device).wake())
    return 2 * sum(tensor.nbytes for tensor in tensors) / seconds


def engine_rates(
    run: Run, model: LanguageModel, shape: Shape, lengths: Lengths, rates: Rates
) -> dict[str, float]:
    """From decoding steps with as many answers as there are slots, and with a quarter of them: time is a line through
    both, for one answer is quicker than that."""
    p, steps = round(lengths.prompt), min(round(lengths.answer), STEPS)
    engine = EmbeddedEngine(model, run.sampling.slots, run.learner.room())
    short = replace(lengths, answer=float(steps), longest_answer=steps)

    def seconds(answers: int, tokens: int) -> float:
        group = run.sampling.answers_per_prompt
        requests = [
            Request(tokens=tuple(i // group % 199 + j % 50 for j in range(p)), key=i) for i in range(answers)
        ]
        params = SamplingParams(max_tokens=tokens, min_tokens=tokens)
        return typical(lambda: engine.generate(requests, params))

    def sampled(answers: int) -> tuple[Decoding, float, float]:
        """What is done, and seconds until the first token and, without keys and values, of each further one."""
        work, first = decoding(run, shape, short, answers, answers, joined=True), seconds(answers, 1)
        each = (seconds(answers, steps) - first) / max(1, steps - 1)
        return work, first, max(1e-7, each - work.cache / work.steps / rates.bandwidth)

    slots = min(run.sampling.slots, run.rollouts_per_step)
    few, first, each = sampled(max(-(-slots // 4), min(FEW, slots // 2)))
    many, _, each_of_many = sampled(slots)
    more = many.step.products - few.step.products
    decode = more / max(1e-7, each_of_many - each) if more else rates.decode
    fixed = each - few.weights / rates.bandwidth - few.step.products / decode
    start = first - each - forward(shape, few.prompts).total / rates.forward
    return {
        "decode": decode,
        "layer_s": max(0.0, fixed) / shape.layers,
        "start_s": max(0.0, start) / shape.layers,
    }
