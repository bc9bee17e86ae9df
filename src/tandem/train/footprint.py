"""Bytes that a run will take, in memory and on disk, from its configuration alone. docs/cli.md has the formulas."""

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tandem.config.run import Run
from tandem.config.sections import Model
from tandem.model import describe
from tandem.model.attention import NAME
from tandem.model.load import DTYPES, with_adapter
from tandem.model.new import new_network
from tandem.train.snapshot import keeps_reference

FLOAT = 4
LOGIT_COPIES = 5
"""Tensors of the size of the logits that live at once: themselves, log-softmax, probabilities, two gradients."""
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

    @property
    def activations(self) -> int:
        """Numbers kept per token and layer for the backward pass: two norms, attention, gated feed-forward."""
        attention = 2 * (self.query + self.key_value // self.layers) + 2 * self.query
        return 6 * self.hidden + attention + 4 * self.feed_forward


def shape_of(model: Model, tokenizer: PreTrainedTokenizerFast, path: str | None = None) -> Shape:
    """The sizes of the policy, or of the model in `path`; ConfigError where an adapter finds no place."""
    with torch.device("meta"):
        if path is None and model.new is not None:
            network = new_network(model.new, tokenizer, seed=0)
        else:
            trusted = model.trust_remote_code
            config = describe(path or str(model.path), trusted)
            network = AutoModelForCausalLM.from_config(
                config, attn_implementation=NAME, trust_remote_code=trusted
            )
        module: nn.Module = network
        linear = {name: m.out_features for name, m in network.named_modules() if isinstance(m, nn.Linear)}
        if path is None and model.lora is not None:
            module = with_adapter(network, model.lora, 0, None)
    text = network.config.get_text_config()
    layers = int(text.num_hidden_layers)
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
    )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def projected(linear: dict[str, int], name: str) -> int:
    return sum(size for path, size in linear.items() if path.rpartition(".")[2] == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes by purpose. `lasting` is there all the time; of the two phases only one is."""

    lasting: dict[str, int]
    sampling: dict[str, int]
    update: dict[str, int]
    host: dict[str, int]
    """What learner.optimizer.offload puts in the memory of the host."""

    @property
    def peak(self) -> int:
        """Most bytes at once on the device."""
        phases = (sum(self.sampling.values()), sum(self.update.values()))
        return sum(self.lasting.values()) + max(phases)

    def sentence(self) -> str:
        larger = max(self.sampling, self.update, key=lambda phase: sum(phase.values()))
        parts = {name: size for name, size in (self.lasting | larger).items() if size}
        return ", ".join(f"{name} {readable(size)}" for name, size in parts.items())


def memory(run: Run, shape: Shape, longest_prompt: int, reference: Shape | None) -> Memory:
    """What the run takes at its peak; `reference` is given where the run holds a reference model of its own."""
    word = DTYPES[run.model.dtype].itemsize
    offload = run.learner.optimizer.offload
    states = {"optimizer": 2 * shape.trainable * FLOAT}
    if word != FLOAT or offload:
        states["master weights"] = shape.trainable * FLOAT
    lasting = {"weights": shape.parameters * word}
    if reference is not None:
        lasting["reference"] = reference.parameters * word
    host = {}
    if offload:
        host = states | {"gradients of the masters": shape.trainable * FLOAT}
    else:
        lasting |= states
    return Memory(
        lasting=lasting,
        sampling=sampling(run, shape, longest_prompt, word),
        update=update(run, shape, longest_prompt, word),
        host=host,
    )


def sampling(run: Run, shape: Shape, longest_prompt: int, word: int) -> dict[str, int]:
    """The engine: answers in slots, each prompt once, and the choice of a token."""
    s, evaluates = run.sampling, run.data.eval is not None and run.eval.every is not None
    requests = max(run.rollouts_per_step, run.eval.questions * run.eval.answers if evaluates else 0)
    slots = min(s.slots, requests)
    prompts = min(slots, max(s.prompts_per_step, run.eval.questions if evaluates else 0))
    tokens = slots * s.max_answer_tokens + prompts * longest_prompt
    truncates = s.top_k > 0 or s.top_p < 1 or s.min_p > 0
    copies = TRUNCATED_COPIES if truncates else SAMPLED_COPIES
    return {
        "KV cache": tokens * shape.key_value * word,
        "logits": slots * shape.vocabulary * FLOAT * copies,
    }


def update(run: Run, shape: Shape, longest_prompt: int, word: int) -> dict[str, int]:
    """Forward and backward of one micro-batch, with the gradients of all weights."""
    longest = longest_prompt + run.sampling.max_answer_tokens
    tokens = min(max(run.learner.tokens_per_forward, longest), run.rollouts_per_step * longest)
    answers = tokens * run.sampling.max_answer_tokens // longest
    logits = min(answers * shape.vocabulary * FLOAT, run.learner.logits_mb * MIB)
    kept = shape.layers * shape.activations
    if run.learner.checkpointing:
        kept = shape.layers * shape.hidden + shape.activations
    return {
        "gradients": shape.trainable * word,
        "activations": tokens * kept * word,
        "logits": logits * LOGIT_COPIES,
    }


def disk(run: Run, shape: Shape, longest_prompt: int) -> dict[str, int]:
    """What the run folder will hold at its fullest: while a checkpoint is written the old ones are still there."""
    word = DTYPES[run.model.dtype].itemsize
    saved = shape.parameters if run.model.lora is None else shape.trainable
    one = saved * word + 2 * shape.trainable * FLOAT
    if word != FLOAT or run.learner.optimizer.offload:
        one += shape.trainable * FLOAT
    if keeps_reference(run):
        one += shape.parameters * word
    every = run.checkpoint.every
    saves = 1 if every is None else max(1, -(-run.steps // every))
    copies = min(run.checkpoint.keep + 1, saves)
    return {
        f"{copies} checkpoint{'s' * (copies > 1)}": copies * one,
        "exported model": shape.parameters * word,
        "rollout records": records(run, longest_prompt),
    }


def records(run: Run, longest_prompt: int) -> int:
    """At most so many bytes of rollout records: token ids, marks and log-probabilities are written as text."""
    if run.journal.rollouts == "none":
        return 0
    answer = run.sampling.max_answer_tokens
    one = 1000 + 16 * (longest_prompt + answer) + 46 * answer
    return run.rollouts_per_step * one * -(-run.steps // run.journal.rollouts_every)


def host_bytes() -> int:
    """Host memory that can still be taken: what the machine has, or less where a control group sets a limit."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return available
    if limit == "max":
        return available
    # File cache that nobody uses counts as used and is given back when memory is short.
    return min(available, int(limit) - used + int(stat["inactive_file"]))


def readable(size: int) -> str:
    """1.5 GB, 20 MB: decimal units, as disks are sold and models are published."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1000:.0f} kB"
