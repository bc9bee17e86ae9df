"""Weights by broadcast between processes that Ray placed: as any other road, and nobody waits for the dead."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest

from copies import CPU, beside, policy
from ray_runs import SMALL, pids, trajectory, wait_until
from small_recipe import environment, recipe
from tandem.config import load
from tandem.engine import roads
from tandem.engine.receiver import ReceivingEngine
from tandem.engine.roads import BroadcastRoad, RoadBroken
from tandem.engine.weights import ModelWeights
from tandem.errors import ConfigError, RunError
from tandem.train.run import Launch, train

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
PLACED = {"kind": "apart", "cpus": 1, "engines": 2, "backoff_s": 0.1, "engine_timeout_s": 6}

DIES = """
import os, sys
from copies import CPU, policy
from tandem.engine import roads
from tandem.engine.weights import ModelWeights

roads.BUCKET = 1 << 14
end = roads.BroadcastRoad("127.0.0.1", int(sys.argv[1]), 1, 3, CPU, timeout_s=120)
end.connect()
arriving = end.read(end.offer(1, ModelWeights(policy(1))))
next(arriving)
os._exit(1)
"""


def run_in(folder, **changes):
    folder.mkdir(exist_ok=True)
    path = recipe(folder, **SMALL | changes)
    train(load(path), Launch(recipe=str(path)))
    return trajectory(folder / "run")


def test_a_receiver_that_dies_in_the_middle_ends_it_for_all_and_soon(monkeypatch):
    """The one that lives has part of the weights, and refuses to generate until it has all of a version."""
    monkeypatch.setattr(roads, "BUCKET", 1 << 14)
    sender = BroadcastRoad("127.0.0.1", 0, 0, 3, CPU, timeout_s=120)
    weights = ModelWeights(policy(1))
    with subprocess.Popen([sys.executable, "-c", DIES, str(sender.port)], env=environment()) as dying:
        end = BroadcastRoad("127.0.0.1", sender.port, 2, 3, CPU, timeout_s=120)
        with beside(sender.connect):
            end.connect()
        engine = ReceivingEngine(policy(0), end, slots=4)
        offer = sender.offer(1, weights)
        errors = []

        def send():
            try:
                sender.send(offer, weights)
            except RoadBroken as error:
                errors.append(error)

        with beside(send), pytest.raises(RoadBroken, match="broke off at tensor"):
            engine.update(offer)
    assert dying.returncode == 1
    assert errors and not sender.connected and engine.version == 0
    with pytest.raises(RunError, match="part of version 1"):
        engine.generate([], None)


@pytest.mark.skipif(
    "TANDEM_FAULTS" not in os.environ, reason="needs a machine of its own; TANDEM_FAULTS=1 runs it"
)
@needs_ray
def test_a_run_by_broadcast_is_that_of_one_process_though_engines_die_and_hang_in_the_middle(
    tmp_path, monkeypatch
):
    from tandem.placement.cluster.broadcast import Broadcasting
    from tandem.placement.cluster.engines import Engines

    # With lag the learner goes on while a version is sent.
    expected, groups = run_in(tmp_path / "inline", steps=8, sampling={"max_lag": 1}), []
    offers, update = Broadcasting.offers, Engines.update

    def striking(self, parcel, workers):
        both, version = len(workers) == 2, parcel.offer.version
        if both and version == 5:
            os.kill(pids(tmp_path / "run", "engine")[-1], signal.SIGSTOP)
        begun = offers(self, parcel, workers)
        if both and version == 2:
            os.kill(pids(tmp_path / "run", "engine")[0], signal.SIGKILL)
        groups.append((version, begun[0].place.number, len(begun))) if begun else None
        return begun

    def with_all(self, parcel):
        """Replaced engines are waited for, so that the next version is for both again."""
        if parcel.offer.version in (4, 7):
            wait_until("both serve", lambda: self._tend() or all(map(self._ready, self.seats)))
        update(self, parcel)

    monkeypatch.setattr(Broadcasting, "offers", striking)
    monkeypatch.setattr(Engines, "update", with_all)
    ours = run_in(
        tmp_path, steps=8, placement=PLACED, engine={"transfer": "broadcast"}, sampling={"max_lag": 1}
    )
    for row, other in zip(ours[:8], expected[:8], strict=True):
        assert row["reward/mean"] == other["reward/mean"] and row["version"] == other["version"]
        # Rows that are computed together with others are rounded otherwise.
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    whole = [(version, number) for version, number, size in groups if size == 2]
    alone = [version for version, _, size in groups if size == 1]
    assert whole[:3] == [(0, 1), (1, 1), (2, 1)], "the group stays while its members do"
    assert [version for version, _ in whole[3:]] == [4, 5, 7, 8], "and is formed anew when both are back"
    assert 2 in alone and 5 in alone, "the one that lives takes what broke off"
    assert len(set(pids(tmp_path / "run", "engine"))) == 4, "two engines were replaced"


def test_broadcasts_that_lead_nowhere_are_refused_before_anything_starts(tmp_path):
    for placement, engine, model, said in (
        ({"kind": "inline"}, {}, {}, "placement.kind=inline weights travel by auto, memory, files"),
        ({"kind": "colocated"}, {}, {}, "needs a device for each"),
        ({"kind": "apart"}, {"kind": "vllm"}, {"lora": {"rank": 4}}, "vLLM reads adapters"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(recipe(
                tmp_path, placement=placement, engine={"transfer": "broadcast", **engine}, model=model
            ))  # fmt: skip
