"""Bytes that a run will take, in memory and on disk, from its configuration alone. docs/cli.md has the formulas."""

import math
import sys
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.config.sections import Model, Optimizer
from tandem.device import pick
from tandem.model import describe
from tandem.model.attention import NAME, SCORES
from tandem.model.load import DTYPES, with_adapter
from tandem.model.new import new_network, new_tokenizer
from tandem.model.product import FEW
from tandem.train.plan.axes import ALONE, Axes

FLOAT = 4
LOGIT_COPIES = 3
GRAPH_COPIES = 5
"""Tensors of the size of the logits that live at once: themselves, probabilities, a product of both; and where
PyTorch differentiates (a split vocabulary, an entropy term): log-softmax, probabilities, two gradients."""
EXPERT_COPIES = 2
"""Tensors of a token's width that are kept for each expert it goes through."""
SAMPLED_COPIES = 4
TRUNCATED_COPIES = 8
"""The same while a token is drawn, without and with the sorting that top-k and top-p need."""
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's sizes, read off its modules without any weight."""

    parameters: int
    trainable: int
    layers: int
    hidden: int
    feed_forward: int
    query: int
    """Outputs of a layer's query projection."""
    key_value: int
    """Outputs of all layers' key and value projections: cache entries per token."""
    vocabulary: int
    positions: int
    heads: int
    embedding: int
    """Weights of the input embedding."""
    head: int
    """Weights of the output head, which every predicted token is multiplied with; may be the embedding's."""
    tied: bool
    dense: int
    """Weights in the layers that every token is multiplied with, adapters among them, experts not."""
    experts: int
    """Experts in a layer; 0 where there are none."""
    active: int
    """Experts that a token goes through."""
    expert_width: int
    expert_parameters: int
    """Of all experts in all layers."""
    adapter: int
    """Of `dense`, the weights of adapters."""

    @property
    def used(self) -> float:
        """Weights in the layers that one token is multiplied with."""
        return self.dense + (self.expert_parameters * self.active / self.experts if self.experts else 0)

    def kept(self, axes: Axes) -> float:
        """Numbers per token that one process of a layout keeps of a layer for the backward pass: two norms,
        attention, gated feed-forward (or that of the experts, to which each token goes in copies)."""
        attention = 2 * (self.query + self.key_value // self.layers) + 2 * self.query
        between = 6 * self.hidden
        if self.experts:
            inner = self.active * (EXPERT_COPIES * self.hidden + 4 * self.expert_width)
        else:
            inner = 4 * self.feed_forward
        return (between + attention + inner) / (axes.tensor * axes.context)

    @property
    def activations(self) -> int:
        """The same on one process."""
        return int(self.kept(ALONE))


def shape_of(model: Model, tokenizer: PreTrainedTokenizerFast | None, path: str | None = None) -> Shape:
    """The sizes of the policy, or of the model in `path`; ConfigError where an adapter finds no place.

    Only `model.new` needs the tokenizer.
    """
    with torch.device("meta"):
        network = bare_network(model, tokenizer, path)
        module: nn.Module = network
        linear = {name: m.out_features for name, m in network.named_modules() if isinstance(m, nn.Linear)}
        if path is None and model.lora is not None:
            module = with_adapter(network, model.lora, 0, None)
    text = network.config.get_text_config()
    layers = int(text.num_hidden_layers)
    table, head = network.get_input_embeddings().weight, network.get_output_embeddings().weight
    named = list(module.named_parameters())
    experts = sum(p.numel() for name, p in named if EXPERT in name)
    return Shape(
        parameters=count(module),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        layers=layers,
        hidden=int(text.hidden_size),
        feed_forward=int(text.intermediate_size),
        query=projected(linear, "q_proj") // layers,
        key_value=projected(linear, "k_proj") + projected(linear, "v_proj"),
        vocabulary=int(text.vocab_size),
        positions=min(text.max_position_embeddings, getattr(text, "sliding_window", None) or sys.maxsize),
        heads=int(text.num_attention_heads),
        embedding=table.numel(),
        head=head.numel(),
        tied=table is head,
        dense=sum(
            p.numel()
            for name, p in named
            if p.ndim == 2 and EXPERT not in name and p is not table and p is not head
        ),
        experts=experts_in(text) if experts else 0,
        active=int(text.num_experts_per_tok) if experts else 0,
        expert_width=int(getattr(text, "moe_intermediate_size", text.intermediate_size)),
        expert_parameters=experts,
        adapter=sum(p.numel() for name, p in named if ".lora_" in name),
    )


def config_of(
    model: Model, tokenizer: PreTrainedTokenizerFast | None, path: str | None = None, key: str = "model.path"
) -> PreTrainedConfig:
    """Of the policy, or of the model in `path`, which `key` names, without its weights."""
    if path is None and model.new is not None:
        with torch.device("meta"):
            return bare_network(model, tokenizer).config
    if path is None:
        path, key = str(model.path), "model.path"
    return describe(path, model.trust_remote_code, key).get_text_config()


EXPERT = ".experts."
"""In the name of every weight of an expert."""


def bare_network(
    model: Model, tokenizer: PreTrainedTokenizerFast | None, path: str | None = None
) -> PreTrainedModel:
    """The policy's network, or that of the model in `path`, as its config says; call it on the meta device."""
    if path is None and model.new is not None:
        return new_network(model.new, tokenizer or new_tokenizer(), seed=0)
    trusted = model.trust_remote_code
    config = describe(path or str(model.path), trusted)
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME, trust_remote_code=trusted)


