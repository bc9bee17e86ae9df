"""A plan as text."""

from collections.abc import Sequence

from tandem.train.footprint import readable
from tandem.train.plan.axes import Axes
from tandem.train.plan.plan import Offer, Plan

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
        learn = sum(offer.seconds.values()) - offer.seconds["rollout"] - offer.seconds["transfer"]
        rows.append(
            [
                str(place),
                str(offer.axes),
                engines(offer),
                offer.offloaded or "-",
                number(offer.seconds["rollout"]),
                number(learn),
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
    """Memory of each role on its fullest device."""
    names = ("weights", "gradients", "optimizer", "activations", "logits", "cache", "other")
    lasting, updating, host = offer.memory.lasting, offer.memory.update, offer.memory.host
    masters = lasting.get("master weights", 0)
    actor = [
        lasting.get("weights", 0),
        updating.get("gradients", 0),
        lasting.get("optimizer", 0) + masters,
        updating["activations"],
        updating["logits"],
        0,
        updating.get("gathered weights", 0),
    ]
    rows = [["role", *names, "all"], row("actor", actor)]
    if plan.reference:
        rows.append(row("reference", [lasting.get("reference", 0), 0, 0, 0, 0, 0, 0]))
    engine = offer.engine
    rows.append(row("engine", [engine.weights, 0, 0, 0, engine.logits, engine.cache, 0]))
    usable = readable(int(plan.rates.usable))
    notes = [f"memory by role, on its fullest device ({usable} usable); other: weights gathered while in use"]
    if plan.reference and offer.axes.world > 1:
        notes.append(f"the reference lies as reference.layout says: {offer.reference}")
    if not offer.samplers:
        notes.append(
            f"update and sampling take turns: at most {readable(int(offer.peak))} at once; {slots(offer)}"
        )
    else:
        notes.append(slots(offer))
    if host:
        held = ", ".join(f"{name} {readable(size)}" for name, size in host.items() if size)
        notes.append(f"in host memory, for each device: {held}")
    return "\n".join([notes[0], table(rows), *notes[1:]])


def slots(offer: Offer) -> str:
    engine = offer.engine
    own = "weights of its own" if engine.copied else "the learner's weights"
    return f"an engine decodes {engine.slots} answers at a time with {own}"


def row(name: str, sizes: Sequence[float]) -> list[str]:
    return [name, *(readable(int(size)) if size else "-" for size in [*sizes, sum(sizes)])]


def phases(offer: Offer) -> str:
    rows = [["phase", "seconds", "of it"]]
    update = offer.update
    said = {
        "rollout": f"communication {number(offer.engine.communication)}; a step is bound by {offer.engine.reads}",
        "update": (
            f"products {number(update.products)}, communication that shows {number(update.exposed)}, "
            f"pipeline bubble {number(update.bubble)}, optimizer {number(update.optimizer)}"
        ),
        "transfer": "weights to the engines" if offer.engine.copied else "none: one set of weights",
    }
    for name, seconds in offer.seconds.items():
        rows.append([name, number(seconds), said.get(name, "")])
    ahead = offer.step_s < sum(offer.seconds.values())
    said_of_all = "the longer of rollout and learning, and the transfer" if ahead else ""
    return table([*rows, ["step", number(offer.step_s), said_of_all]])


def keys(plan: Plan, offer: Offer) -> str:
    """The recipe's keys for a layout."""
    sizes = axes_keys(offer.axes)
    chosen = [f"learner.layout.{name}={size}" for name, size in sizes.items()]
    if plan.count > 1:
        learners = plan.count - offer.samplers
        kind = "apart" if offer.samplers else "colocated"
        chosen = [f"placement.kind={kind}", f"placement.learners={learners}", *chosen]
        chosen.append(f"placement.engines={offer.engine.count}")
    if offer.engine.tensor > 1:
        chosen += ["engine.kind=vllm", f"engine.tensor_parallel={offer.engine.tensor}"]
    if plan.run.engine.kind == "vllm" and not offer.samplers:
        chosen.append("engine.sleep=true")
    if "optimizer" in offer.offloaded:
        chosen.append("learner.optimizer.offload=true")
    if "parameters" in offer.offloaded:
        chosen.append("learner.layout.offload_parameters=true")
        chosen += ["reference.layout.offload_parameters=true"] * plan.reference
    return f"keys of the first: {' '.join(chosen) or 'none, the recipe as it is'}"


def axes_keys(axes: Axes) -> dict[str, int]:
    """Axes above 1, and `shard` wherever there is any."""
    return ({"shard": axes.shard} if axes.world > 1 else {}) | axes.sizes()


def left_out(plan: Plan) -> str:
    lines = []
    if plan.missed:
        lines.append(f"{plan.missed:,} layouts do not fit; the nearest to it:")
        for miss in plan.misses:
            away = f" with {miss.offloaded} in host memory" if miss.offloaded else ""
            lines.append(f"  {miss.axes}{away}: lacks {readable(int(miss.lacking))} for {miss.why}")
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
