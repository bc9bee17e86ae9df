"""The model of a run that goes on, whose checkpoints come and go."""

import re
import time

import pytest
import torch
from safetensors.torch import load_file

from ray_runs import steps_done, wait_until
from small_recipe import recipe, start
from tandem.checkpoint import store
from tandem.checkpoint.extract import extract
from tandem.checkpoint.manifest import verify
from tandem.checkpoint.swap import discard
from tandem.errors import RunError

ONE_AT_A_TIME = {"steps": 5000, "checkpoint": {"every": 1, "keep": 1}, "eval": {"every": None}}


def test_each_export_of_a_run_that_goes_on_is_one_whole_checkpoint(tmp_path):
    """Every step replaces the only checkpoint; what could not be read whole is told."""
    run, target, seen, retired = tmp_path / "run", tmp_path / "exported", [], 0
    process = start("train", recipe(tmp_path, **ONE_AT_A_TIME))
    try:
        wait_until("there is a checkpoint", lambda: steps_done(run) >= 2)
        until = time.monotonic() + 5
        while time.monotonic() < until or len(seen) < 3:
            try:
                extract(run, target)
            except RunError as error:
                assert "was retired by its run while it was read; the same command" in str(error), error
                retired += 1
            else:
                seen.append(load_file(target / "model.safetensors"))
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    weights = [each["model.embed_tokens.weight"] for each in seen]
    assert not torch.equal(weights[0], weights[-1]), "later exports are of later steps"
    assert not list(tmp_path.glob("exported?*")), "nothing half done is left"


def saved(folder, step: int):
    def write(place):
        (place / "model").mkdir()
        (place / "model" / "config.json").write_text(str(step))

    return store.save(folder, step, write, config_hash="", keep=1)


def test_a_checkpoint_that_is_retired_while_it_is_looked_at_is_no_broken_one(tmp_path, monkeypatch):
    first, looked = saved(tmp_path, 1), []

    def slowly(path):
        looked.append(path)
        if path == first:
            later.append(saved(tmp_path, 2))
        return verify(path)

    later: list = []
    monkeypatch.setattr(store, "verify", slowly)
    assert store.newest(tmp_path, strict=True) == tmp_path / "step_00000002" == later[0]
    assert looked[0] == first and not first.exists()


def test_one_that_is_retired_while_it_is_read_is_told_with_what_to_do(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "checkpoints"
    first = saved(folder, 1)
    real = extract.__globals__["shutil"].copytree

    def slowly(source, place, **options):
        discard(first)
        return real(source, place, **options)

    monkeypatch.setattr("tandem.checkpoint.extract.shutil.copytree", slowly)
    with pytest.raises(RunError, match=re.escape(f"{first} was retired by its run while it was read")):
        extract(tmp_path / "run", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
