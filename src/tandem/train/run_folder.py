"""The folder of a run: what may lie in it when one begins, and how an earlier run gets out of its way."""

import itertools
from pathlib import Path

from rich.console import Console

from tandem.checkpoint import newest, read_manifest
from tandem.checkpoint.export import not_exported
from tandem.checkpoint.lock import holder_of, in_use
from tandem.checkpoint.manifest import step_of
from tandem.checkpoint.swap import leftover_of
from tandem.config import difference, load
from tandem.config.run import Run
from tandem.errors import ConfigError
from tandem.train.finding import Line

EXPORTED = "model"
"""Where the trained model is."""
CHECKPOINTS = "checkpoints"
WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "curve.png",
    "rollouts",
    CHECKPOINTS,
    EXPORTED,
    "tensorboard",
    "wandb_id",
    "profile",
    "start",
    "engine",
    "weights",
)
"""What a run writes over, or removes, when it begins or ends."""
SHARED = ("wandb", "logs")
"""What a run adds to; others may, too."""


def check_folder(run: Run, fresh: bool = False) -> None:
    """ConfigError where the run would move, overwrite or remove what no run has written; with `fresh` an earlier run
    is set aside. Nothing is changed."""
    folder = Path(run.run_dir)
    for key, path in inputs(run).items():
        if Path(path).expanduser().resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{key}={path} lies in run_dir={run.run_dir}; set run_dir to a folder of the run's own"
            )
    if not folder.is_dir():
        return
    if not is_run(folder):
        others = [name for name in WRITTEN if holds(folder / name)]
        if others:
            raise ConfigError(
                f"run_dir={run.run_dir} holds {', '.join(others)}, which a run would write over, and it is no run of "
                "Tandem's (config.yaml with metrics.jsonl or summary.json); set run_dir to a folder of the run's own"
            )
    elif has_steps(folder) and not fresh and (said := not_exported(folder / EXPORTED)):
        raise ConfigError(
            f"{folder / EXPORTED} {said}, and the run will export its model there: move it away, or begin anew with "
            "--fresh"
        )


def inputs(run: Run) -> dict[str, str]:
    """Paths of files and folders that the run reads, by their keys."""
    judge = run.reward.model
    given = {
        "model.path": run.model.path,
        "reference.path": run.reference.path,
        "critic.path": run.critic.path,
        "reward.model.path": None if judge is None else judge.path,
        "data.train": run.data.train,
        "data.eval": run.data.eval,
    }
    return {key: path for key, path in given.items() if path is not None and Path(path).expanduser().exists()}


def is_run(folder: Path) -> bool:
    """Known by what only a run leaves."""
    recorded = (folder / "metrics.jsonl").is_file() or (folder / "summary.json").is_file()
    return has_steps(folder) or (recorded and (folder / "config.yaml").is_file())


def has_steps(folder: Path) -> bool:
    return any(step_of(path.name) is not None for path in (folder / CHECKPOINTS).glob("step_*"))


def holds(path: Path) -> bool:
    """A file, or a folder with something in it."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def set_aside(folder: Path, console: Console) -> None:
    """Move what an earlier run has written out of the way, and leave its lock and whatever else lies there."""
    place = folder.resolve()
    old = [path for path in place.iterdir() if (leftover_of(path.name) or path.name) in (*WRITTEN, *SHARED)]
    if not old:
        return
    target = next(t for i in itertools.count(1) if not (t := place.with_name(f"{place.name}.{i}")).exists())
    target.mkdir()
    for path in old:
        path.rename(target / path.name)
    console.print(f"the earlier run in {folder} is now in {target}", highlight=False, markup=False)


def steps_done(run: Run, checkpoint: Path) -> int:
    """Of a checkpoint; ConfigError where the run has fewer."""
    step = read_manifest(checkpoint).step
    if step > run.steps:
        raise ConfigError(
            f"{checkpoint} has {step} steps done, more than steps={run.steps}; set steps={step} to end there, or begin "
            "anew with --fresh"
        )
    return step


def look_at_folder(run: Run) -> list[Line]:
    """Does the run begin, go on, or clash with what its folder holds?"""
    folder = Path(run.run_dir)
    if (holder := holder_of(folder)) is not None:
        return [("problem", in_use(folder, holder))]
    check_folder(run)
    checkpoint = newest(folder / CHECKPOINTS)
    if checkpoint is None:
        first = (
            "the finished run there is set aside" if (folder / EXPORTED).is_dir() else "no checkpoint there"
        )
        return [("ok", f"{folder}: {first}, the run begins at step 0")]
    changed = difference(load(checkpoint / "config.yaml"), run)
    if changed:
        return [
            (
                "problem",
                f"{checkpoint} was made with another configuration ({'; '.join(changed)}): restore these, "
                "or train with --fresh or --allow-config-change",
            )
        ]
    return [("ok", f"{folder}: goes on from step {steps_done(run, checkpoint)} of {run.steps}")]
