"""Where a model lies: a Hugging Face folder, a run folder, or a checkpoint of one."""

from dataclasses import dataclass
from pathlib import Path

from tandem.checkpoint import newest
from tandem.checkpoint.extract import checkpoint_of, while_there
from tandem.checkpoint.manifest import step_of
from tandem.config import Run, load
from tandem.errors import ConfigError
from tandem.journal import exported_step
from tandem.model.place import means_folder, near


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A model that is there. One of `folder` and `checkpoint` is set."""

    given: str
    """What the user named."""
    folder: str | None = None
    """Hugging Face folder, or a name to look up on the hub."""
    checkpoint: Path | None = None
    """Checkpoint whose model is loaded as a resumed run would."""
    run: Run | None = None
    """The run it comes from; always set with a checkpoint."""


def locate(given: str) -> Place:
    """The model that a path means: of a run folder its exported model, or else its newest valid checkpoint."""
    path = Path(given).expanduser()
    if not path.is_dir():
        if not means_folder(given):
            return Place(given=given, folder=given)
        what, others = ("is a file", "") if path.exists() else ("there is no such folder", near(path))
        raise ConfigError(f"{given}: {what}; give the folder of a Hugging Face model or of a run{others}")
    if (path / "config.json").is_file():
        return Place(given=given, folder=str(path))
    if (path / "manifest.json").is_file():
        return of_checkpoint(given, checkpoint_of(path))
    if (path / "model" / "config.json").is_file() and not outdated(path):
        config = path / "config.yaml"
        return Place(given=given, folder=str(path / "model"), run=load(config) if config.is_file() else None)
    checkpoint = newest(path / "checkpoints")
    if checkpoint is not None:
        return of_checkpoint(given, checkpoint)
    raise ConfigError(f"{given}: {nothing_in(path)}; give the folder of a Hugging Face model or of a run")


def outdated(path: Path) -> bool:
    """The run went on after it exported its model."""
    exported = exported_step(path)
    newer = [step_of(entry.name) for entry in (path / "checkpoints").glob("step_*")]
    return exported is not None and any(step is not None and step > exported for step in newer)


def of_checkpoint(given: str, checkpoint: Path) -> Place:
    with while_there(checkpoint):
        return Place(given=given, checkpoint=checkpoint, run=load(checkpoint / "config.yaml"))


def nothing_in(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "holds an adapter without its model"
    if (path / "config.yaml").is_file():
        return "this run has neither an exported model nor a checkpoint yet"
    names = sorted(entry.name for entry in path.iterdir())
    return f"has no config.json; it holds {', '.join(names[:8]) or 'nothing'}"
