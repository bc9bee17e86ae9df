"""`tandem plan`: every layout of so many devices, what of them fits, and how long a step takes in each."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.config.sections import Optimizer
from tandem.train import footprint
from tandem.train.footprint import Shape, learning_at
from tandem.train.kept_bytes import Spared, spared
from tandem.train.layouts import check_layouts, holds_reference, not_alone
from tandem.train.memory import Memory, fullest, readable
from tandem.train.plan.axes import Axes, Rules, layouts
from tandem.train.plan.device import Rates
from tandem.train.plan.engine import Engine, engines
from tandem.train.plan.link import links
from tandem.train.plan.role import Role, roles_of
from tandem.train.plan.stages import Stages, fullest_of
from tandem.train.plan.training import Pass, Trainer
from tandem.train.plan.transfer import Transfer
from tandem.train.plan.variant import Variant, variants
from tandem.train.plan.work import Lengths

SHARES = (1, 2, 3, 4, 5, 6, 7)
"""Eighths of the devices that may be given to engines of their own."""
NEAREST = 3
"""Layouts that do not fit of which more is said."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of one model on the learners."""

    axes: Axes
    layers: int
    at: Callable[[Stages], Memory]
    """What processes with these stages take."""
    passes: dict[str, Pass] = field(default_factory=dict)
    """Of a step, by phase."""

    @cached_property
    def memory(self) -> Memory:
        """On the fullest process."""
        return fullest(self._fullest)

    @cached_property
    def lasting(self) -> int:
        """Most bytes that are on one process all the time."""
        return max(sum(one.lasting.values()) for one in self._fullest)

    @cached_property
    def _fullest(self) -> list[Memory]:
        return [self.at(stages) for stages in fullest_of(self.axes, self.layers)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What models take on the fullest learner; the engine's part is not in it."""

    own: Place
    """Of the policy."""
    together: Memory
    asleep: int
    """Bytes that wait in host memory while engines sample."""
    stays: int
    """Bytes that are there while the engine on the same device samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A layout that fits."""

    axes: Axes
    """The policy's."""
    variant: Variant
    samplers: int
    """Devices of engines that are apart from the learner; 0 where both share all devices."""
    places: dict[str, Place]
    """By role, the policy's as `actor`."""
    load: Load
    engine: Engine
    moving: dict[str, float]
    """Seconds, by phase, in which memory is moved and nothing is computed."""
    step_s: float

    @property
    def peak(self) -> float:
        """Most bytes at once on one device."""
        return max(self.load.together.learner, self.load.stays + self.engine.bytes)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase."""
        learning = {name: one.seconds for name, one in self.passes.items()}
        return {"rollout": self.engine.seconds, **learning, **self.moving}

    @property
    def passes(self) -> dict[str, Pass]:
        """Of the learner, by phase."""
        return {name: one for place in self.places.values() for name, one in place.passes.items()}

    @property
    def learning_s(self) -> float:
        return sum(one.seconds for one in self.passes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A layout that does not fit."""

    axes: Axes
    variant: Variant
    lacking: float
    """Bytes."""
    why: str


@dataclass(slots=True, kw_only=True)
class Plan:
    """What was found."""

    run: Run
    shape: Shape
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
    """The `top` fastest layouts of `count` devices. No weight is read. `offload`: the device is not the host."""
    config = footprint.config_of(run.model, None)
    shape = footprint.shape_of(run.model, None)
    if run.placement.learners > 1:
        check_layouts(run, None)
    if rates.host_memory:
        # What is estimated for a device that is not there must not depend on one that is.
        run = run.model_copy(update={"device": "meta"})
    made = Plan(run=run, shape=shape, lengths=lengths, rates=rates, count=count, per_node=per_node)
    given = Variant(run=run, roles=roles_of(run, shape))
    offers = Search(made, given, Rules(config, shape.experts, per_node, run.model.lora), offload).offers()
    made.offers = heapq.nsmallest(top, offers, key=lambda offer: (offer.step_s, offer.peak))
    return made


class Search:
    """Goes through all layouts, and keeps count of what it meets in the plan."""

    def __init__(self, made: Plan, given: Variant, rules: Rules, offload: bool) -> None:
        self.plan, self.rules, self.roles = made, rules, given.roles
        # An engine alone on a single device is in the learner's process.
        beside = made.count > 1 or made.run.placement.kind == "colocated"
        homes = {False: given, True: given.resident()}
        self._variants = {
            (shared, alone): variants(home, beside=shared and beside, alone=alone)
            if offload
            else [home.sleeping(given.run.learner.sleep and shared)]
            for shared in (True, False)
            for alone, home in homes.items()
        }
        self._places: dict[tuple[Variant, int], dict[str, Place]] = {}
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
        alone = learners == 1
        refusals = [
            why
            for role in self.roles
            if (why := not_alone(role.name, role.layout) if alone else role.refusal(learners)) is not None
        ]
        if refusals:
            self.plan.refused[refusals[0]] += 1
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

    def _fit(self, axes: Axes, samplers: int) -> Offer | Miss:
        """With as little in host memory as will do."""
        found: Offer | Miss | None = None
        for variant in self._variants[not samplers, axes.world == 1]:
            found = self._try(axes, samplers, variant)
            if isinstance(found, Offer):
                return found
        assert found is not None
        return found

    def _try(self, axes: Axes, samplers: int, variant: Variant) -> Offer | Miss:
        made, usable, host = self.plan, self.plan.rates.usable, self.plan.rates.host_memory
        load = self._load(axes, samplers, variant)

        def miss(lacking: float, why: str) -> Miss:
            return Miss(axes=axes, variant=variant, lacking=lacking, why=why)

        if load.together.learner > usable:
            parts = load.together.lasting | load.together.update
            largest = max(parts, key=lambda part: parts[part])
            why = f"the update, most of it {largest} ({readable(parts[largest])})"
            return miss(load.together.learner - usable, why)
        waiting = sum(load.together.host.values()) + load.asleep - host
        if host and waiting > 0:
            return miss(waiting, f"the host's memory, {readable(int(host))} a device")
        alone = made.count == 1 and made.run.engine.kind == "embedded" and not load.asleep
        whole = alone and not samplers and "weights" in load.own.memory.lasting
        engine = self._engine(samplers, usable - load.stays, whole)
        if isinstance(engine, float):
            return miss(engine, "sampling one answer at a time")
        return self._offer(axes, samplers, variant, load, engine)

    def _load(self, axes: Axes, samplers: int, variant: Variant) -> Load:
        made, at = self.plan, partial(self._policy_at, variant.run)
        own = Place(axes=axes, layers=made.shape.layers, at=at)
        others = self._others(variant, axes.world)
        together = own.memory
        for name, place in others.items():
            together = together.beside(name, place.memory)
        more = {} if samplers else self._for_engines(variant.run, axes)
        together = replace(together, lasting=together.lasting | more)
        lasting = own.lasting + sum(place.lasting for place in others.values()) + sum(more.values())
        asleep = lasting if variant.run.learner.sleep and not samplers else 0
        # Where the device is the host, what sleeps lies in another place of the same memory.
        gone = samplers or (asleep and made.rates.host_memory)
        return Load(own=own, together=together, asleep=asleep, stays=0 if gone else lasting)

    def _for_engines(self, run: Run, axes: Axes) -> dict[str, int]:
        """Bytes that are there because an engine is on the same device."""
        parts = {
            "copy for engines": footprint.copy_for_engines(run, self.plan.shape, axes),
            "kept from sampling": self._spared(run).bytes,
        }
        return {name: size for name, size in parts.items() if size}

    def _spared(self, run: Run) -> Spared:
        """Of an engine in the learner's process, which a single device has."""
        made = self.plan
        return spared(run, made.shape, made.lengths.longest_prompt) if made.count == 1 else Spared()

    def _offer(self, axes: Axes, samplers: int, variant: Variant, load: Load, engine: Engine) -> Offer:
        run, learner = variant.run, variant.run.learner
        trainer = self._trainer(run, self.plan.shape, axes, learner.layout, learner.optimizer)
        share = 0.0 if engine.copied else self._spared(run).share
        actor = replace(load.own, passes=policy_passes(trainer, share))
        places = {"actor": actor, **self._others(variant, axes.world)}
        moving = {"transfer": self._transfer(run, trainer).seconds if engine.copied else 0.0}
        if load.asleep:
            moving["sleep and wake"] = 2 * load.asleep / self.plan.rates.host
        learning = sum(one.seconds for place in places.values() for one in place.passes.values())
        ahead = samplers and run.sampling.max_lag
        both = max(engine.seconds, learning) if ahead else engine.seconds + learning
        return Offer(
            axes=axes,
            variant=variant,
            samplers=samplers,
            places=places,
            load=load,
            engine=engine,
            moving=moving,
            step_s=both + sum(moving.values()),
        )

    def _others(self, variant: Variant, learners: int) -> dict[str, Place]:
        """By role."""
        if (variant, learners) not in self._places:
            found = {}
            for role in variant.roles:
                axes, run = role.axes(learners), variant.run
                trainer = self._trainer(run, role.shape, axes, role.layout, role.optimizer)
                passes = role.passes(trainer)
                at = partial(self._role_at, role, run)
                found[role.name] = Place(axes=axes, layers=role.shape.layers, at=at, passes=passes)
            self._places[variant, learners] = found
        return self._places[variant, learners]

    def _policy_at(self, run: Run, stages: Stages) -> Memory:
        layout, optimizer = run.learner.layout, run.learner.optimizer
        longest = self.plan.lengths.longest_prompt
        return self._here(learning_at(run, self.plan.shape, layout, optimizer, longest, stages))

    def _role_at(self, role: Role, run: Run, stages: Stages) -> Memory:
        return self._here(role.memory(run, self.plan.lengths.longest_prompt, stages))

    def _here(self, memory: Memory) -> Memory:
        """Where the device is the host, what waits in host memory is there as well."""
        if self.plan.rates.host_memory or not memory.host:
            return memory
        return replace(memory, lasting=memory.lasting | memory.host, host={})

    def _transfer(self, run: Run, trainer: Trainer) -> Transfer:
        made = self.plan
        return Transfer(
            run=run,
            shape=made.shape,
            axes=trainer.axes,
            rates=made.rates,
            links=self._all,
            gathering=trainer.gathering(),
        )

    def _trainer(
        self, run: Run, shape: Shape, axes: Axes, layout: Layout, optimizer: Optimizer | None
    ) -> Trainer:
        return Trainer(
            run=run,
            shape=shape,
            lengths=self.plan.lengths,
            axes=axes,
            rates=self.plan.rates,
            links=self._all,
            layout=layout,
            optimizer=optimizer,
        )

    def _engine(self, samplers: int, free: float, whole: bool) -> Engine | float:
        """The fastest engine, or the bytes that are missing."""
        key = (samplers, int(free), whole)
        if key not in self._engines:
            made = self.plan
            found = list(
                engines(
                    made.run,
                    made.shape,
                    made.lengths,
                    made.rates,
                    self._all,
                    self.rules,
                    free,
                    whole=whole,
                    samplers=samplers,
                )
            )
            fitting = [e for e in found if isinstance(e, Engine)]
            lacking = [e for e in found if not isinstance(e, Engine)]
            self._engines[key] = min(fitting, key=lambda e: e.seconds) if fitting else min(lacking)
        return self._engines[key]


def policy_passes(trainer: Trainer, spared: float) -> dict[str, Pass]:
    """Those of a step, by phase; `spared` as in `Trainer.update`."""
    run, found = trainer.run, {}
    if run.old_logp == "recompute":
        found["old log-probs"] = trainer.reading()
    if run.needs_reference and not holds_reference(run):
        # The policy without its adapter.
        found["reference"] = trainer.reading()
    return found | {"update": trainer.update(spared)}
