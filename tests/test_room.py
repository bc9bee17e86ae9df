"""Room and start-up on one Ray of this process: what cannot begin says so in time, and names what it waited for."""

import os
import signal
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from small_recipe import recipe
from tandem.config import load
from tandem.config.placement import Placement
from tandem.errors import ConfigError, RunError
from tandem.placement.cluster import guard
from tandem.placement.cluster.build import ray_port
from tandem.placement.cluster.lost import EnginesLost

if TYPE_CHECKING:
    from tandem.placement.cluster.port import Cluster

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

PLACED = {"kind": "apart", "cpus": 1, "restarts": 0}
ROOM = {"CPU": 1.0, "GPU": 0.0}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator["Cluster"]:
    """Of four cores or more."""
    port = ray_port(alone=True)
    cluster = port.Cluster(Placement(kind="apart"), 4, tmp_path_factory.mktemp("cluster") / "logs")
    yield cluster
    cluster.close()


def test_gpus_that_an_own_ray_has_not_are_refused_at_once(cluster, tmp_path, caplog):
    """Nobody joins it, so nothing is waited for."""
    from tandem.placement.cluster.places import Placed

    there = cluster.gpus
    run = load(recipe(tmp_path, placement=PLACED | {"gpus": there + 1, "start_timeout_s": 1}))
    cluster.placement = run.placement
    with pytest.raises(
        ConfigError,
        match=rf"^the placement asks for {2 * there + 2:g} GPU in all and the cluster has {there:g}; "
        "lower placement.learners, .* or placement.gpus",
    ):
        Placed(run, cluster, tmp_path, None, None)
    assert "waits" not in caplog.text


def test_room_that_others_keep_ends_the_wait_with_what_is_needed_and_free(cluster):
    from tandem.placement.cluster import port

    cores = port.cluster_resources()["CPU"]
    others = port.placement_group([{"CPU": cores - 1}])
    assert others.wait(30)
    cluster.placement = Placement(kind="apart", start_timeout_s=0.5)
    with pytest.raises(
        RunError,
        match=r"^no room on the cluster within placement.start_timeout_s=0.5: "
        "2 CPU needed, up to 1 on one node, 1 free on all; another run may hold the rest",
    ):
        cluster.reserve([ROOM] * 2)
    port.remove_placement_group(others)


def hanging(worker: type) -> type:
    class Hanging(worker):
        def build(self):
            threading.Event().wait(60)

    return Hanging


def broken(worker: type) -> type:
    class Broken(worker):
        def build(self):
            raise RuntimeError("no memory for it")

    return Broken


@pytest.mark.parametrize(("other", "limit_s", "said"), [
    (
        hanging,
        0.5,
        r"did not finish `build` within 0\.5 s \(placement\.start_timeout_s; raise it where more is needed\); "
        r"its log: \S+engine-0.log",
    ),
    (broken, 60, r"failed in `build`; its log: \S+engine-0.log\n[\s\S]*RuntimeError: no memory for it"),
])  # fmt: skip
def test_an_engine_that_is_not_made_ends_the_run_with_its_node(cluster, tmp_path, other, limit_s, said):
    from slow_engines import parcel
    from tandem.placement.cluster import port
    from tandem.placement.cluster.broadcast import Reading
    from tandem.placement.cluster.engine_worker import EngineWorker
    from tandem.placement.cluster.engines import Engines

    run = load(recipe(tmp_path, placement=PLACED | {"start_timeout_s": limit_s}))
    cluster.placement = Placement(kind="apart")
    cluster.reserve([ROOM])
    node = next(iter(port.nodes_of(cluster._places[0][0]).values()))

    def spawn(number: int) -> port.Worker:
        return cluster.spawn(other(EngineWorker), f"engine {number}", 0, ROOM, 2, run)

    idle = lambda: None  # noqa: E731
    engines = Engines(spawn, lambda number: "", run.placement, Reading(None, None), idle, idle)
    with pytest.raises(
        EnginesLost,
        match=r"^engine 0 was lost 1 times in a row \(placement.restarts=0\). "
        rf"The last time: engine 0 \(node {node[:8]}\) {said}",
    ):
        engines.update(parcel(0))


def test_a_guard_that_hangs_keeps_no_run_from_its_end(monkeypatch, caplog):
    monkeypatch.setattr(guard, "CLOSE_S", 0.5)
    hung = guard.Guard()
    os.kill(hung._process.pid, signal.SIGSTOP)
    closing = threading.Thread(target=hung.close)
    closing.start()
    closing.join(20)
    ended = not closing.is_alive()
    hung._process.kill()
    closing.join()
    assert ended and f"the guard, process {hung._process.pid}, did not end" in caplog.text


def test_a_run_goes_on_without_a_guard_that_is_gone(tmp_path, caplog):
    gone = guard.Guard()
    gone._process.kill()
    gone._process.wait()
    gone.remove(tmp_path)
    gone.close()
    assert f"the guard, process {gone._process.pid}, is gone" in caplog.text
