"""What a run says at its end: answers before and after, summary.json, where things lie and what to do next.

Model text is hostile input to a terminal: it is shown without markup, its control characters escaped.
"""

import json
import os
import platform
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tandem import __version__
from tandem.config.run import Run
from tandem.config.secret import redact

if TYPE_CHECKING:
    from tandem.types import Group, Rollout

_LONGEST = 600
"""Characters shown of one text."""


def exported_step(folder: Path) -> int | None:
    """Steps behind the exported model of a run's folder; None where that is not known. The summary is written last."""
    try:
        steps = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def visible(text: str) -> str:
    """The text with control, format and surrogate characters written as escapes; newlines stay."""
    shown = "".join(_visible(character) for character in text[:_LONGEST])
    return shown + (f" [{len(text) - _LONGEST} more]" if len(text) > _LONGEST else "")


def _visible(character: str) -> str:
    if character == "\n" or unicodedata.category(character)[0] != "C":
        return character
    return character.encode("unicode_escape").decode("ascii")


def sample_answers(answered: Sequence["Group"], before: Sequence["Group"] = (), *, count: int) -> Table:
    """A table of the first questions, each with its first answer and, if given, the one before training."""
    earlier = {group.prompt.id: group for group in before}
    table = Table(show_lines=True, title="Sample answers", title_justify="left", header_style="bold")
    for heading in ("question", "truth", *(("before", "after") if before else ("answer",))):
        table.add_column(heading, overflow="fold")
    for group in answered[:count]:
        cells = [Text(visible(group.prompt.question)), Text(visible(group.prompt.truth or ""))]
        if before:
            match = earlier.get(group.prompt.id)
            cells.append(_answer(match.rollouts[0]) if match else Text(""))
        cells.append(_answer(group.rollouts[0]))
        table.add_row(*cells)
    return table


def _answer(rollout: "Rollout") -> Text:
    text = Text(visible(rollout.text))
    score = rollout.score
    if score is not None:
        outcome = f"reward {score.reward:g}" if score.reward is not None else f"no reward ({score.failure})"
        style = "green" if score.reward is not None and score.reward > 0 else "red"
        text.append(f"\n{visible(outcome)}", style=style)
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The outcome of a run in a few figures."""

    recipe: str
    """File the run was loaded from."""
    steps: int
    """Steps done."""
    began: int = 0
    """Steps that were done before, where the run went on."""
    seconds: float
    """Wall time from loading to the end, warm-up and evaluation included, of what was done since."""
    warmup_seconds: float = 0.0
    """The part of it that the warm-up took."""
    start: Mapping[str, float]
    """`eval/*` metrics before the first step."""
    end: Mapping[str, float]
    """`eval/*` metrics after the last step."""

    def write(self, path: Path, run: Run, device: str) -> None:
        """summary.json, with the versions and the hardware that the figures come from."""
        record = {
            "recipe": self.recipe,
            "steps": self.steps,
            "began": self.began,
            "seconds": round(self.seconds, 3),
            "warmup_seconds": round(self.warmup_seconds, 3),
            "start": dict(self.start),
            "end": dict(self.end),
            "seed": run.seed,
            "versions": _versions(),
            "hardware": _hardware(device),
        }
        partial = path.with_suffix(".json.tmp")
        partial.write_text(json.dumps(redact(record), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)

    def closing(self, run: Run, folder: Path) -> str:
        """The last words on the console: what came of it, where it lies, what to try next."""
        warmup = f", {_clock(self.warmup_seconds)} of it warm-up" if self.warmup_seconds else ""
        before = f" after the first {self.began}" if self.began else ""
        done = self.steps - self.began
        lines = [f"{done} step{'s' * (done != 1)}{before} in {_clock(self.seconds)}{warmup}."]
        lines += [
            f"  {label}: {self.start[name]:.3f} -> {self.end[name]:.3f}"
            for name, label in _FIGURES.items()
            if name in self.start and name in self.end
        ]
        lines += ["", f"Everything is in {folder}:"]
        lines += [f"  {name:<16} {what}" for name, what in _FILES.items() if (folder / name).exists()]
        quoted = shlex.quote(str(folder))
        lines += ["", "Next:", f"  tandem chat {quoted}", f"  tandem eval {quoted}"]
        return "\n".join([*lines, *_advice(run, self)])


def _advice(run: Run, summary: Summary) -> list[str]:
    recipe = summary.recipe
    if summary.end.get("eval/truncated_share", 0) > 0.2:
        more = 2 * run.sampling.max_answer_tokens
        return [
            f"  tandem train {recipe} --fresh sampling.max_answer_tokens={more}   # many answers were cut"
        ]
    accuracy = summary.end.get("eval/accuracy")
    if accuracy is not None and accuracy < 0.9:
        return [f"  tandem train {recipe} steps={max(2 * run.steps, 1)}   # accuracy has room to rise"]
    return [f"  tandem train {recipe} --fresh algorithm.preset=dr_grpo   # compare another algorithm"]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _versions() -> dict[str, str]:
    found = {"tandem": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _hardware(device: str) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cores": cores, "system": platform.platform(), "device": device}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


_FIGURES = {
    "eval/accuracy": "accuracy, sampled",
    "eval/greedy_accuracy": "accuracy, greedy",
    "eval/reward": "reward",
    "eval/response_length": "answer tokens",
}

_FILES = {
    "model": "the trained model, a Hugging Face folder",
    "checkpoints": "to resume from",
    "curve.png": "reward and accuracy by step",
    "metrics.jsonl": "every metric of every step; docs/metrics.md says what each means",
    "rollouts": "every answer with its score",
    "config.yaml": "the configuration, every key spelled out",
    "summary.json": "these figures, versions and hardware",
}
