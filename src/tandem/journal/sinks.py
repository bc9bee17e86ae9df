"""Where metrics are shown beside metrics.jsonl: console, TensorBoard, Weights & Biases."""

import importlib.util
import netrc
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tandem.config.run import Run
from tandem.config.secret import redact
from tandem.config.yaml_text import dump_yaml
from tandem.errors import ConfigError
from tandem.journal.metrics import METRICS


class Sink(Protocol):
    failures: tuple[type[Exception], ...]
    """What its backend raises when it is down; anything else is a bug and ends the run."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def progress(self, doing: str) -> None:
        """What a long step is at, for those who watch; most sinks do not."""

    def close(self) -> None: ...


QUIET_S = 30.0
"""A console without a terminal hears of a long step this often."""


class ConsoleSink(Sink):
    """A progress bar on a terminal; one plain line per step elsewhere."""

    failures = (OSError,)

    def __init__(self, run: Run, folder: Path, first_step: int, console: Console) -> None:
        self._steps = run.steps
        self._console = console
        self._shown: dict[str, float] = {}
        self._said_at = time.monotonic()
        self._first: tuple[int, float] | None = None
        """The first step done, and when: it took longer than those to come."""
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                TextColumn("{task.fields[doing]}", markup=False, style="dim"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(compact=True), console=console)
            self._task = self._bar.add_task("", total=run.steps, completed=first_step, figures="", doing="")
            self._bar.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._shown |= {name: metrics[name] for name in _FIGURES if name in metrics}
        figures = "  ".join(_FIGURES[name].format(value) for name, value in self._shown.items())
        if "warmup/loss" in metrics:
            figures = f"warm-up {metrics.get('warmup/update', 0):.0f}  loss {metrics['warmup/loss']:.3f}"
        self._said_at = time.monotonic()
        # The line of a step describes it; with its update done, one more step is behind.
        done = step + ("timing/all" in metrics)
        if self._first is None and done > step:
            self._first = (done, self._said_at)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures, doing="")
        else:
            self._print(f"step {done}/{self._steps}  {figures}{self._time_left(done)}")

    def progress(self, doing: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, doing=doing)
        elif time.monotonic() - self._said_at > QUIET_S:
            self._said_at = time.monotonic()
            self._print(f"  {doing}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _print(self, line: str) -> None:
        try:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        except SystemExit:
            # Rich ends the program when nobody reads its pipe any more (`| head`); a run goes on.
            raise BrokenPipeError("nobody reads the console") from None

    def _time_left(self, step: int) -> str:
        first, since = self._first or (step, 0.0)
        if step <= first or step >= self._steps:
            return ""
        left = round((time.monotonic() - since) / (step - first) * (self._steps - step))
        return f"  {left // 60}:{left % 60:02d} left"


class TensorBoardSink(Sink):
    """Event files under `tensorboard/`; a resumed run hides the events after the step it resumes from."""

    failures = (OSError,)

    def __init__(self, run: Run, folder: Path, first_step: int, console: Console) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / "tensorboard"
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step or None)
        self._warmup: SummaryWriter | None = None
        if not first_step:
            config = dump_yaml(redact(run.model_dump(mode="json")))
            self._writer.add_text("config", f"```yaml\n{config}```")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = self._writer
        if "warmup/update" in metrics:
            # Warm-up counts updates, not steps: a file of its own, or a resumed run would hide its end.
            self._warmup = writer = self._warmup or SummaryWriter(str(self._folder / "warmup"))
            step = int(metrics["warmup/update"])
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def close(self) -> None:
        self._writer.close()
        if self._warmup is not None:
            self._warmup.close()


class WandbSink(Sink):
    """A W&B run, offline without an account. Its id is kept in the folder: a resumed run goes on in it."""

    def __init__(self, run: Run, folder: Path, first_step: int, console: Console) -> None:
        import wandb

        self.failures = (OSError, wandb.Error)
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="ascii")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tandem"),
                name=os.environ.get("WANDB_NAME", folder.name),
                id=id_file.read_text(encoding="ascii").strip(),
                resume="allow",
                dir=str(folder),
                mode=_wandb_mode(),
                config=redact(run.model_dump(mode="json")),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise OSError(f"{error}; WANDB_MODE=offline records without a connection") from error
        for name in METRICS:
            axis = "warmup/update" if name.startswith("warmup/") else "step"
            self._run.define_metric(
                name.replace("<function>", "*"), step_metric=axis if name != axis else None
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


def check_sinks(run: Run) -> None:
    """Refuses, before the run, a sink whose package is missing."""
    if "wandb" not in run.journal.sinks:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # without origin it is the `wandb` folder of an earlier run
        raise ConfigError(
            "journal.sinks: wandb is not installed; `pip install tandem-rl[wandb]`, or take it from the list"
        )


def forget(folder: Path) -> None:
    """Removes what sinks keep in a run folder, so that a run that starts over does not go on in it."""
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    (folder / "wandb_id").unlink(missing_ok=True)


def _wandb_mode() -> str:
    """The user's own choice, else online with an account and offline without."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        known = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        known = None
    return "online" if known else "offline"


_FIGURES = {
    "reward/mean": "reward {:.3f}",
    "eval/accuracy": "accuracy {:.3f}",
    "eval/greedy_accuracy": "greedy {:.3f}",
    "response_length/mean": "length {:.0f}",
    "e2e_tps": "{:,.0f} tokens/s",
}

SINKS = {"console": ConsoleSink, "tensorboard": TensorBoardSink, "wandb": WandbSink}
