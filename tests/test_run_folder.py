"""What lies in a run's folder and is not of a run stays as it is."""

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from small_recipe import recipe
from tandem.checkpoint import lock
from tandem.cli import app


def call(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuses(path: Path, folder: Path, said: str, *overrides: str) -> None:
    """`train`, with --fresh and without, and `check` say it, and nothing changes."""
    before = contents(folder)
    for more in ((), ("--fresh",)):
        done = call("train", path, *overrides, *more)
        assert done.exit_code == 2 and said in done.stderr, (more, done.output)
    checked = call("check", path, *overrides)
    assert checked.exit_code == 1 and said in checked.stdout.replace("\n", ""), checked.output
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["model/config.json", "config.yaml", "rollouts/mine.txt", "tensorboard/x"])
def test_what_a_run_would_write_over_and_no_run_has_written_is_refused(tmp_path, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    said = f"run_dir={tmp_path / 'run'} holds {name.split('/')[0]}, which a run would write over"
    refuses(recipe(tmp_path), tmp_path, said)


@pytest.mark.parametrize("key", ["data.train", "model.path"])
def test_a_folder_with_what_the_run_reads_is_refused(tmp_path, random_folder, key):
    place = tmp_path / "run" / "given"
    place.parent.mkdir()
    changes = {"model": {"path": str(random_folder), "new": None}}
    if key == "model.path":
        shutil.copytree(random_folder, place)
        changes = {"model": {"path": str(place), "new": None}}
    else:
        place = place.with_suffix(".jsonl")
        place.write_text('{"question": "1+1", "answer": "2"}\n' * 4)
        changes["data"] = {"train": str(place)}
    refuses(recipe(tmp_path, **changes), tmp_path, f"{key}={place} lies in run_dir={tmp_path / 'run'}; set")


def test_fresh_moves_what_the_run_has_written_and_no_more(tmp_path, monkeypatch):
    path = recipe(tmp_path, steps=1)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "rollouts").mkdir()
    monkeypatch.chdir(folder)
    assert call("train", path, "run_dir=.").exit_code == 0, "what is not in its way may lie there"
    (folder / "model.old-0123456789ab").mkdir()
    again = call("train", path, "run_dir=.", "--fresh")
    assert again.exit_code == 0 and f"the earlier run in . is now in {tmp_path / 'run.1'}" in again.output
    aside = {entry.name for entry in (tmp_path / "run.1").iterdir()}
    assert aside >= {"config.yaml", "metrics.jsonl", "checkpoints", "model", "summary.json"}
    assert aside >= {"model.old-0123456789ab"} and not aside & {"notes.txt", "lock"}
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "model" / "config.json").is_file()


def test_a_mistake_is_told_before_the_earlier_run_is_moved(tmp_path):
    path = recipe(tmp_path, steps=1)
    assert call("train", path).exit_code == 0
    wrong = call("train", path, "data.train=missing.jsonl", "--fresh")
    assert wrong.exit_code == 2 and not (tmp_path / "run.1").exists()
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_model_of_other_making_is_told_before_the_run_goes_on(tmp_path, random_folder):
    path = recipe(tmp_path, steps=2, checkpoint={"every": 1})
    assert call("train", path, "steps=1").exit_code == 0
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.copytree(random_folder, tmp_path / "run" / "model")
    before = contents(tmp_path / "run" / "model")
    for command, code in (("train", 2), ("check", 1)):
        done = call(command, path)
        assert done.exit_code == code and "is no export of Tandem's" in done.output, done.output
        assert "move it away, or begin anew with --fresh" in done.output
    assert contents(tmp_path / "run" / "model") == before


def test_the_check_says_who_holds_the_folder_and_leaves_it_to_them(tmp_path):
    path = recipe(tmp_path)
    with lock(tmp_path / "run"):
        done = call("check", path)
        said = f"run folder  {tmp_path / 'run'} is in use by process {os.getpid()} on "
        assert done.exit_code == 1 and said in done.output, done.output
    assert call("check", path).exit_code == 0
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["lock"]