def experts_in(config: PreTrainedConfig) -> int:
    """Experts of a layer: families name it differently."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next(int(config.to_dict()[name]) for name in names if name in config.to_dict())


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def projected(linear: dict[str, int], name: str) -> int:
    return sum(size for path, size in linear.items() if path.rpartition(".")[2] == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes by purpose. `lasting` is there all the time; of the two phases only one is."""

    lasting: dict[str, int]
    sampling: dict[str, int] = field(default_factory=dict)
    update: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    """What offloading of the optimizer and the layout put in the memory of the host."""

    @property
    def peak(self) -> int:
        """Most bytes at once on the device of a learner that an engine shares."""
        return sum(self.lasting.values()) + max(self.engine, sum(self.update.values()))

    @property
    def learner(self) -> int:
        """The same of a learner alone."""
        return sum(self.lasting.values()) + sum(self.update.values())

    @property
    def engine(self) -> int:
        """The same of an engine alone."""
        return sum(self.sampling.values())

    def keeping(self, name: str) -> "Memory":
        """Where a part of sampling stays between the phases."""
        phase = {other: size for other, size in self.sampling.items() if other != name}
        return replace(self, lasting=self.lasting | {name: self.sampling[name]}, sampling=phase)

    def beside(self, name: str, other: "Memory") -> "Memory":
        """With another model on the same processes. Models learn one after the other, so of their updates the larger
        counts."""
        larger = max(self.update, other.update, key=lambda parts: sum(parts.values()))
        lasting, host = (
            ours | {name if part == "weights" else f"{name}'s {part}": size for part, size in theirs.items()}
            for ours, theirs in ((self.lasting, other.lasting), (self.host, other.host))
        )
        return replace(self, lasting=lasting, update=larger, host=host)

    def sentence(self) -> str:
        larger = max(self.sampling, self.update, key=lambda phase: sum(phase.values()))
        parts = {name: size for name, size in (self.lasting | larger).items() if size}
        return ", ".join(f"{name} {readable(size)}" for name, size in parts.items())


def memory(
    run: Run,
    shape: Shape,
    longest_prompt: int,
    reference: Shape | None,
    axes: Axes = ALONE,
    reference_axes: Axes = ALONE,
) -> Memory:
    """What the fullest process of a layout takes at its peak; `reference` is given where the run holds a reference
    model of its own, which has a layout of its own."""
    learner = run.learner
    need = learning(run, shape, learner.layout, learner.optimizer, longest_prompt, axes)
    if reference is not None:
        need = need.beside("reference", frozen(run, reference, run.reference.layout, reference_axes))
    return replace(need, sampling=sampling(run, shape, longest_prompt, DTYPES[run.model.dtype].itemsize))


