"""The folder of the weights' versions: a run's own, wherever it lies, and nobody else's."""

import os
from importlib.util import find_spec

import pytest
import torch

from conftest import random_model, saved
from copies import policy
from ray_runs import steps_done, wait_until
from small_recipe import recipe, start
from tandem.config import load
from tandem.config.sections import NewModel
from tandem.engine.roads import SHARED, FilesRoad
from tandem.engine.weights import ModelWeights
from tandem.errors import RunError
from tandem.journal import read_metrics
from tandem.placement.copied import weights_root
from tandem.train.run import Launch, train

# On a CPU vLLM has no attention for heads narrower than these.
WIDE_HEADS = NewModel(hidden_size=64, layers=2, heads=2, kv_heads=1, max_positions=256)


def below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}


@pytest.fixture
def shared(tmp_path):
    """A folder that other runs and other programs use, too."""
    for name in ("v1", "v00000007", "v00000050/deep", "v3.tmp-0123456789ab"):
        (tmp_path / "shared" / name).mkdir(parents=True)
    return tmp_path / "shared"


def roots(tmp_path, shared, *names):
    engine = {"transfer": "files", "transfer_dir": str(shared)}
    run = load(recipe(tmp_path, engine=engine, placement={"kind": "apart"}))
    return [weights_root(run, tmp_path / name) for name in names]


def test_runs_that_share_a_folder_do_not_touch_each_other(tmp_path, shared):
    before = below(shared)
    first, second = (FilesRoad(root) for root in roots(tmp_path, shared, "one", "two"))
    live = first.offer(0, ModelWeights(policy(0)))
    for version in range(4):
        second.offer(version, ModelWeights(policy(1)))
    second.close()
    assert dict(first.read(live)).keys() == {spec.name for spec in live.specs}
    assert before < below(shared)
    first.close()
    assert below(shared) == before


def test_what_a_killed_run_left_goes_before_the_first_version(tmp_path, shared):
    (root,) = roots(tmp_path, shared, "run")
    killed = FilesRoad(root)
    for version in (50, 51):
        killed.offer(version, ModelWeights(policy(0)))
    (root / "v00000052.tmp-0123456789ab").mkdir()
    road = FilesRoad(root)
    offer = road.offer(0, ModelWeights(policy(1)))
    assert [path.name for path in root.iterdir()] == ["v00000000"]
    for name, tensor in road.read(offer):
        assert torch.equal(tensor, policy(1).network.state_dict()[name])


def test_a_folder_that_another_user_made_first_is_refused_and_stays(tmp_path, monkeypatch):
    root, mine = tmp_path / "root", os.getuid()
    (root / "v00000001").mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    road = FilesRoad(root)
    with pytest.raises(RunError, match=rf"transfer_dir={root}: .* no folder of this user's .*user {mine}\)"):
        road.offer(0, ModelWeights(policy(0)))
    road.close()
    monkeypatch.undo()
    assert (root / "v00000001").is_dir()


def test_a_link_in_its_place_is_refused_and_nothing_behind_it_goes(tmp_path):
    root, behind = tmp_path / "root", tmp_path / "behind"
    (behind / "v00000001").mkdir(parents=True)
    root.symlink_to(behind)
    with pytest.raises(RunError, match="no folder of this user's"):
        FilesRoad(root).offer(0, ModelWeights(policy(0)))
    assert [path.name for path in behind.iterdir()] == ["v00000001"]


def test_nobody_else_reads_the_weights(tmp_path):
    (tmp_path / "old").mkdir(mode=0o755)
    for name in ("old", "new"):
        FilesRoad(tmp_path / name).offer(0, ModelWeights(policy(0)))
        for folder in (tmp_path / name, tmp_path / name / "v00000000"):
            assert folder.stat().st_mode & 0o777 == 0o700


def test_a_reader_that_does_not_see_the_folder_names_it(tmp_path):
    offer = FilesRoad(tmp_path / "here").offer(0, ModelWeights(policy(0)))
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=rf"road files: there is no folder {offer.place} here; .*transfer_dir"):
        list(FilesRoad().read(offer))


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_a_run_with_engines_apart_leaves_the_folder_as_it_was(tmp_path, shared):
    before = below(shared)
    path = recipe(
        tmp_path,
        steps=2,
        engine={"transfer": "files", "transfer_dir": str(shared)},
        placement={"kind": "apart", "cpus": 1, "start_timeout_s": 300},
        eval={"every": None},
        journal={"samples": 0, "sinks": ["jsonl"]},
    )
    train(load(path), Launch(recipe=str(path)))
    assert below(shared) == before


def test_inline_a_run_goes_on_where_a_killed_one_left_newer_versions(
    make_run, quiet, tmp_path, shared, monkeypatch
):
    """With an adapter, whose base vLLM reads from a path below the user's home."""
    pytest.importorskip("vllm")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = below(shared)
    folder = saved(tmp_path / "policy", random_model(shape=WIDE_HEADS))
    run = make_run(
        folder,
        steps=2,
        engine={
            "kind": "vllm", "kv_cache_mb": 64, "eager": True, "max_model_len": 128, "max_num_seqs": 16,
            "transfer": "files", "transfer_dir": str(shared),
        },
        model={"path": "~/policy", "lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}},
    )  # fmt: skip
    left = weights_root(run, tmp_path / "run")
    for name in ("v00000050", "v00000051", "v00000052.tmp-0123456789ab"):
        (left / name).mkdir(parents=True)
    train(run, quiet)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["version"] for row in rows if "version" in row] == [1, 2]
    assert below(shared) == before


def test_inline_the_weights_of_a_killed_run_do_not_stay_in_memory(tmp_path):
    pytest.importorskip("vllm")
    path = recipe(
        tmp_path,
        steps=5000,
        model={"new": WIDE_HEADS.model_dump()},
        engine={"kind": "vllm", "kv_cache_mb": 64, "eager": True, "transfer": "files"},
        eval={"every": None},
        journal={"samples": 0, "sinks": ["jsonl"]},
    )
    left = weights_root(load(path), tmp_path / "run")
    run = start("train", path)
    try:
        wait_until("a step is done", lambda: steps_done(tmp_path / "run") or run.poll() is not None)
        assert run.poll() is None, run.communicate()
        assert left.is_relative_to(SHARED) and list(left.glob("v*"))
    finally:
        run.kill()
        run.communicate()
    wait_until("they are gone", lambda: not left.exists(), 30)
