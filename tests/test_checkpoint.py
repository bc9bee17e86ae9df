"""A checkpoint is whole or absent: under kills, damage, full disks and hostile manifests."""

import errno
import hashlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tandem import checkpoint
from tandem.errors import RunError

FILES = ("model/config.json", "model/weights.bin", "optimizer.safetensors", "state.json")
"""Where the tests write a text that tells one checkpoint from another."""


def put(text: str):
    """A `write` callback that fills every file with the same text."""

    def write(folder: Path) -> None:
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{text} of {name}\n" * 20)

    return write


def save(folder: Path, step: int, text: str = "text", keep: int = 9, **options) -> Path:
    return checkpoint.save(folder, step, put(text), config_hash="c0ffee", keep=keep, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def text_of(path: Path) -> str:
    """The one text in all files, or a failure if the checkpoint is a mixture."""
    texts = {(path / name).read_text().split(" of ")[0] for name in FILES}
    assert len(texts) == 1
    return texts.pop()


def python(code: str, *args: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)


# ---- kills -------------------------------------------------------------------

KILLED_SAVES = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from tandem.checkpoint import save

before, killed, keep, *names = sys.argv[1:]
calls = 0
def counted(function):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call
@counted
def put(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"new of {path}\\n" * 20)
for deadly in itertools.count(1):
    folder = Path(killed) / str(deadly)
    shutil.copytree(before, folder)
    if not os.fork():
        for name in ("chmod", "fsync", "mkdir", "rename", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        save(folder, 3, lambda tmp: [put(tmp / name) for name in names], config_hash="c0ffee", keep=int(keep))
        os._exit(0)
    print(code := os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    if code != -signal.SIGKILL:
        break
"""


NEW_STEP = {("step_00000002", "old"), ("step_00000003", "new")}
SAME_STEP = {("step_00000003", "old"), ("step_00000003.old-", "old"), ("step_00000003", "new")}


@pytest.mark.parametrize(("steps", "keep", "states"), [((1, 2), 2, NEW_STEP), ((3,), 1, SAME_STEP)])
def test_a_kill_at_any_point_of_a_save_leaves_a_valid_newest_checkpoint(tmp_path, steps, keep, states):
    before, killed, seen = tmp_path / "before", tmp_path / "killed", set()
    for step in steps:
        save(before, step, "old")
    said, _ = python(KILLED_SAVES, before, killed, keep, *FILES).communicate()
    *codes, last = map(int, said.split())
    assert len(codes) > 24 and set(codes) == {-signal.SIGKILL} and last == 0
    for point, code in enumerate([*codes, last], 1):
        folder = killed / str(point)
        found = checkpoint.newest(folder)
        text = text_of(found)
        seen.add((found.name[:18], text))
        if code == 0:
            break
        checkpoint.clean(folder)
        assert all(re.fullmatch(r"step_\d{8}", name) for name in names(folder))
        assert text_of(checkpoint.newest(folder)) == text
        assert text == "new" or {f"step_{step:08d}" for step in steps} <= set(names(folder))
        assert text_of(save(folder, 3, "again", keep)) == "again"
        assert len(names(folder)) == keep
    assert text == "new" and seen == states


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    synced, at_rename = [], []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda *paths: (at_rename.append(len(synced)), rename(*paths)))
    path = save(tmp_path / "run" / "checkpoints", 1)
    before, after = synced[: at_rename[0]], synced[at_rename[0] :]
    assert {entry.stat().st_ino for entry in [path, *path.rglob("*")]} <= set(before)
    assert {folder.stat().st_ino for folder in (tmp_path, tmp_path / "run")} <= set(before)
    assert after == [path.parent.stat().st_ino]


def test_an_error_inside_write_leaves_the_folder_as_it_was(tmp_path):
    save(tmp_path, 1, "old")
    for error in (KeyError("a bug"), KeyboardInterrupt()):

        def write(tmp, error=error):
            put("new")(tmp)
            raise error

        with pytest.raises(type(error)):
            checkpoint.save(tmp_path, 1, write, config_hash="", keep=1)
        assert names(tmp_path) == ["step_00000001"]
        assert text_of(checkpoint.newest(tmp_path)) == "old"


# ---- damage ------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit flipped": lambda path: flip(path, path.stat().st_size // 2),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "missing": lambda path: path.unlink(),
    "symbolic link": lambda path: (
        path.rename(path.parents[1] / "elsewhere"),
        path.symlink_to("/etc/hostname"),
    ),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_is_named_and_an_older_checkpoint_taken(tmp_path, caplog, name, damage):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGE[damage](newer / name)
    problems = checkpoint.verify(newer)
    assert any(name in problem for problem in problems)
    assert checkpoint.verify(older) == []
    with caplog.at_level(logging.WARNING, "tandem.checkpoint"):
        assert checkpoint.newest(tmp_path) == older
    assert name in caplog.text and newer.name in caplog.text
    with pytest.raises(RunError, match=re.escape(name)):
        checkpoint.newest(tmp_path, strict=True)


def test_every_single_bit_of_the_manifest_counts(tmp_path):
    path = save(tmp_path, 1)
    file = path / "manifest.json"
    for at in range(file.stat().st_size):
        flip(file, at)
        assert checkpoint.verify(path), at
        flip(file, at)
    assert checkpoint.verify(path) == []


def test_extra_files_and_linked_or_renamed_folders_are_refused(tmp_path):
    path = save(tmp_path, 1)
    (path / "model" / "bomb.pt").write_bytes(b"x")
    assert checkpoint.verify(path) == ["model/bomb.pt: not in the manifest"]
    (path / "model" / "bomb.pt").unlink()
    (tmp_path / "step_00000002").symlink_to(path)
    assert "symbolic link" in checkpoint.verify(tmp_path / "step_00000002")[0]
    (tmp_path / "step_00000002").unlink()
    (path / "linked").symlink_to("model", target_is_directory=True)
    assert checkpoint.verify(path) == ["linked: a symbolic link, refused"]
    (path / "linked").unlink()
    moved = path.rename(tmp_path / "step_00000007")
    assert "step 1" in checkpoint.verify(moved)[0]
    assert checkpoint.verify(tmp_path / "step_00000009") == [f"{tmp_path / 'step_00000009'} is not a folder"]


def forge(path: Path, **changes) -> None:
    """Rewrite a manifest as an attacker would, with a digest that fits."""
    body = json.loads((path / "manifest.json").read_text())
    body.pop("sha256")
    body |= changes
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"
    (path / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "model/../../outside", "a\\b", "./state.json", ""]
)
def test_a_manifest_that_points_outside_is_refused(tmp_path, name):
    path = save(tmp_path, 1)
    (tmp_path / "outside").write_text("x")
    forge(path, files={name: {"size": 1, "sha256": "0" * 64}})
    assert "not a plain path" in checkpoint.verify(path)[0]


@pytest.mark.parametrize(
    "changes", [{"files": ["a"]}, {"files": {"a": 1}}, {"step": "1"}, {"config_hash": None}, {"surplus": 1}]
)
def test_a_manifest_of_another_form_is_refused(tmp_path, changes):
    path = save(tmp_path, 1)
    forge(path)
    assert checkpoint.verify(path) == []
    forge(path, **changes)
    assert len(checkpoint.verify(path)) == 1


@pytest.mark.parametrize(("schema", "age"), [(0, "older"), (99, "newer")])
def test_another_schema_is_named_with_the_version_that_wrote_it(tmp_path, schema, age):
    path = save(tmp_path, 1)
    forge(path, schema=schema, tandem="7.7.7")
    with pytest.raises(RunError, match=rf"schema {schema}, from an? {age} Tandem \(7\.7\.7\).*Resume with"):
        checkpoint.newest(tmp_path)


def test_no_checkpoint_is_none_and_only_broken_ones_are_an_error(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None
    (tmp_path / "step_00000001.tmp-0123456789ab").mkdir()
    (tmp_path / "step_00000002_backup").mkdir()
    assert checkpoint.newest(tmp_path) is None
    (save(tmp_path, 3) / "state.json").unlink()
    with pytest.raises(RunError, match=r"none is valid.*state\.json: missing.*Move them away"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_keeps_the_newest_valid_ones(tmp_path, keep):
    for step in range(1, 7):
        save(tmp_path, step, keep=keep)
        assert names(tmp_path) == [f"step_{s:08d}" for s in range(max(1, step - keep + 1), step + 1)]


def test_retention_does_not_count_broken_ones_nor_touch_later_steps(tmp_path, caplog):
    for step in (1, 2, 3, 4, 50):
        save(tmp_path, step)
    (tmp_path / "step_00000004" / "state.json").unlink()
    (tmp_path / "mine").mkdir()
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["mine", *(f"step_{s:08d}" for s in (3, 4, 5, 50))]
    assert "step_00000004 is broken" in caplog.text and "step_00000050 is of a later step" in caplog.text
    save(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["mine", *(f"step_{s:08d}" for s in (5, 6, 50))]


def test_the_same_step_is_replaced_if_it_differs_or_is_broken_and_else_left(tmp_path):
    path = save(tmp_path, 1, "one")
    first = path.stat().st_ino
    assert save(tmp_path, 1, "one").stat().st_ino == first
    (path / "state.json").unlink()
    assert save(tmp_path, 1, "one").stat().st_ino != first
    assert text_of(save(tmp_path, 1, "two")) == "two"
    assert names(tmp_path) == ["step_00000001"] and checkpoint.verify(path) == []


# ---- the disk ----------------------------------------------------------------


def full_device(tmp: Path) -> None:
    put("new")(tmp)
    (tmp / "more").symlink_to("/dev/full")
    (tmp / "more").write_bytes(b"x" * 100_000)


def large_tensors(tmp: Path) -> None:
    checkpoint.write_tensors(tmp / "large.safetensors", {"a": torch.rand(1_000_000)})


@pytest.mark.parametrize(
    ("write", "limit", "advice"),
    [(full_device, None, "Free some space"), (large_tensors, 100_000, "ulimit"), (put("new"), 100, "ulimit")],
    ids=["device full", "file limit, safetensors", "file limit, text"],
)
def test_a_write_that_the_system_refuses_costs_nothing_but_this_save(tmp_path, write, limit, advice):
    save(tmp_path, 1, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit or soft, hard))
        with pytest.raises(RunError, match=rf"step_00000002.*bytes free.*{advice}") as caught:
            checkpoint.save(tmp_path, 2, write, config_hash="", keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    assert names(tmp_path) == ["step_00000001"]
    assert text_of(checkpoint.newest(tmp_path)) == "old"
    assert text_of(save(tmp_path, 2, "new", keep=1)) == "new"


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("function", ["mkdir", "fsync", "rename"])
def test_an_error_of_any_call_is_a_run_error_and_undone(tmp_path, monkeypatch, function, code):
    save(tmp_path, 1, "old")
    real, calls = getattr(os, function), []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 2 or function == "mkdir":
            raise OSError(code, os.strerror(code))
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing)
        with pytest.raises(RunError, match=re.escape(os.strerror(code))):
            save(tmp_path, 1, "new")
    assert names(tmp_path) == ["step_00000001"]
    assert text_of(checkpoint.newest(tmp_path)) == "old"


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4700k", "none", disk]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:

        def tensors(count):
            def write(tmp):
                checkpoint.write_tensors(tmp / "a.safetensors", {"a": torch.rand(count)})

            return write

        checkpoint.save(disk, 1, tensors(400_000), config_hash="", keep=2)
        with pytest.raises(RunError, match=r"No space left.*Free some space"):
            checkpoint.save(disk, 2, tensors(2_000_000), config_hash="", keep=2)
        assert names(disk) == ["step_00000001"]
        checkpoint.save(disk, 3, tensors(400_000), config_hash="", keep=2)
        assert names(disk) == ["step_00000001", "step_00000003"]
        with pytest.raises(RunError, match=r"needs about 1,76.*nothing was written"):
            save(disk, 4)
        assert checkpoint.newest(disk).name == "step_00000003" and len(names(disk)) == 2
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_save_that_cannot_fit_is_refused_before_it_begins(tmp_path):
    with pytest.raises(RunError, match=r"bytes free and the checkpoint needs about 1,1\d\d,"):
        save(tmp_path / "run", 1, expected_bytes=10**18)
    assert names(tmp_path / "run") == []


READ_ONLY = """
import ctypes, os, sys
from pathlib import Path
if os.geteuid() == 0 and len(sys.argv) == 3:  # root obeys permissions once it has given up CAP_DAC_OVERRIDE
    ctypes.CDLL(None).prctl(24, 1)
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], sys.argv[1]])
from tandem.checkpoint import lock, save
from tandem.errors import RunError
folder = Path(sys.argv[1])
for attempt in (lambda: save(folder, 1, print, config_hash="", keep=1), lambda: lock(folder).__enter__()):
    try:
        attempt()
    except RunError as error:
        print(error)
"""


def test_a_read_only_folder_is_named_by_save_and_lock(tmp_path):
    tmp_path.chmod(0o500)
    out, _ = python(READ_ONLY, tmp_path, READ_ONLY).communicate()
    tmp_path.chmod(0o700)
    lines = out.splitlines()
    assert len(lines) == 2
    assert all(str(tmp_path) in line and "Permission denied" in line and "writable" in line for line in lines)
    assert names(tmp_path) == []
