"""Sources of rows: a file, a folder of files, a data set of the hub, or a task made by the project itself."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.data.reader import READERS, Record, Row, read_file
from tandem.errors import DataError

HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.:%+\[\]-]+))?"
)
HUB_SECONDS = 5.0
BOOKKEEPING = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `Dataset.save_to_disk` writes beside the data."""
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}


def read_rows(source: str) -> Iterator[Record]:
    """The rows of `data.train` or `data.eval`, in order, lazily."""
    if source.startswith("tandem:"):
        return task_rows(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return folder_rows(path)
    if path.is_file():
        return read_file(path)
    if means_a_file(source):
        raise DataError(missing(source, path))
    return hub_rows(source, path)


def task_rows(source: str) -> Iterator[Record]:
    from tandem.data import tasks

    for number, values in enumerate(tasks.rows(source.removeprefix("tandem:")), 1):
        yield Row(place=f"{source}, row {number}", values=values)


def folder_rows(folder: Path) -> Iterator[Record]:
    for path in folder_files(folder):
        yield from read_file(path)


def folder_files(folder: Path) -> list[Path]:
    """The folder's files of its most frequent format, by name."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix.lower() in READERS
        and path.name not in BOOKKEEPING
        and not path.name.startswith(".")
    ]
    counts = Counter(path.suffix.lower() for path in files).most_common()
    if not counts:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise DataError(f"{folder}: no data files ({', '.join(READERS)}) in this folder; it holds {inside}")
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        tied = " and ".join(f"{count} {suffix}" for suffix, count in counts if count == counts[0][1])
        raise DataError(f"{folder}: {tied} files; name the file, or keep one format in the folder")
    chosen = [path for path in files if path.suffix.lower() == counts[0][0]]
    refuse_mixed_splits(folder, chosen)
    return chosen


def refuse_mixed_splits(folder: Path, files: list[Path]) -> None:
    """Training on a folder that holds the test split as well would void every evaluation."""
    found = {}
    for path in files:
        for word in re.split(r"[^a-z]+", path.stem.lower()):
            if word in SPLITS:
                found.setdefault(SPLITS[word], path.name)
    if len(files) > 1 and len(found) > 1:
        raise DataError(
            f"{folder}: holds different splits ({', '.join(found.values())}); name the file that is meant"
        )


def means_a_file(source: str) -> bool:
    path = Path(source)
    is_format = path.suffix.lower() in READERS
    return is_format or source.startswith(("/", "./", "../", "~")) or HUB_NAME.fullmatch(source) is None


def missing(source: str, path: Path) -> str:
    """What is said of a file that is not there: the whole path, and what its folder has instead."""
    absolute = path.absolute()
    folder = absolute.parent
    if not folder.is_dir():
        there = next(parent for parent in folder.parents if parent.is_dir())
        return (
            f"{source}: no such file or folder ({absolute}); there is no {folder}, the path ends at {there}"
        )
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"{folder} holds {', '.join(names[:10]) or 'nothing'}"
    )
    return f"{source}: no such file or folder ({absolute}); {hint}"


def hub_rows(source: str, path: Path) -> Iterator[Record]:
    """`[owner/]name[/config][:split]` through `datasets`, which runs no code that a set brings."""
    match = HUB_NAME.fullmatch(source)
    if match is None:
        raise DataError(missing(source, path))
    name, split = match["name"], match["split"] or "train"
    ask_hub(source, name, path)
    for number, values in enumerate(hub_table(source, name, match["config"], split), 1):
        yield Row(place=f"{source}, row {number}", values=values)


def ask_hub(source: str, name: str, path: Path) -> None:
    """Fail within seconds where the hub cannot be reached: `load_dataset` alone keeps trying for a while."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except OfflineModeIsEnabled:
        return  # load_dataset then looks in its cache only
    except (HTTPError, OSError, ValueError) as cause:
        raise DataError(
            f"{missing(source, path)}. Nor does the Hugging Face hub give a data set {name!r}: "
            f"{first_line(cause)}. Correct the path or the name; for a data set that was downloaded before, "
            "set HF_HUB_OFFLINE=1 to use the cache without a network"
        ) from cause


def hub_table(source: str, name: str, config: str | None, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(name, config, split=split).to_list()
    except (DatasetsError, OSError, ValueError, RuntimeError) as cause:
        raise DataError(
            f"{source}: no such file or folder, and the Hugging Face hub's data set ({name}, configuration "
            f"{config or 'default'!r}, split {split!r}) cannot be loaded: {first_line(cause)}. "
            "Configuration and split are named as in owner/name/config:split"
        ) from cause


def first_line(cause: Exception) -> str:
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
