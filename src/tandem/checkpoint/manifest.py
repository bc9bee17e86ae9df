"""The manifest: what a checkpoint holds, by size and SHA-256. A checkpoint is valid exactly if it verifies.

The manifest carries its own digest and must stand in the file just as it would be written, so that a flipped
bit anywhere in a checkpoint is found.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import tandem
from tandem.checkpoint.jsonfile import parse_json, read_text
from tandem.errors import RunError

FILE = "manifest.json"
SCHEMA = 3
"""Raised when a checkpoint's layout changes such that an older Tandem would misread it."""

_STEP = re.compile(r"step_(\d{8,})(?:\.(?:tmp|old)-[0-9a-f]{12})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a checkpoint."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself; `files` is keyed by path below its folder."""

    step: int
    config_hash: str
    tandem: str
    """Version of the package that wrote it."""
    files: Mapping[str, Entry]

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(entry.size for entry in self.files.values())


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint folder, finished or not; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def seal(path: Path, *, step: int, config_hash: str) -> None:
    """Write the manifest of everything in the folder, as its last file."""
    files, problems = _scan(path)
    if FILE in files:
        problems.append(f"{FILE}: the name is taken by the manifest")
    if problems:
        raise RunError(f"checkpoint of step {step} cannot be sealed: {list_problems(problems)}")
    digests = _digests(path, files)
    entries = {name: Entry(size=files[name], sha256=digests[name]) for name in files}
    manifest = Manifest(step=step, config_hash=config_hash, tandem=tandem.__version__, files=entries)
    (path / FILE).write_text(_render(manifest), encoding="ascii")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder, its own digest checked; for the files it names, see `verify`."""
    file = path / FILE
    text = read_text(file)
    body = parse_json(text, file)
    if not isinstance(body, dict) or not isinstance(body.get("schema"), int):
        raise RunError(f"{file} is not the manifest of a checkpoint: it has no schema")
    if body["schema"] != SCHEMA:
        age = "an older" if body["schema"] < SCHEMA else "a newer"
        raise RunError(
            f"{file} has schema {body['schema']}, from {age} Tandem ({body.get('tandem')}); this one "
            f"({tandem.__version__}) reads schema {SCHEMA}. Resume with the version that wrote it"
        )
    manifest = _typed(body, file)
    if text != _render(manifest):
        raise RunError(f"{file} was changed after it was written: its digest differs")
    return manifest


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; empty if it is exactly as it was written."""
    if path.is_symlink():
        return [f"{path} is a symbolic link: give the folder that it points to"]
    if not path.is_dir():
        return [f"{path} is not a folder"]
    try:
        manifest = read_manifest(path)
        found, problems = _scan(path)
        found.pop(FILE, None)
        if step_of(path.name) not in (None, manifest.step):
            problems.append(f"{FILE}: says step {manifest.step}, the folder's name says otherwise")
        problems += [f"{name}: missing" for name in manifest.files if name not in found]
        problems += [f"{name}: not in the manifest" for name in found if name not in manifest.files]
        problems += _changed(path, manifest.files, found)
    except (RunError, OSError) as error:
        return [str(error)]
    return problems


def list_problems(problems: list[str], limit: int = 5) -> str:
    """The first few problems in one line."""
    rest = len(problems) - limit
    return "; ".join(problems[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def _changed(path: Path, files: Mapping[str, Entry], found: Mapping[str, int]) -> list[str]:
    """Problems of the files that are there, sizes first: only files of the right size are read."""
    there = [name for name in files if name in found]
    problems = [
        f"{name}: {found[name]:,} bytes instead of {files[name].size:,}"
        for name in there
        if found[name] != files[name].size
    ]
    digests = _digests(path, [name for name in there if found[name] == files[name].size])
    changed = [name for name, digest in digests.items() if digest != files[name].sha256]
    return problems + [f"{name}: contents changed (SHA-256 differs)" for name in changed]


def _scan(path: Path) -> tuple[dict[str, int], list[str]]:
    """Sizes of the regular files below a folder, and what else is there; links are not followed."""
    sizes, problems = {}, []
    for here, folders, files in os.walk(path, onerror=_raise):
        for name in sorted(folders + files):
            entry = Path(here, name)
            relative = entry.relative_to(path).as_posix()
            info = entry.lstat()
            if stat.S_ISLNK(info.st_mode):
                problems.append(f"{relative}: a symbolic link, refused")
            elif stat.S_ISREG(info.st_mode):
                sizes[relative] = info.st_size
            elif not stat.S_ISDIR(info.st_mode):
                problems.append(f"{relative}: not a regular file, refused")
    return sizes, problems


def _raise(error: OSError) -> None:
    raise error


def _digests(path: Path, names: Mapping[str, int] | list[str]) -> dict[str, str]:
    """SHA-256 of files, a few at a time: hashing lets go of the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(path / name), names)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _render(manifest: Manifest) -> str:
    """The one text that stands for these contents, with their digest."""
    body = {"schema": SCHEMA, **asdict(manifest)}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _typed(body: Mapping[str, Any], file: Path) -> Manifest:
    """The manifest with every field's type and every path checked: its digest proves no good intent."""
    step, config_hash, version, files = (body.get(k) for k in ("step", "config_hash", "tandem", "files"))
    if not (isinstance(step, int) and isinstance(config_hash, str) and isinstance(version, str)):
        raise RunError(f"{file}: step, config_hash or tandem is missing or has the wrong type")
    if not isinstance(files, dict):
        raise RunError(f"{file}: files is missing or has the wrong type")
    entries = {name: _entry(name, value, file) for name, value in files.items()}
    return Manifest(step=step, config_hash=config_hash, tandem=version, files=entries)


def _entry(name: str, value: Any, file: Path) -> Entry:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name:
        raise RunError(f"{file} names {name!r}, which is not a plain path below its folder: refused")
    if not isinstance(value, dict):
        raise RunError(f"{file}: the entry of {name!r} has the wrong type")
    size, digest = value.get("size"), value.get("sha256")
    if not isinstance(size, int) or not isinstance(digest, str):
        raise RunError(f"{file}: size or sha256 of {name!r} is missing or has the wrong type")
    return Entry(size=size, sha256=digest)