def learning(
    run: Run, shape: Shape, layout: Layout, optimizer: Optimizer, longest_prompt: int, axes: Axes
) -> Memory:
    """What a model that learns takes on the fullest process of a layout."""
    word = DTYPES[run.model.dtype].itemsize
    weights, trained = held(shape, axes)
    states = {"optimizer": 2 * trained * FLOAT}
    if word != FLOAT or optimizer.offload:
        states["master weights"] = trained * FLOAT
    lasting: dict[str, int] = {"weights": weights * word}
    host: dict[str, int] = {}
    if optimizer.offload:
        host |= states | {"gradients of the masters": trained * FLOAT}
    else:
        lasting |= states
    updating = update(run, shape, longest_prompt, word, axes, layout.pipeline_schedule)
    if layout.offload_parameters:
        host["weights"] = lasting.pop("weights")
    if layout.offload_parameters or layout.offload_gradients:
        host["gradients"] = updating.pop("gradients")
    return Memory(lasting=lasting, update=updating, host=host)


def frozen(run: Run, shape: Shape, layout: Layout, axes: Axes) -> Memory:
    """What a model that is only read takes on the fullest process of a layout."""
    weights = {"weights": held(shape, axes)[0] * DTYPES[run.model.dtype].itemsize}
    away = layout.offload_parameters
    return Memory(lasting={} if away else weights, host=weights if away else {})


def held(shape: Shape, axes: Axes) -> tuple[int, int]:
    """Weights, and trained ones among them, that the fullest process holds all the time."""
    stage = axes.layers(shape.layers) / shape.layers
    outside = shape.embedding + (0 if shape.tied else shape.head)
    here = outside if axes.pipeline == 1 else max(shape.embedding, shape.head)
    experts = shape.expert_parameters * stage
    split = (shape.parameters - outside) * stage - experts + here
    weights = split / axes.tensor + experts
    trained = weights
    if shape.trainable < shape.parameters:
        trained = shape.trainable * stage / axes.tensor
    return math.ceil(weights / axes.cut), math.ceil(trained / axes.cut)


def gathered(shape: Shape, axes: Axes, word: int) -> int:
    """Bytes of whole weights that are there only while they are used: those outside the layers, and of two layers
    (one computes, the next arrives) with one layer's gradient, which is summed in float32."""
    if axes.cut == 1:
        return 0
    outside = shape.embedding + (0 if shape.tied else shape.head)
    here = outside if axes.pipeline == 1 else max(shape.embedding, shape.head)
    split = (shape.parameters - outside - shape.expert_parameters) / axes.tensor
    layer = (split + shape.expert_parameters / axes.expert) / shape.layers
    trained = 1.0 if shape.trainable == shape.parameters else shape.trainable / shape.parameters
    gradients = trained * (word + FLOAT)
    return int(layer * (2 * word + gradients) + here * (word + trained * word) / axes.tensor)


def sampling(run: Run, shape: Shape, longest_prompt: int, word: int) -> dict[str, int]:
    """The engine: answers in slots, each prompt once, and the choice of a token."""
    answers, prompts = asked(run, run.placement.engines)
    slots = min(run.sampling.slots, answers)
    tokens = slots * run.sampling.max_answer_tokens + min(slots, prompts) * longest_prompt
    parts = {"KV cache": tokens * shape.key_value * word, "logits": slots * drawing(run, shape)}
    copy = shape.parameters * word // run.engine.tensor_parallel
    if pick(run.device).type == "cpu" and lays_out(run, slots):
        parts["weights laid out"] = copy
    return parts if run.placement.kind == "inline" else {"engine's weights": copy, **parts}


