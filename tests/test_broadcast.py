"""Weights by broadcast between processes that Ray placed: as any other road, and nobody waits for the dead."""

import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec

import psutil
import pytest

from copies import CPU, beside, policy
from ray_runs import SMALL, end, hanging, pids, process, trajectory, wait_until
from slow_engines import ThreadWorker, parcel
from small_recipe import environment, recipe
from tandem.checkpoint import newest
from tandem.config import load
from tandem.engine import roads
from tandem.engine.receiver import ReceivingEngine
from tandem.engine.roads import BroadcastRoad, Meeting, RoadBroken
from tandem.engine.weights import ModelWeights
from tandem.errors import ConfigError, RunError
from tandem.placement.cluster.ahead import AheadStream
from tandem.train.run import Launch, train

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
PLACED = {"kind": "apart", "cpus": 1, "engines": 2}

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


@contextmanager
def open_group(size):
    """All ends of a group in this process, the sender's first."""
    sender = BroadcastRoad("127.0.0.1", 0, 0, size, CPU, timeout_s=120)
    ends = [
        BroadcastRoad("127.0.0.1", sender.port, rank, size, CPU, timeout_s=120) for rank in range(1, size)
    ]
    with ThreadPoolExecutor(size) as pool:
        list(pool.map(BroadcastRoad.connect, [sender, *ends]))
    yield sender, *ends


@contextmanager
def breaking_off(sender, offer, weights):
    """What is sent, and what is received meanwhile, ends in the middle."""

    def send():
        with pytest.raises(RoadBroken):
            sender.send(offer, weights)

    with beside(send), pytest.raises(RoadBroken, match="broke off at tensor"):
        yield


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
        with breaking_off(sender, offer, weights):
            engine.update(offer)
    assert dying.returncode == 1
    assert not sender.connected and engine.version == 0
    with pytest.raises(RunError, match="part of version 1"):
        engine.generate([], None)


def test_who_waits_for_a_silent_receiver_gives_up_at_the_deadline():
    with open_group(3) as (sender, *ends):
        weights = ModelWeights(policy(1))
        offer = sender.offer(1, weights)
        for road in (sender, ends[0]):
            road.timeout = timedelta(seconds=0.5)
        with breaking_off(sender, offer, weights):
            list(ends[0].read(offer))
    assert not sender.connected and not ends[0].connected


@needs_ray
def test_a_run_by_broadcast_is_that_of_one_process_though_engines_die_and_hang_in_the_middle(
    tmp_path, monkeypatch
):
    """Nothing here is decided by a clock: the time of the engine that hangs is up at once, and the one that dies comes
    back when version 2 is about to be sent."""
    from tandem.placement.cluster.broadcast import Broadcasting
    from tandem.placement.cluster.engines import Engines

    # With lag the learner goes on while a version is sent.
    changes = {"steps": 5, "eval": {"every": None}, "sampling": {"max_lag": 1}}
    expected, sent, hang = run_in(tmp_path / "inline", **changes), [], hanging(monkeypatch)
    offers, update, lose = Broadcasting.offers, Engines.update, Engines._lose

    def striking(self, parcel, workers):
        version, victims = parcel.offer.version, workers if len(workers) == 2 else []
        if victims and version == 3:
            hang(process(victims[1]))
        begun = offers(self, parcel, workers)
        if victims and version == 1:
            end(process(victims[0]))
        if begun:
            sent.append((version, len(begun), begun[0].place.number))
        return begun

    def for_now(self, seat, lost):
        lose(self, seat, lost)
        seat.vacant_until = math.inf

    def with_all(self, parcel):
        if parcel.offer.version == 2:
            self.seats[0].vacant_until = 0.0
            wait_until("both serve", lambda: self._tend() or all(map(self._ready, self.seats)))
        update(self, parcel)

    monkeypatch.setattr(Broadcasting, "offers", striking)
    monkeypatch.setattr(Engines, "update", with_all)
    monkeypatch.setattr(Engines, "_lose", for_now)
    ours = run_in(tmp_path, placement=PLACED, engine={"transfer": "broadcast"}, **changes)
    for row, other in zip(ours[:5], expected[:5], strict=True):
        assert row["reward/mean"] == other["reward/mean"] and row["version"] == other["version"]
        # Rows that are computed together with others are rounded otherwise.
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    # Of the last version the run does not wait for.
    assert [(version, size) for version, size, _ in sent if version < 4] == [
        (0, 2), (1, 2), (1, 1), (1, 1), (2, 2), (3, 2), (3, 1)
    ], "the one that lives takes what broke off, and the one that is new before it serves"  # fmt: skip
    numbers = [number for _, size, number in sent if size == 2]
    assert numbers[0] == numbers[1] < numbers[2] == numbers[3], "the group stays while its members do"
    assert len(set(pids(tmp_path / "run", "engine"))) == 3


