"""The picture of a run: reward of every step, accuracy of every evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import RunError
from tandem.journal.journal import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_REWARD, _SAMPLED, _GREEDY, _INK, _GRID = "#2f6f9f", "#b3541e", "#4c8c4a", "#333333", "#e3e3e3"
Points = Sequence[tuple[int, float]]

_SMOOTHED_FROM = 20
"""Fewer steps than this are drawn as they are."""


def draw(metrics: Path, png: Path) -> Path:
    """Draws reward/mean, and eval/accuracy where there is any, against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    rewards = _points(rows, "reward/mean")
    sampled, greedy = _points(rows, "eval/accuracy"), _points(rows, "eval/greedy_accuracy")
    if not rewards and not sampled and not greedy:
        raise RunError(f"{metrics}: no reward and no accuracy to draw yet")
    panels = [panel for panel, points in (("reward", rewards), ("accuracy", sampled or greedy)) if points]
    width, height = 4.6 * len(panels), 3.0
    figure = Figure(figsize=(width, height), dpi=160)
    # Margins of known labels, in inches: to have them found takes as long as to draw.
    figure.subplots_adjust(0.55 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.35 / height, wspace=0.2)
    FigureCanvasAgg(figure)
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    if "reward" in axes:
        _draw_reward(axes["reward"], rewards)
    if "accuracy" in axes:
        _draw_accuracy(axes["accuracy"], sampled, greedy)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)
    return png


def _points(rows: Sequence[dict[str, Any]], name: str) -> Points:
    """The last value of each step."""
    return sorted({row["step"]: row[name] for row in rows if row.get(name) is not None}.items())


def _draw_reward(axes: "Axes", points: Points) -> None:
    steps, values = zip(*points, strict=True)
    smooth = len(points) >= _SMOOTHED_FROM
    axes.plot(steps, values, color=_REWARD, linewidth=1.0 if smooth else 1.8, alpha=0.35 if smooth else 1.0)
    if smooth:
        width = max(len(values) // 20, 3)
        windows = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
        means = [sum(window) / len(window) for window in windows]
        axes.plot(steps, means, color=_REWARD, linewidth=2.0, label=f"mean of {width} steps")
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    _finish(axes, "Mean reward of a step")


def _draw_accuracy(axes: "Axes", sampled: Points, greedy: Points) -> None:
    for points, color, label in ((sampled, _SAMPLED, "sampled"), (greedy, _GREEDY, "greedy")):
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=color, linewidth=2.0, marker="o", markersize=4, label=label)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    _finish(axes, "Accuracy on held-out questions")


def _finish(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    axes.set_xlabel("step", fontsize=9, color=_INK)
    axes.tick_params(labelsize=9, colors=_INK, length=0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for side in axes.spines.values():
        side.set_visible(False)
