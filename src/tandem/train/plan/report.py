"""A plan as text."""

from collections.abc import Sequence

from tandem.config.schema import as_yaml
from tandem.train.memory import Memory, readable
from tandem.train.plan.keys import changes
from tandem.train.plan.plan import Offer, Plan
from tandem.train.plan.ranks import ranks_of
from tandem.train.plan.training import Pass

REASONS = 3
"""Kinds of layouts that the model does not allow of which is told."""


def text(plan: Plan) -> str:
    """Assumptions, the layouts ranked, the first one by role and phase, and what does not fit."""
    parts = [assumptions(plan)]
    if plan.offers:
        parts += [
            ranking(plan),
            roles(plan, plan.offers[0]),
            phases(plan.offers[0]),
            keys(plan, plan.offers[0]),
        ]
    else:
        parts.append(f"no layout fits into {readable(int(plan.rates.usable))} a device")
    return "\n\n".join([*parts, left_out(plan)])


def assumptions(plan: Plan) -> str:
    run, shape, lengths = plan.run, plan.shape, plan.lengths
    experts = f", {shape.experts} experts of which {shape.active} are used" if shape.experts else ""
    trained = "" if shape.trainable == shape.parameters else f", {shape.trainable:,} of them trained"
    return (
        f"{shape.parameters:,} parameters{trained}{experts}, {run.model.dtype}; "
        f"{plan.count:,} device{'s' * (plan.count > 1)} in nodes of {plan.per_node}\n{run.arithmetic()}\n"
        f"prompts of {lengths.prompt:g} tokens (at most {lengths.longest_prompt}), answers of {lengths.answer:g} (at "
        f"most {lengths.longest_answer})\n"
        f"these are estimates, without the time of rewards, evaluation and checkpoints; rates: {plan.rates.origin}"
    )


def ranking(plan: Plan) -> str:
    rows = [["", "layout", "engines", "in host memory", "rollout", "learn", "step, s", "memory", "tokens/s"]]
    s = plan.run.sampling
    tokens = plan.run.rollouts_per_step * plan.lengths.answer + s.prompts_per_step * plan.lengths.prompt
    for place, offer in enumerate(plan.offers, 1):
        rows.append(
            [
                str(place),
                str(offer.axes),
                engines(offer),
                offer.variant.away or "-",
                number(offer.seconds["rollout"]),
                number(offer.learning_s),
                number(offer.step_s),
                readable(int(offer.peak)),
                f"{tokens / offer.step_s:,.0f}",
            ]
        )
    said = f"{plan.fitting:,} of {plan.tried:,} layouts fit; the fastest:"
    return f"{said}\n{table(rows)}"


def engines(offer: Offer) -> str:
    engine, on = offer.engine, f" on {offer.samplers} devices" if offer.samplers else ""
    width = f" x tensor={engine.tensor}" if engine.tensor > 1 else ""
    return f"{engine.count}{width}{on}"


def roles(plan: Plan, offer: Offer) -> str:
    """Memory of each role on a device, and in a pipeline of each of its processes."""
    names = ("weights", "gradients", "optimizer", "activations", "logits", "cache", "other")
    every, engine = list(ranks_of(offer)), offer.engine
    staged = any(ranks.holds for ranks in every)
    rows = [["role", *["learners", "layers"] * staged, *names, "all"]]
    for ranks in every:
        where = [ranks.learners, ranks.holds or "a part of all"] if staged else []
        rows.append([ranks.role, *where, *sizes(taken(ranks.memory))])
    sampling = [engine.weights, 0, 0, 0, engine.logits, engine.cache, 0]
    rows.append(["engine", *["", ""] * staged, *sizes(sampling)])
    usable = readable(int(plan.rates.usable))
    notes = [f"memory by role, on each device ({usable} usable); other: weights gathered while in use"]
    for name, place in offer.places.items() if offer.axes.world > 1 else ():
        if name != "actor":
            notes.append(f"the {name} lies as {name}.layout says: {place.axes}")
    if offer.samplers:
        notes.append(slots(offer))
    else:
        notes.append(
            f"updates and sampling take turns: at most {readable(int(offer.peak))} at once; {slots(offer)}"
        )
    if copy := offer.load.together.lasting.get("copy for engines"):
        notes.append(
            f"on each learner, for the handles of engine.transfer=ipc, all weights once more: {readable(copy)}"
        )
    if offer.load.together.host:
        held = ", ".join(
            f"{name} {readable(size)}" for name, size in offer.load.together.host.items() if size
        )
        notes.append(f"in host memory, for each device: {held}")
    if offer.load.asleep:
        notes.append(f"in host memory while engines sample, for each device: {readable(offer.load.asleep)}")
    return "\n".join([notes[0], table(rows), *notes[1:]])