@needs_ray
@pytest.mark.parametrize(("struck", "said"), [
    (signal.SIGKILL, r"learner 0 \(node \w+ at [\d.]+, pid \d+\) died during `\w+`"),
    (signal.SIGSTOP, r"learner 0 \(node \w+ at [\d.]+, pid \d+\) did not finish `send` within 300 s "
                     r"\(placement\.engine_timeout_s; raise it where more is needed\); its log: "),
])  # fmt: skip
def test_a_learner_that_is_lost_while_it_sends_ends_the_run_behind_a_checkpoint(
    tmp_path, monkeypatch, struck, said
):
    """Two learners, of which the first sends, while the run waits for answers; the time for that is up at once."""
    from tandem.placement.cluster.broadcast import Broadcasting

    offers, take, hit, waits = Broadcasting.offers, AheadStream.take, [], threading.Event()

    def striking(self, parcel, workers):
        strikes = parcel.offer.version == 2 and not hit
        assert not strikes or waits.wait(60)
        begun = offers(self, parcel, workers)
        if strikes:
            hit.append(process(self.learner))
            os.kill(hit[0], struck)
            self._sending.began -= self.run.placement.engine_timeout_s
        return begun

    def waiting(self, version):
        if version == 2:
            waits.set()
        return take(self, version)

    monkeypatch.setattr(Broadcasting, "offers", striking)
    monkeypatch.setattr(AheadStream, "take", waiting)
    changes = {"steps": 3, "eval": {"every": None}, "checkpoint": {"every": 1}}
    placed = {"placement": PLACED | {"engines": 1, "learners": 2}, "engine": {"transfer": "broadcast"}}
    with pytest.raises(RunError, match=rf"{said}(?s:.)*goes on from its last checkpoint in {tmp_path}"):
        run_in(tmp_path, **placed, **changes)
    workers = [pid for role in ("learner", "engine") for pid in pids(tmp_path / "run", role)]
    assert len(workers) == 3 and hit[0] in workers and not any(map(psutil.pid_exists, workers))
    assert newest(tmp_path / "run" / "checkpoints", strict=True) is not None


@needs_ray
def test_what_breaks_off_too_often_ends_the_run_whose_learners_are_whole(tmp_path):
    """Once of a version is told once, whoever tells it; the next version begins anew."""
    from tandem.placement.cluster.broadcast import Broadcasting
    from tandem.placement.cluster.lost import EnginesLost

    class Severed:
        def meet(self, number, size, timeout_s):
            return Meeting(number=number, host="", port=0, first_rank=1, size=size, timeout_s=timeout_s)

        def send(self, offer):
            raise RoadBroken("it broke off at tensor w")

    run = load(recipe(tmp_path, placement=PLACED | {"restarts": 1}, engine={"transfer": "broadcast"}))
    road = Broadcasting(ThreadWorker(Severed(), "learner 0"), run)

    def broken(version):
        assert road.offers(parcel(version), ["engine 0"])[0].place.size == 2
        road._sending.future.exception()
        assert not road.waits(others_on_their_way=False)
        road.broke(RoadBroken("engine 0 has a part of it"))

    broken(1)
    broken(2)
    with pytest.raises(
        EnginesLost, match=r"version 2 of the weights broke off 2 times .*restarts=1.* tensor w"
    ):
        broken(2)


def test_ways_that_lead_nowhere_are_refused_before_anything_starts(tmp_path):
    for placement, engine, model, said in (
        ({"kind": "inline"}, {}, {}, "placement.kind=inline weights travel by auto, memory, files"),
        ({"kind": "colocated"}, {}, {}, "needs a device for each"),
        ({"kind": "apart"}, {"kind": "vllm"}, {"lora": {"rank": 4}}, "vLLM reads adapters"),
        (
            {"kind": "apart"},
            {"kind": "vllm", "transfer": "auto"},
            {"lora": {"rank": 4}},
            "set model.path instead",
        ),
        ({"kind": "inline"}, {"transfer": "auto", "dtype": "bf16"}, {}, "the trainer's own weights"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(recipe(
                tmp_path, placement=placement, engine={"transfer": "broadcast", **engine}, model=model
            ))  # fmt: skip
