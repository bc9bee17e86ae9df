"""vLLM in processes that Ray placed: every step's weights reach it and are proved, or the run stops and says why."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from copies import QUERY, flip_byte
from ray_runs import (
    JoinedNodes,
    alive,
    driver,
    end,
    family,
    pids,
    places,
    steps_done,
    trajectory,
    wait_until,
)
from small_recipe import recipe
from tandem.config import load
from tandem.config.sections import NewModel
from tandem.errors import RunError
from tandem.journal import read_metrics
from tandem.model import LanguageModel
from tandem.model.new import new_network, new_tokenizer
from tandem.placement.cluster.engines import Engines
from tandem.train.run import Launch, train
from tandem.train.session import Session

pytestmark = pytest.mark.skipif(
    find_spec("ray") is None or find_spec("vllm") is None, reason="Ray or vLLM is not installed"
)

ENGINE = {"kind": "vllm", "kv_cache_mb": 64, "eager": True, "max_model_len": 128, "max_num_seqs": 16}
PLACED = {"cpus": 1, "start_timeout_s": 300, "engine_timeout_s": 180, "learner_timeout_s": 180}
# On a CPU vLLM has no attention for heads narrower than these.
WIDE_HEADS = {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 256}
NAMED = ("/dev/shm/psm_", "/dev/shm/vllm_")
REWARD = Path(__file__).parents[1] / "benchmarks" / "reward.py"


def recipe_in(folder: Path, model: dict | None = None, layout: dict | None = None, **changes) -> Path:
    return recipe(
        folder,
        model=model or {"new": WIDE_HEADS},
        reward={"functions": [{"name": f"{REWARD}:scrambled"}]},
        learner={"optimizer": {"lr": 3e-3}, "layout": layout or {}},
        eval={"every": None},
        journal={"samples": 0, "sinks": ["jsonl"]},
        **{"steps": 3} | changes,
    )


def shared_memory(engine: int) -> set[str]:
    """What an engine's processes share by vLLM's means: its paths, with a note where they are of the past."""
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in family(engine))
    return {line.split(maxsplit=5)[5] for line in maps.splitlines() if any(name in line for name in NAMED)}


def run_in(folder: Path, **changes) -> list[dict]:
    path = recipe_in(folder, **changes)
    train(load(path), Launch(recipe=str(path)))
    return read_metrics(folder / "run" / "metrics.jsonl")


def test_apart_every_step_samples_from_the_weights_of_the_step_before_though_the_engine_dies(
    tmp_path, monkeypatch
):
    """They come by broadcast, from two learners that hold the model together, into vLLM's own interface for them: and
    to the engine that samples the last step, which replaces one that was killed."""
    after, struck = Session.after, []

    def strike(self, step, *rest):
        after(self, step, *rest)
        if step == 1:
            struck.extend(family(pids(tmp_path / "run", "engine")[-1]))
            end(struck[0].pid)

    monkeypatch.setattr(Session, "after", strike)
    engine = {**ENGINE, "transfer": "broadcast"}
    placement = {"kind": "apart", "learners": 2, **PLACED, "backoff_s": 0.1}
    rows = run_in(tmp_path, engine=engine, placement=placement, layout={"pipeline": 2})
    # The rate is high: answers of an older version would be off by far more.
    assert all(row["rollout/logp_gap_max"] < 1e-4 for row in rows)
    assert [row["version"] for row in rows] == [1, 2, 3]
    assert all(row["actor/updates"] == 1 for row in rows)
    engines = dict.fromkeys(pids(tmp_path / "run", "engine"))
    assert len(engines) == 2 and next(iter(engines)) == struck[0].pid
    wait_until("all of the killed one is gone", lambda: not alive(struck), 30)


@pytest.mark.parametrize(("learners", "layout"), [(1, {}), (2, {"tensor": 2})])
def test_an_adapter_travels_alone_and_is_applied_by_a_worker_per_device(
    tmp_path, monkeypatch, learners, layout
):
    """By files, version after version, from one learner to one worker of vLLM, and from two that hold the model
    together to two. The rate is high, so that an older adapter would be far off. The workers' memory is nobody's when
    they are gone."""
    close, shared = Engines.close, set()

    def watched(self):
        (engine,) = pids(tmp_path / "run", "engine")
        shared.update(shared_memory(engine))
        close(self)

    monkeypatch.setattr(Engines, "close", watched)
    tokenizer = new_tokenizer()
    size = NewModel(**WIDE_HEADS | {"kv_heads": 2})
    LanguageModel(new_network(size, tokenizer, 0), tokenizer, "base").save(tmp_path / "base")
    rows = run_in(
        tmp_path,
        model={"path": str(tmp_path / "base"), "new": None, "lora": {"rank": 4}},
        engine={**ENGINE, "tensor_parallel": learners},
        placement={"kind": "apart", "learners": learners, **PLACED},
        layout=layout,
    )
    assert [row["version"] for row in rows] == [1, 2, 3]
    assert all(row["rollout/logp_gap_max"] < 1e-4 and row["actor/updates"] == 1 for row in rows)
    assert learners == 1 or any("psm_" in path for path in shared), "vLLM has some"
    assert all(path.endswith(" (deleted)") for path in shared)


def test_colocated_a_flipped_byte_on_the_way_stops_the_run_with_the_tensors_name(tmp_path, monkeypatch):
    """The bytes are those of the memory that the two processes share."""
    update = Engines.update

    def flipped(self, parcel):
        if parcel.offer.version == 2:
            (handles,) = parcel.offer.place.values()
            path, _, start = dict(handles)[QUERY]
            flip_byte(Path(path), start)
        update(self, parcel)

    monkeypatch.setattr(Engines, "update", flipped)
    with pytest.raises(
        RunError, match=rf"engine 0 \(node .*: weights of version 2 by road ipc: tensor {QUERY} changed"
    ):
        run_in(
            tmp_path,
            engine={**ENGINE, "sleep": True, "transfer": "ipc"},
            placement={"kind": "colocated", **PLACED},
        )
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["version"] for row in rows] == [1, 2], "the weights before came whole"
    assert all(row["rollout/logp_gap_max"] < 1e-4 for row in rows)


def test_colocated_an_engine_lies_on_its_learners_devices_and_a_killed_driver_leaves_none_of_its_workers(
    tmp_path,
):
    """On a node of a joined cluster that is said to have two GPUs; the answers are those of a vLLM of one worker beside
    one learner. Nor is any memory left that they share: it has no name by which it could be."""
    inline, ours = tmp_path / "inline", tmp_path / "ours"
    for folder in (inline, ours):
        folder.mkdir()
    model = {"new": WIDE_HEADS | {"kv_heads": 2}}
    run_in(inline, model=model, engine=ENGINE)
    nodes = JoinedNodes(tmp_path, "--num-cpus=0", port=6397)
    nodes.environ.pop("GOMP_SPINCOUNT", None)
    with nodes:
        nodes.start(f"--address={nodes.address}", "--num-cpus=4", "--num-gpus=2")
        path = recipe_in(
            ours,
            steps=5000,
            model=model,
            engine={**ENGINE, "tensor_parallel": 2, "sleep": True, "transfer": "ipc"},
            placement={"kind": "colocated", "learners": 2, **PLACED, "address": nodes.address},
            layout={"shard": 2},
        )
        said = tmp_path / "said"
        with driver(nodes, said, "-m", "tandem", "train", path) as process:
            wait_until("three steps are done", lambda: steps_done(ours / "run") >= 3 or process.poll())
            assert process.poll() is None, said.read_text()
            lives = places(ours)
            assert lives.keys() == {"engine-0", "learner-0", "learner-1"}
            workers = {name: family(pid) for name, ((_, pid),) in lives.items()}
            environs = [worker.environ() for worker in workers["engine-0"][1:]]
            shared = shared_memory(workers["engine-0"][0].pid)
            there = [*family(process.pid), *(p for family in workers.values() for p in family)]
            end(process.pid)
        assert len(environs) >= 2
        for environ in environs:
            assert sorted(environ["CUDA_VISIBLE_DEVICES"].split(",")) == ["0", "1"]
            assert (environ["GOMP_SPINCOUNT"], environ["OMP_NUM_THREADS"]) == ("2000", "1")
        wait_until("all processes of the run are gone", lambda: not alive(there), 30)
        assert len(shared) > 3 and all(path.endswith(" (deleted)") for path in shared), "and their memory"
    for row, other in zip(trajectory(ours / "run")[:3], trajectory(inline / "run"), strict=True):
        assert row["reward/mean"] == other["reward/mean"] and row["version"] == other["version"]
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["rollout/logp_gap_max"] < 1e-4
