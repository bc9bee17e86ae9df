"""A Hugging Face folder from a checkpoint, whether the run goes on or not."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tandem.checkpoint.export import export
from tandem.checkpoint.manifest import list_problems, verify
from tandem.checkpoint.store import newest
from tandem.config.layers import flatten
from tandem.config.yaml_text import parse
from tandem.errors import ConfigError, RunError

LOADED = ("model.path", "reference.path", "critic.path", "reward.model.path")
"""Keys of folders that a run needs when it goes on."""


def extract(source: Path, target: Path) -> Path:
    """Write the policy of a checkpoint, or of a run's newest one, into `target`; of a run with an adapter its PEFT
    folder. No process but this one is needed, whatever the layout was. Returns the real path."""
    from tandem.checkpoint.sharded import export_sharded

    checkpoint = checkpoint_of(source)
    pieces, whole = checkpoint / "sharded", checkpoint / "model"
    with while_there(checkpoint):
        _spare_models(checkpoint, target.resolve())
        if pieces.is_dir():
            return export_sharded(pieces, target)
        if not whole.is_dir():
            raise RunError(f"{checkpoint} holds no model; it was not made by a run of Tandem's")
        return export(lambda place: shutil.copytree(whole, place, dirs_exist_ok=True), target)


@contextmanager
def while_there(checkpoint: Path) -> Iterator[None]:
    """What cannot be read inside, because the run has retired the checkpoint meanwhile, is told as that."""
    try:
        yield
    except _failures() as cause:
        if checkpoint.is_dir():
            raise
        raise RunError(
            f"{checkpoint} was retired by its run while it was read; the same command takes a newer one. A larger "
            "checkpoint.keep leaves more time"
        ) from cause


def _failures() -> tuple[type[BaseException], ...]:
    """What reading raises where files are gone."""
    # Imported here: it brings torch.distributed along, which finding a checkpoint does without.
    from torch.distributed.checkpoint import CheckpointException

    return ConfigError, RunError, OSError, SafetensorError, CheckpointException


def _spare_models(checkpoint: Path, target: Path) -> None:
    """Refuse the place of a model that the run loads: an export of another run may be what this one began with."""
    try:
        text = (checkpoint / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    given = flatten(parse(text, str(checkpoint / "config.yaml")).data)
    for key in LOADED:
        path = given.get(key)
        if isinstance(path, str) and Path(path).expanduser().resolve() == target:
            raise ConfigError(f"{target} is {key} of this run; export to a path that is not there yet")


def checkpoint_of(source: Path) -> Path:
    """The checkpoint that a path means, valid; ConfigError where there is none, RunError for a broken one."""
    if (source / "manifest.json").is_file():
        if problems := verify(source):
            raise RunError(f"checkpoint {source} is broken: {list_problems(problems)}. Take another one")
        return source
    if not source.is_dir():
        raise ConfigError(
            f"{source} does not exist or is not a folder; give that of a run, or a checkpoint of one"
        )
    found = newest(source / "checkpoints")
    if found is None:
        raise ConfigError(
            f"{source} has no checkpoint; give the folder of a run that has, or a checkpoint of one"
        )
    return found