def lays_out(run: Run, slots: int) -> bool:
    """Whether an engine on a CPU holds its weights a second time while it samples."""
    return run.engine.kind == "embedded" and run.model.dtype == "fp32" and slots >= FEW


def asked(run: Run, engines: int = 1) -> tuple[int, int]:
    """Answers, and different prompts, that the busiest of so many engines is asked for at once, in a step or in an
    evaluation. Answers are dealt out in equal shares, those to one prompt as neighbours."""
    s, e = run.sampling, run.eval
    asked_for = [(s.prompts_per_step, s.answers_per_prompt)]
    if run.data.eval is not None and e.every is not None:
        asked_for += [(e.questions, e.answers), (e.questions, 1)]
    answers = prompts = 0
    for questions, each in asked_for:
        share = math.ceil(questions * each / engines)
        # A share begins at most so far behind the first answer to a prompt.
        behind = each - math.gcd(share, each)
        answers = max(answers, share)
        prompts = max(prompts, min(questions, (behind + share - 1) // each + 1))
    return answers, prompts


def drawing(run: Run, shape: Shape) -> int:
    """Bytes for the choice of one answer's next token."""
    s = run.sampling
    truncates = s.top_k > 0 or s.top_p < 1 or s.min_p > 0
    return shape.vocabulary * FLOAT * (TRUNCATED_COPIES if truncates else SAMPLED_COPIES)


def update(
    run: Run, shape: Shape, longest_prompt: int, word: int, axes: Axes, schedule: str
) -> dict[str, int]:
    """Forward and backward of one micro-batch, or of those on their way through a pipeline, with all gradients."""
    answer, group = run.sampling.max_answer_tokens, run.sampling.answers_per_prompt
    longest = longest_prompt + answer
    tokens = min(run.learner.room(longest, longest_prompt), run.rollouts_per_step * longest)
    beside = answer * max(1, min(group, (tokens - longest_prompt) // answer))
    answers = tokens * beside // (longest_prompt + beside)
    logits = answers * shape.vocabulary * FLOAT // (axes.tensor * axes.context)
    layer = shape.kept(axes)
    parts = math.ceil(run.rollouts_per_step * longest / run.learner.updates_per_step / axes.data / tokens)
    layers = kept_layers(schedule, shape, axes, parts)
    scores = probabilities(run, shape.heads * answers * longest / (axes.tensor * axes.context))
    kept = layers * (tokens * layer * word + scores)
    if run.learner.checkpointing:
        kept = tokens * (layers * shape.hidden / (axes.tensor * axes.context) + layer) * word + scores
    copies = GRAPH_COPIES if axes.tensor > 1 or run.algorithm.entropy else LOGIT_COPIES
    found = {
        "gradients": held(shape, axes)[1] * word,
        "activations": int(kept),
        "logits": min(logits, run.learner.logits_mb * MIB) * copies,
    }
    whole = gathered(shape, axes, word)
    return found | ({"gathered weights": whole} if whole else {})


def probabilities(run: Run, scores: float) -> float:
    """Bytes that a layer keeps of so many scores of answers, where a CPU writes them out."""
    size = scores * FLOAT
    return size if run.model.dtype == "fp32" and size <= SCORES and pick(run.device).type == "cpu" else 0


def kept_layers(schedule: str, shape: Shape, axes: Axes, parts: int) -> float:
    """Layers whose activations the first process of a pipeline keeps at its fullest, while `parts` micro-batches go
    through: those of one stage for each pass that it has not gone back through."""
    ranks, chunks = axes.pipeline, axes.pipeline_chunks
    passes = parts * chunks
    if schedule == "1f1b":
        passes = min(passes, ranks if chunks == 1 else 2 * (ranks - 1) + (chunks - 1) * ranks + 1)
    return passes * axes.layers(shape.layers) / chunks if ranks > 1 else shape.layers


def several(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count > 1)}"


def readable(size: int) -> str:
    """1.5 GB, 20 MB: decimal units, as disks are sold and models are published."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1000:.0f} kB"
