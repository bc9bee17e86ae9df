"""`profile=true`: where one step goes, phase by phase, against what the device could do at best.

The limit of a phase is the time of its matrix products at the rate that a large product reaches on this device,
measured on the spot, or of reading the weights once per decoding step at the bandwidth of a large copy, whichever is
longer.
Embedding look-ups, norms, sampling, Python and the optimizer count as overhead: that is what the share shows.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import profile
from transformers import PretrainedConfig

from tandem.device import synchronize
from tandem.learner import Actor
from tandem.model import LanguageModel
from tandem.model.product import product
from tandem.types import Group

PHASES = (
    "rollout",
    "non_overlap_reward",
    "non_overlap_reward_model",
    "old_log_p",
    "reference_model",
    "critic_model",
    "adv",
    "update",
    "update_critic",
)
"""Of a step, in order, as `timing/*` names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One row of the table."""

    name: str
    seconds: float
    flops: float
    """Of matrix products and attention."""
    limit_s: float
    """What they would take at the measured rates."""

    @property
    def share(self) -> float:
        return self.limit_s / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the device reaches on large operations in the model's type."""

    flops_per_s: float
    bytes_per_s: float


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of a few large matrix products and copies."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(size * size * 16, device=device)
    target = torch.empty_like(source)
    product_s = best_time(lambda: product(a, b), device)
    copied = best_time(lambda: target.copy_(source), device)
    return Rates(flops_per_s=2 * size**3 / product_s, bytes_per_s=2 * source.numel() * 4 / copied)


def best_time(act: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        act()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def matmul_weights(model: LanguageModel) -> int:
    """Weights that every token is multiplied with: all matrices but the input embedding, and the output head."""
    network = model.network
    embedding = network.get_input_embeddings().weight
    matrices = {id(p): p.numel() for p in network.parameters() if p.ndim == 2 and p is not embedding}
    head = network.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return sum(matrices.values()) + (embedding.numel() if tied else 0)


def forward_flops(model: LanguageModel, groups: list[Group]) -> float:
    """Of all tokens of a step, prompts once."""
    pairs = sum(prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in many) for prompt, many in lengths(groups))
    return product_flops(model, groups) + attention_flops(model.network.config, pairs)


def product_flops(model: LanguageModel, groups: list[Group]) -> float:
    """Of them, those of products with weights."""
    return 2.0 * matmul_weights(model) * sum(prompt + sum(many) for prompt, many in lengths(groups))


def lengths(groups: list[Group]) -> list[tuple[int, list[int]]]:
    """Tokens of each group's prompt, and of its answers."""
    return [(g.rollouts[0].prompt_length, [r.answer_length for r in g.rollouts]) for g in groups]


def attention_flops(config: PretrainedConfig, pairs: float) -> float:
    """Scores and mixing for so many (query, key) pairs: 4 FLOP per pair, head and channel, in every layer."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 4.0 * pairs * heads * dim * config.num_hidden_layers


class StepProfile:
    """Traces one step, then writes `trace.json` (chrome://tracing, Perfetto), `phases.json` and a table."""

    def __init__(
        self, folder: Path, actor: Actor, critic: LanguageModel | None, say: Callable[[str], None]
    ) -> None:
        self.folder, self.actor, self.critic, self.say = folder, actor, critic, say
        model = self.model = actor.model
        self.rates = measure_rates(model.device, model.network.dtype)
        self._profiler = profile()

    def start(self) -> None:
        self._profiler.start()

    def finish(self, step: int, groups: list[Group], seconds: dict[str, float], slots: int) -> list[Phase]:
        self._profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.folder / "trace.json"))
        phases = self.phases(groups, seconds, slots)
        record = {
            "step": step,
            "rates": asdict(self.rates),
            "phases": [asdict(p) | {"share": p.share} for p in phases],
        }
        (self.folder / "phases.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self.say(table(phases, self.rates))
        self.say(f"trace of step {step}: {self.folder / 'trace.json'}")
        return phases

    def phases(self, groups: list[Group], seconds: dict[str, float], slots: int) -> list[Phase]:
        """Work and limit of each phase that was timed."""
        answers = [length for _, many in lengths(groups) for length in many]
        steps = max(max(answers, default=0), sum(answers) / min(slots, max(len(answers), 1)))
        read = steps * matmul_weights(self.model) * self.model.network.dtype.itemsize
        forward = forward_flops(self.model, groups)
        values = 0.0 if self.critic is None else forward_flops(self.critic, groups)
        # Sampling computes the same tokens, one after the other.
        work = {
            "rollout": (forward, read / self.rates.bytes_per_s),
            "old_log_p": (forward, 0.0),
            "reference_model": (forward, 0.0),
            "critic_model": (values, 0.0),
            "update": (3 * forward - self._spared(groups), 0.0),
            "update_critic": (3 * values, 0.0),
        }
        rows = []
        for name in PHASES:
            taken = seconds.get(f"timing/{name}", 0.0)
            flops, floor = work.get(name, (0.0, 0.0))
            if taken > 1e-3:
                limit = max(flops / self.rates.flops_per_s, floor)
                rows.append(Phase(name=name, seconds=taken, flops=flops, limit_s=limit))
        return rows

    def _spared(self, groups: list[Group]) -> float:
        """Operations that the step's first update did not do, for sampling had."""
        share = 0.0 if self.actor.kept is None else self.actor.kept.spared
        return share * product_flops(self.model, groups) / self.actor.run.learner.updates_per_step


def table(phases: list[Phase], rates: Rates) -> str:
    total = sum(phase.seconds for phase in phases)
    products, copies = f"{rates.flops_per_s / 1e9:,.0f} GFLOP/s", f"{rates.bytes_per_s / 1e9:,.1f} GB/s"
    lines = [
        f"limits: {products} in large products, {copies} in copies",
        f"{'phase':<24} {'seconds':>8} {'of step':>8} {'GFLOP':>9} {'limit, s':>9} {'share of limit':>15}",
    ]
    for p in phases:
        share = f"{p.share:.0%}" if p.flops else "-"
        work = f"{p.flops / 1e9:>9.1f} {p.limit_s:>9.3f} {share:>15}"
        lines.append(f"{p.name:<24} {p.seconds:>8.3f} {p.seconds / total:>8.0%} {work}")
    return "\n".join(lines)
