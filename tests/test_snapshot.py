"""What a checkpoint of the loop holds: state that stays small, and answers sampled ahead of any number."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tandem.checkpoint import jsonfile, newest, read_json, read_manifest, write_json
from tandem.checkpoint.manifest import FILE, seal
from tandem.config import Run
from tandem.errors import RunError
from tandem.train.ahead import read_ahead, write_ahead
from tandem.train.interrupt import Interrupted
from tandem.train.run import Launch, train
from test_resume import stop_before

SMALL = 60_000
"""Bytes of state that a run of the tiny model needs at most; its answers ahead would take twice as many."""


def rollout(tokens: int, **changes: object) -> dict[str, object]:
    """The record of an answer, with floats that neither 32 bits nor decimals hold exactly."""
    logp = [-math.pi * 10.0 ** (3 - i) for i in range(tokens)]
    return {
        "tokens": list(range(tokens)),
        "sampled": [i > 1 for i in range(tokens)],
        "logp": logp,
        "policy_logp": [-0.0, 5e-324, *logp[2:]],
        "versions": [-1, -1, *range(tokens - 2)],
        "text": "7 \N{SNOWMAN} \ud800",
        "finish": "stop",
        "score": {"reward": 0.1, "failure": None, "detail": "", "parts": {"right": -0.0}},
    } | changes


def stopped(run: Run, step: int, launch: Launch) -> None:
    """Train until so many steps are done, as if a signal came then."""
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, step)
        with pytest.raises(Interrupted):
            train(run, launch)


def test_answers_ahead_come_back_equal_to_the_last_bit(tmp_path):
    failed = {"reward": None, "failure": "timeout", "detail": "after 5 s", "parts": {}}
    steps = [
        {"groups": [{"prompt": 3, "rollouts": [rollout(5), rollout(9, score=failed, finish="length")]}]},
        {"groups": [{"prompt": 0, "rollouts": [rollout(2)]}, {"prompt": 1, "rollouts": [rollout(7)]}]},
    ]
    steps = [{**step, "figures": {"rollout/refills": i, "share": 1 / 3}} for i, step in enumerate(steps)]
    before = repr(steps)
    write_ahead(tmp_path / "ahead.safetensors", steps)
    back = read_ahead(tmp_path / "ahead.safetensors")
    assert back == steps
    # Text tells apart what equality does not: 0.0, -0.0, 0 and False.
    assert json.dumps(back, sort_keys=True) == json.dumps(steps, sort_keys=True)
    assert repr(steps) == before


@pytest.mark.parametrize("damage", ["a column is missing", "a token is missing", "a length is missing"])
def test_answers_ahead_that_do_not_fit_together_are_refused(tmp_path, damage):
    file = tmp_path / "ahead.safetensors"
    write_ahead(file, [{"groups": [{"prompt": 3, "rollouts": [rollout(5), rollout(4)]}], "figures": {}}])
    tensors = load_file(file)
    match damage:
        case "a column is missing":
            del tensors["versions"]
        case "a token is missing":
            tensors["logp"] = tensors["logp"][:-1]
        case "a length is missing":
            tensors["lengths"] = tensors["lengths"].sum()[None]
    save_file(tensors, file)
    with pytest.raises(RunError, match=r"ahead.safetensors .*take another checkpoint"):
        read_ahead(file)


def test_a_run_with_many_answers_ahead_goes_on_with_little_state(
    random_folder, make_run, quiet, tmp_path, monkeypatch
):
    monkeypatch.setattr(jsonfile, "MAX_BYTES", SMALL)
    run = make_run(random_folder, steps=4, sampling={"max_lag": 2}, checkpoint={"keep": 2})
    stopped(run, 1, quiet)
    first = newest(Path(run.run_dir) / "checkpoints", strict=True)
    steps = read_ahead(first / "ahead.safetensors")
    assert [len(step["groups"]) for step in steps] == [4, 4]
    assert len(json.dumps(steps, indent=1)) > 2 * SMALL
    stopped(run, 2, quiet)
    second = newest(Path(run.run_dir) / "checkpoints", strict=True)
    assert read_manifest(second).step == 2
    assert read_ahead(second / "ahead.safetensors")[0] == steps[1]
    plain = make_run(random_folder, steps=1, run_dir=str(tmp_path / "plain"))
    train(plain, quiet)
    folder = newest(Path(plain.run_dir) / "checkpoints", strict=True)
    assert not (folder / "ahead.safetensors").exists()
    assert read_json(folder / "state.json")["roles"]["stream"]["ahead"] == []


def test_a_checkpoint_with_answers_ahead_in_its_state_is_still_read(random_folder, make_run, quiet):
    run = make_run(random_folder, steps=2, sampling={"max_lag": 1}, checkpoint={"keep": 2})
    stopped(run, 1, quiet)
    folder = newest(Path(run.run_dir) / "checkpoints", strict=True)
    state, steps = read_json(folder / "state.json"), read_ahead(folder / "ahead.safetensors")
    state["roles"]["stream"]["ahead"] = steps
    write_json(folder / "state.json", state)
    (folder / "ahead.safetensors").unlink()
    manifest = read_manifest(folder)
    (folder / FILE).unlink()
    seal(folder, step=manifest.step, config_hash=manifest.config_hash)
    train(run, quiet)
    journal = Path(run.run_dir) / "rollouts"
    lines = [line for file in sorted(journal.iterdir()) for line in file.read_text().splitlines()]
    taken = [json.loads(line)["answer"] for line in lines if json.loads(line)["step"] == 1]
    assert taken == [r["text"] for group in steps[0]["groups"] for r in group["rollouts"]]


def test_state_that_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonfile, "MAX_BYTES", 100)
    file = tmp_path / "state.json"
    write_json(file, "x" * 97)
    assert file.stat().st_size == 100 and read_json(file) == "x" * 97
    with pytest.raises(RunError, match=r"state.json would have 101 bytes, more than the 100"):
        write_json(file, "x" * 98)
    assert file.stat().st_size == 100
