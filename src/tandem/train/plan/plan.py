"""`tandem plan`: every layout of so many devices, what of them fits, and how long a step takes in each."""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from transformers import PreTrainedConfig

from tandem.config.run import Run
from tandem.config.sections import Learner
from tandem.errors import ConfigError
from tandem.model.parallel.fit import check_fit
from tandem.train import footprint
from tandem.train.footprint import Memory, Shape
from tandem.train.layouts import check_layouts, holds_reference
from tandem.train.plan.axes import ALONE, Axes, Rules, layouts
from tandem.train.plan.device import Rates
from tandem.train.plan.engine import Engine, engines
from tandem.train.plan.link import links
from tandem.train.plan.training import Pass, Trainer
from tandem.train.plan.work import Lengths

SHARES = (1, 2, 3, 4, 5, 6, 7)
"""Eighths of the devices that may be given to engines of their own."""
NEAREST = 3
"""Layouts that do not fit of which more is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A layout that fits."""

    axes: Axes
    reference: Axes
    """Of the reference, where the run holds one."""
    offloaded: str
    """What waits in host memory."""
    samplers: int
    """Devices of engines that are apart from the learner; 0 where both share all devices."""
    memory: Memory
    """Of the learner's processes; the engine's part is in `engine`."""
    engine: Engine
    update: Pass
    seconds: dict[str, float]
    """By phase."""
    step_s: float

    @property
    def peak(self) -> float:
        """Most bytes at once on one device."""
        lasting, updating = (sum(part.values()) for part in (self.memory.lasting, self.memory.update))
        if self.samplers:
            return max(lasting + updating, self.engine.bytes)
        return lasting + max(updating, self.engine.bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A layout that does not fit."""

    axes: Axes
    offloaded: str
    lacking: float
    """Bytes."""
    why: str


@dataclass(slots=True, kw_only=True)
class Plan:
    """What was found."""

    run: Run
    shape: Shape
    reference: bool
    """The run holds a reference model of its own."""
    lengths: Lengths
    rates: Rates
    count: int
    per_node: int
    tried: int = 0
    fitting: int = 0
    offers: list[Offer] = field(default_factory=list)
    """The fastest, best first."""
    misses: list[Miss] = field(default_factory=list)
    """The nearest to fitting."""
    missed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Reasons why layouts cannot be, with the number of combinations of axes."""


def plan(
    run: Run, rates: Rates, *, count: int, per_node: int, lengths: Lengths, top: int, offload: bool = True
) -> Plan:
    """The `top` fastest layouts of `count` devices. No weight is read. `offload`: the device is not the host.

    ConfigError where an answer does not fit the model's positions.
    """
    config = footprint.config_of(run.model, None)
    shape = footprint.shape_of(run.model, None)
    longest = lengths.longest_prompt + lengths.longest_answer
    if longest > shape.positions:
        raise ConfigError(
            f"prompt {lengths.longest_prompt} + answer {lengths.longest_answer} = {longest} tokens are more than the "
            f"model's {shape.positions:,} positions; lower data.max_prompt_tokens or sampling.max_answer_tokens"
        )
    check_layouts(run, None)
    owned = holds_reference(run)
    made = Plan(
        run=run,
        shape=shape,
        reference=owned,
        lengths=lengths,
        rates=rates,
        count=count,
        per_node=per_node,
    )
    path = run.reference.path
    reference = (shape if path is None else footprint.shape_of(run.model, None, path)) if owned else None
    reference_config = footprint.config_of(run.model, None, path)
    rules = Rules(config, shape.experts, per_node)
    search = Search(made, reference, reference_config, rules, variants(run) if offload else {"": run})
    offers = search.offers()
    made.offers = heapq.nsmallest(top, offers, key=lambda offer: (offer.step_s, offer.peak))
    return made


def variants(run: Run) -> dict[str, Run]:
    """The run with more and more in host memory, by what that is; what it offloads already stays so."""
    learner = run.learner
    optimizer = learner.model_copy(
        update={"optimizer": learner.optimizer.model_copy(update={"offload": True})}
    )
    layout = {"offload_parameters": True, "offload_gradients": False}
    everything = optimizer.model_copy(update={"layout": learner.layout.model_copy(update=layout)})
    reference = run.reference.model_copy(
        update={"layout": run.reference.layout.model_copy(update={"offload_parameters": True})}
    )
    away = run.model_copy(update={"reference": reference})
    found = {offloaded(each): (run, each) for each in (learner, optimizer)}
    found[offloaded(everything)] = (away, everything)
    return {name: whole.model_copy(update={"learner": each}) for name, (whole, each) in found.items()}


def offloaded(learner: Learner) -> str:
    names = {
        "optimizer": learner.optimizer.offload,
        "parameters": learner.layout.offload_parameters,
        "gradients": learner.layout.offload_gradients,
    }
    return " and ".join(name for name, is_so in names.items() if is_so)


class Search:
    """Goes through all layouts, and keeps count of what it meets in the plan."""

    def __init__(
        self,
        made: Plan,
        reference: Shape | None,
        reference_config: PreTrainedConfig,
        rules: Rules,
        runs: dict[str, Run],
    ) -> None:
        self.plan, self.rules, self.runs = made, rules, runs
        self.reference, self.reference_config = reference, reference_config
        self._engines: dict[tuple[int, int, bool], Engine | float] = {}
        self._all = links(made.rates, made.count, made.per_node)

    def offers(self) -> Iterator[Offer]:
        for samplers in self._samplers():
            yield from self._with(samplers)

    def _samplers(self) -> list[int]:
        """Devices for engines: none of their own, or a share of them."""
        count = self.plan.count
        return [0, *sorted({count * share // 8 for share in SHARES} - {0, count})]

    def _with(self, samplers: int) -> Iterator[Offer]:
        run, learners = self.plan.run, self.plan.count - samplers
        refusal = self._reference_refusal(learners)
        if refusal is not None:
            self.plan.refused[refusal] += 1
            return
        sequences = run.rollouts_per_step // run.learner.updates_per_step
        for axes in layouts(learners, self.rules, sequences):
            if isinstance(axes, str):
                self.plan.refused[axes] += 1
                continue
            self.plan.tried += 1
            found = self._fit(axes, samplers)
            if isinstance(found, Offer):
                self.plan.fitting += 1
                yield found
            else:
                self.plan.missed += 1
                self.plan.misses = heapq.nsmallest(
                    NEAREST, [*self.plan.misses, found], key=lambda m: m.lacking
                )

    def _reference_refusal(self, learners: int) -> str | None:
        """Why `reference.layout` cannot be on so many learners; None where it can."""
        if self.reference is None or learners == 1:
            return None
        try:
            check_fit(self.plan.run.reference.layout, self.reference_config, learners, "reference.layout")
        except ConfigError as cause:
            return str(cause)
        return None

    def _fit(self, axes: Axes, samplers: int) -> Offer | Miss:
        """With as little in host memory as will do."""
        found: Offer | Miss | None = None
        for name, run in self.runs.items():
            found = self._try(axes, samplers, name, run)
            if isinstance(found, Offer):
                return found
        assert found is not None
        return found

    def _try(self, axes: Axes, samplers: int, name: str, run: Run) -> Offer | Miss:
        made, usable = self.plan, self.plan.rates.usable
        longest, other = made.lengths.longest_prompt, self._reference_axes(axes)
        memory = footprint.memory(run, made.shape, longest, self.reference, axes, other)
        if not made.rates.host_memory:
            memory = replace(memory, lasting=memory.lasting | memory.host, host={})
        lasting = sum(memory.lasting.values())
        over = lasting + sum(memory.update.values()) - usable
        if over > 0:
            parts = memory.lasting | memory.update
            largest = max(parts, key=lambda part: parts[part])
            why = f"the update, most of it {largest} ({footprint.readable(parts[largest])})"
            return Miss(axes=axes, offloaded=name, lacking=over, why=why)
        whole = made.count == 1 and run.engine.kind == "embedded" and "weights" in memory.lasting
        waiting = sum(memory.host.values()) - made.rates.host_memory
        if waiting > 0 and name:
            why = f"the host's memory, {footprint.readable(int(made.rates.host_memory))} a device"
            return Miss(axes=axes, offloaded=name, lacking=waiting, why=why)
        engine = self._engine(samplers, usable - (0 if samplers else lasting), whole and not samplers)
        if isinstance(engine, float):
            return Miss(axes=axes, offloaded=name, lacking=engine, why="sampling one answer at a time")
        return self._offer(run, axes, samplers, name, memory, engine)

    def _reference_axes(self, axes: Axes) -> Axes:
        """Those that `reference.layout` gives on the learner's processes; of one process there is only one layout."""
        if self.reference is None:
            return axes
        return ALONE if axes.world == 1 else Axes.of(self.plan.run.reference.layout, axes.world)

    def _reference_trainer(self, trainer: Trainer, axes: Axes) -> Trainer:
        """Whose forward pass is the reference's: without weights of its own it is the policy without its adapter."""
        if self.reference is None:
            return trainer
        offloads = trainer.run.reference.layout.offload_parameters
        return replace(trainer, shape=self.reference, axes=axes, offloads=offloads)

    def _engine(self, samplers: int, free: float, whole: bool) -> Engine | float:
        """The fastest engine, or the bytes that are missing."""
        key = (samplers, int(free), whole)
        if key not in self._engines:
            made = self.plan
            place = replace(self._all, count=samplers) if samplers else self._all
            found = list(
                engines(
                    made.run,
                    made.shape,
                    made.lengths,
                    made.rates,
                    place,
                    self.rules,
                    free,
                    whole=whole,
                    apart=samplers > 0,
                )
            )
            fitting = [e for e in found if isinstance(e, Engine)]
            lacking = [e for e in found if not isinstance(e, Engine)]
            self._engines[key] = min(fitting, key=lambda e: e.seconds) if fitting else min(lacking)
        return self._engines[key]

    def _offer(self, run: Run, axes: Axes, samplers: int, name: str, memory: Memory, engine: Engine) -> Offer:
        made, other = self.plan, self._reference_axes(axes)
        trainer = Trainer(
            run=run,
            shape=made.shape,
            lengths=made.lengths,
            axes=axes,
            rates=made.rates,
            links=self._all,
            offloads=run.learner.layout.offload_parameters,
        )
        update = trainer.update()
        seconds = {"rollout": engine.seconds}
        if run.old_logp == "recompute":
            seconds["old log-probs"] = trainer.logprobs().seconds
        if run.needs_reference:
            seconds["reference"] = self._reference_trainer(trainer, other).logprobs().seconds
        seconds |= {
            "update": update.seconds,
            "transfer": trainer.transfer(engine.tensor) if engine.copied else 0.0,
        }
        learning = sum(seconds.values()) - seconds["rollout"] - seconds["transfer"]
        ahead = samplers and run.sampling.max_lag
        rollout = seconds["rollout"]
        return Offer(
            axes=axes,
            reference=other,
            offloaded=name,
            samplers=samplers,
            memory=memory,
            engine=engine,
            update=update,
            seconds=seconds,
            step_s=(max(rollout, learning) if ahead else rollout + learning) + seconds["transfer"],
        )
