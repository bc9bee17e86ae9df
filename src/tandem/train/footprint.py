"""Bytes that a run will take, in memory and on disk, from its configuration alone. docs/cli.md has the formulas."""

import math
import sys
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.config.sections import Model, Optimizer
from tandem.device import pick
from tandem.engine.vllm_adapter import EXPERT
from tandem.model import describe
from tandem.model.attention import NAME, SCORES
from tandem.model.feed_forward import is_known
from tandem.model.load import DTYPES, with_adapter
from tandem.model.new import new_network, new_tokenizer
from tandem.model.product import FEW
from tandem.train.memory import Memory, fullest
from tandem.train.plan.axes import ALONE, Axes
from tandem.train.plan.stages import Stages, fullest_of

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
    gates: int
    """Tensors of this width that a token's backward pass needs: gate, up and their product, and silu(gate) where
    `feed_forward` does not know the family."""
    query: int
    """Outputs of a layer's query projection."""
    key_value: int
    """Outputs of all layers' key and value projections: cache entries per token."""
    normed: int
    """Of a layer's queries and keys, the outputs that a norm for each head goes over."""
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
    tensors: int
    """That go to an engine: those of the adapter, or where there is none all."""

    @property
    def inside(self) -> int:
        """Weights of all layers."""
        return self.parameters - self.embedding - self.hidden - (0 if self.tied else self.head)

    @property
    def used(self) -> float:
        """Weights in the layers that one token is multiplied with."""
        return self.dense + (self.expert_parameters * self.active / self.experts if self.experts else 0)

    def kept(self, axes: Axes, sequence: bool, word: int) -> float:
        """Bytes per token, of weights of `word` bytes, that one process of a layout keeps of a layer for the backward
        pass: two norms, attention, gated feed-forward (or that of the experts, to which each token goes in copies).
        What goes into a part that `tensor` splits is of all tokens; what lies between these parts too, unless
        `sequence` splits it."""
        # A norm keeps what it gets, in float32, and what it makes of it before its weights.
        norm = FLOAT + word
        attention = word * (4 * self.query + 2 * self.key_value // self.layers) + norm * self.normed
        if self.experts:
            copies = self.active * (EXPERT_COPIES * self.hidden + 4 * self.expert_width)
            into, inner, between = word * self.hidden, 0, word * (self.hidden + copies)
        else:
            into, inner, between = 2 * word * self.hidden, self.gates * word * self.feed_forward, 0
        between += 2 * norm * self.hidden
        whole = into + between / axes.token_shares(sequence)
        return (whole + (attention + inner) / axes.tensor) / axes.context


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
    normed = any("q_norm" in name for name, _ in named)
    return Shape(
        parameters=count(module),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        layers=layers,
        hidden=int(text.hidden_size),
        feed_forward=int(text.intermediate_size),
        gates=3 if any(map(is_known, network.modules())) else 4,
        query=projected(linear, "q_proj") // layers,
        key_value=projected(linear, "k_proj") + projected(linear, "v_proj"),
        normed=normed * (projected(linear, "q_proj") + projected(linear, "k_proj")) // layers,
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
        tensors=sum(".lora_" in name for name, _ in named) or len(named),
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


def bare_network(
    model: Model, tokenizer: PreTrainedTokenizerFast | None, path: str | None = None
) -> PreTrainedModel:
    """The policy's network, or that of the model in `path`, as its config says; call it on the meta device."""
    if path is None and model.new is not None:
        return new_network(model.new, tokenizer or new_tokenizer(), seed=0)
    trusted = model.trust_remote_code
    config = describe(path or str(model.path), trusted)
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME, trust_remote_code=trusted)


def has_experts(model: Model) -> bool:
    """Whether the policy is a mixture of them."""
    with torch.device("meta"):
        return any(EXPERT in name for name, _ in bare_network(model, None).named_parameters())


def experts_in(config: PreTrainedConfig) -> int:
    """Experts of a layer: families name it differently."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next(int(config.to_dict()[name]) for name in names if name in config.to_dict())


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def projected(linear: dict[str, int], name: str) -> int:
    return sum(size for path, size in linear.items() if path.rpartition(".")[2] == name)


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
    learner, apart = run.learner, run.placement.kind == "apart"
    engine = sampling(run, shape, longest_prompt, DTYPES[run.engine_dtype].itemsize)
    each = [
        replace(
            learning_at(run, shape, learner.layout, learner.optimizer, longest_prompt, stages),
            sampling=engine,
        )
        for stages in fullest_of(axes, shape.layers)
    ]
    need = max(each, key=lambda one: one.learner if apart else one.peak)
    if copy := copy_for_engines(run, shape, axes):
        need = replace(need, lasting=need.lasting | {"copy for engines": copy})
    if reference is not None:
        need = need.beside("reference", frozen(run, reference, run.reference.layout, reference_axes))
    return need


def learning(
    run: Run, shape: Shape, layout: Layout, optimizer: Optimizer, longest_prompt: int, axes: Axes
) -> Memory:
    """What a model that learns takes on the fullest process of a layout."""
    stages = fullest_of(axes, shape.layers)
    return fullest([learning_at(run, shape, layout, optimizer, longest_prompt, each) for each in stages])


def learning_at(
    run: Run, shape: Shape, layout: Layout, optimizer: Optimizer, longest_prompt: int, stages: Stages
) -> Memory:
    """The same on the processes with these stages."""
    word = DTYPES[run.model.dtype].itemsize
    weights, trained = held(shape, stages)
    states = {"optimizer": 2 * trained * FLOAT}
    if word != FLOAT or optimizer.offload:
        states["master weights"] = trained * FLOAT
    lasting: dict[str, int] = {"weights": weights * word}
    host: dict[str, int] = {}
    if optimizer.offload:
        host |= states | {"gradients of the masters": trained * FLOAT}
    else:
        lasting |= states
    updating = {"gradients": trained * word} | passing(run, shape, longest_prompt, word, stages, layout)
    if layout.offload_parameters:
        host["weights"] = lasting.pop("weights")
    if layout.offload_parameters or layout.offload_gradients:
        host["gradients"] = updating.pop("gradients")
    return Memory(lasting=lasting, update=updating, host=host)


def copy_for_engines(run: Run, shape: Shape, axes: Axes) -> int:
    """Bytes on each learner for engines on its device that take the weights by handles (`engine.transfer=ipc`): none
    where these lead to the learner's own tensors, else all weights once more, in the engine's type. An adapter keeps
    its own, and a learner that sleeps has no handles to give."""
    if run.engine.transfer != "ipc" or run.learner.sleep:
        return 0
    whole = axes.world == axes.replicate and not run.learner.layout.offload_parameters
    cast = run.model.dtype != run.engine_dtype and not shape.adapter
    if whole and not cast and pick(run.device).type != "cpu":
        return 0
    return shape.adapter * FLOAT or shape.parameters * DTYPES[run.engine_dtype].itemsize


def frozen(run: Run, shape: Shape, layout: Layout, axes: Axes) -> Memory:
    """What a model that is only read takes on the fullest process of a layout."""
    return fullest([frozen_at(run, shape, layout, stages) for stages in fullest_of(axes, shape.layers)])


def frozen_at(run: Run, shape: Shape, layout: Layout, stages: Stages) -> Memory:
    """The same on the processes with these stages."""
    weights = {"weights": held(shape, stages)[0] * DTYPES[run.model.dtype].itemsize}
    away = layout.offload_parameters
    return Memory(lasting={} if away else weights, host=weights if away else {})


def held(shape: Shape, stages: Stages) -> tuple[int, int]:
    """Weights, and trained ones among them, that a process has all the time. A head that is the embedding is there
    twice where the ends of a pipeline are two processes."""
    axes, share = stages.axes, stages.layers / shape.layers
    experts = shape.expert_parameters * share
    split = shape.inside * share - experts + outside(shape, stages)
    weights = split / axes.tensor + experts
    trained = weights
    if shape.trainable < shape.parameters:
        trained = shape.trainable * share / axes.tensor
    return math.ceil(weights / axes.cut), math.ceil(trained / axes.cut)


def outside(shape: Shape, stages: Stages) -> int:
    """Weights of a process that are in no layer: the embedding, the last norm, the output head."""
    head = 0 if stages.first and shape.tied else shape.head
    return shape.embedding * stages.first + (shape.hidden + head) * stages.last


def gathered(shape: Shape, stages: Stages, word: int) -> int:
    """Bytes of whole weights that are there only while they are used: those outside the layers, and of two layers
    (one computes, the next arrives) with one layer's gradient, which is summed in float32."""
    axes = stages.axes
    if axes.cut == 1:
        return 0
    split = (shape.inside - shape.expert_parameters) / axes.tensor
    layer = (split + shape.expert_parameters / axes.expert) / shape.layers
    trained = 1.0 if shape.trainable == shape.parameters else shape.trainable / shape.parameters
    gradients = trained * (word + FLOAT)
    rest = outside(shape, stages) / axes.tensor
    return int(layer * (2 * word + gradients) + rest * (word + trained * word))


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
    return run.engine.kind == "embedded" and run.engine_dtype == "fp32" and slots >= FEW


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


def passing(
    run: Run, shape: Shape, longest_prompt: int, word: int, stages: Stages, layout: Layout
) -> dict[str, int]:
    """Forward and backward of one micro-batch, or of those on their way through a pipeline."""
    axes, answer, group = stages.axes, run.sampling.max_answer_tokens, run.sampling.answers_per_prompt
    longest = longest_prompt + answer
    tokens = min(run.learner.room(longest, longest_prompt), run.rollouts_per_step * longest)
    beside = answer * max(1, min(group, (tokens - longest_prompt) // answer))
    answers = tokens * beside // (longest_prompt + beside)
    layer, schedule = shape.kept(axes, layout.sequence, word), layout.pipeline_schedule
    packs = math.ceil(group / (beside // answer))
    line = run.sampling.prompts_per_step * packs * longest_prompt + run.rollouts_per_step * answer
    parts = math.ceil(line / run.learner.updates_per_step / axes.data / tokens)
    layers = stages.kept(schedule, parts)
    scores = probabilities(run, shape.heads * answers * longest / (axes.tensor * axes.context))
    kept = layers * (tokens * layer + scores)
    if run.learner.checkpointing:
        entering = word * shape.hidden / (axes.token_shares(layout.sequence) * axes.context)
        kept = tokens * (layers * entering + layer) + scores
    waiting = parts - 1 if axes.pipeline > 1 and schedule == "gpipe" else 0
    found = {
        "activations": int(kept),
        "logits": logits(run, shape, axes, answers, waiting) if stages.last else 0,
    }
    whole = gathered(shape, stages, word)
    return found | ({"gathered weights": whole} if whole else {})


def logits(run: Run, shape: Shape, axes: Axes, answers: int, waiting: int) -> int:
    """Bytes for the choice of so many tokens, and what is kept of it for each micro-batch that is `waiting` for its
    way back: nothing of one whose logits are computed again."""
    size, room = (
        answers * shape.vocabulary * FLOAT // (axes.tensor * axes.context),
        run.learner.logits_mb * MIB,
    )
    copies = GRAPH_COPIES if axes.tensor > 1 or run.algorithm.entropy else LOGIT_COPIES
    return min(size, room) * copies + (size * waiting if size <= room else 0)


def probabilities(run: Run, scores: float) -> float:
    """Bytes that a layer keeps of so many scores of answers, where a CPU writes them out."""
    size = scores * FLOAT
    return size if run.model.dtype == "fp32" and size <= SCORES and pick(run.device).type == "cpu" else 0
