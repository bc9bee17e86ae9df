"""vLLM in processes that Ray placed: every step's weights reach it and are proved, or the run stops and says why."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from copies import QUERY, flip_byte
from ray_runs import alive, end, family, pids, wait_until
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
REWARD = Path(__file__).parents[1] / "benchmarks" / "reward.py"


def run_in(folder: Path, model: dict | None = None, layout: dict | None = None, **changes) -> list[dict]:
    path = recipe(
        folder,
        steps=3,
        model=model or {"new": WIDE_HEADS},
        reward={"functions": [{"name": f"{REWARD}:scrambled"}]},
        learner={"optimizer": {"lr": 3e-3}, "layout": layout or {}},
        eval={"every": None},
        journal={"samples": 0, "sinks": ["jsonl"]},
        **changes,
    )
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
def test_an_adapter_travels_alone_and_is_applied_by_a_worker_per_device(tmp_path, learners, layout):
    """By files, version after version, from one learner to one worker of vLLM, and from two that hold the model
    together to two. The rate is high, so that an older adapter would be far off."""
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