def taken(memory: Memory) -> list[float]:
    """By the columns of the table."""
    lasting, updating = memory.lasting, memory.update
    return [
        lasting.get("weights", 0),
        updating.get("gradients", 0),
        lasting.get("optimizer", 0) + lasting.get("master weights", 0),
        updating.get("activations", 0),
        updating.get("logits", 0),
        0,
        updating.get("gathered weights", 0),
    ]


def slots(offer: Offer) -> str:
    engine = offer.engine
    own = "weights of its own" if engine.copied else "the learner's weights"
    return f"an engine decodes {engine.slots} answers at a time with {own}"


def sizes(parts: Sequence[float]) -> list[str]:
    """And their sum."""
    return [readable(int(size)) if size else "-" for size in [*parts, sum(parts)]]


def phases(offer: Offer) -> str:
    rows = [["phase", "seconds", "of it"]]
    engine = offer.engine
    said = {
        "rollout": f"communication {number(engine.communication)}; a step is bound by {engine.reads}",
        "transfer": "weights to the engines" if engine.copied else "none: one set of weights",
        "sleep and wake": "the learner's memory to the host and back",
    }
    said |= {name: parts(one) for name, one in offer.passes.items()}
    rows += [[name, number(seconds), said[name]] for name, seconds in offer.seconds.items()]
    ahead = offer.step_s < sum(offer.seconds.values())
    said_of_all = "the longer of rollout and learning, and the transfer" if ahead else ""
    return table([*rows, ["step", number(offer.step_s), said_of_all]])


def parts(one: Pass) -> str:
    optimizer = f", optimizer {number(one.optimizer)}" if one.optimizer else ""
    return (
        f"products {number(one.products)}, communication that shows {number(one.exposed)}, pipeline bubble "
        f"{number(one.bubble)}{optimizer}"
    )


def keys(plan: Plan, offer: Offer) -> str:
    """What to change in the recipe for a layout."""
    wanted = changes(plan.run, offer, plan.rates.usable).items()
    chosen = [f"{key}={value if isinstance(value, str) else as_yaml(value)}" for key, value in wanted]
    return f"keys of the first: {' '.join(chosen) or 'none, the recipe as it is'}"


def left_out(plan: Plan) -> str:
    lines = []
    if plan.missed:
        lines.append(f"{plan.missed:,} layouts do not fit; the nearest to it:")
        for miss in plan.misses:
            held = f" with {miss.variant.away} in host memory" if miss.variant.away else ""
            lines.append(f"  {miss.axes}{held}: lacks {readable(int(miss.lacking))} for {miss.why}")
    if plan.refused:
        count = plan.refused.total()
        lines.append(f"{count:,} combinations of axes cannot be; most often:")
        lines += [f"  {times:,} x {why}" for why, times in plan.refused.most_common(REASONS)]
    return "\n".join(lines) or "every layout fits"


def number(seconds: float) -> str:
    if seconds < 1e-3:
        return "0"
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first left, figures right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for cells in rows:
        padded = [
            cell.ljust(width) if any(c.isalpha() for c in cell) or not cell else cell.rjust(width)
            for cell, width in zip(cells, widths)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
