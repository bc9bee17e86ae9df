"""Everything that names Ray: a cluster to be in, workers to be placed on it, and waiting for what they do.

Imported only where a run is placed with Ray.
"""

import logging
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ray import (
    ObjectRef,
    __version__,
    available_resources,
    cluster_resources,
    exceptions,
    get,
    get_runtime_context,
    init,
    is_initialized,
    kill,
    method,
    put,
    remote,
    shutdown,
    wait,
)
from ray.util import get_node_ip_address
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.text import Text

from tandem.config.placement import Placement
from tandem.engine.roads import RoadBroken
from tandem.errors import ConfigError, DataError, RunError
from tandem.libraries import import_libraries
from tandem.placement.cluster.limit import Limit
from tandem.placement.cluster.lost import WorkerLost, last_words

log = logging.getLogger("tandem.cluster")
T = TypeVar("T")

RAY_VERSION = __version__
STORE_BYTES = 200 << 20
"""Of a Ray that a run starts for itself: batches and answers pass through it, weights do not."""
FETCH_S = 600.0
"""Longest wait for an object that another node has."""
RETAKE_S = 5.0
"""Longest wait for room that was given back a moment ago."""
SILENT_S = 5.0
"""Of a wait for room that need not be told."""
PREPARE = f"{import_libraries.__module__}.{import_libraries.__qualname__}"
"""Called in each worker's process before its role is made."""
LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.OwnerDiedError,
    exceptions.ObjectLostError,
    exceptions.NodeDiedError,
    exceptions.LocalRayletDiedError,
    exceptions.OutOfMemoryError,
)
OWN = (ConfigError, DataError, RunError)
BESIDE, PULSE = "beside", "pulse"


def beside(work: Callable[..., T]) -> Callable[..., T]:
    """A method of a role that does not wait for the one under way; those of this kind go one by one."""
    return method(concurrency_group=BESIDE)(work)


def pulse(work: Callable[..., T]) -> Callable[..., T]:
    """A method that waits for no other, neither for one beside: where it is not answered the process is stuck."""
    return method(concurrency_group=PULSE)(work)


class Worker:
    """A process that holds one role."""

    def __init__(self, actor: Any, name: str, log: Path) -> None:
        self._actor, self.name, self.log = actor, name, log
        self.place = "place not known yet"

    def __str__(self) -> str:
        return f"{self.name} ({self.place})"

    def call(self, method: str, *arguments: Any) -> "Call":
        """Start a method of the role; methods are written out where they are used."""
        return Call(self, method, getattr(self._actor, method).remote(*arguments))

    def kill(self) -> None:
        kill(self._actor, no_restart=True)


class Call:
    """A method under way."""

    def __init__(self, worker: Worker, method: str, ref: ObjectRef) -> None:
        self.worker, self.method, self.ref = worker, method, ref
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def done(self) -> bool:
        return bool(wait([self.ref], timeout=0)[0])

    def result(self, limit: Limit) -> Any:
        """Its value, waited for until its time is up. WorkerLost where it is, or the process is gone; an error inside
        comes with role, node and traceback."""
        try:
            return get(self.ref, timeout=max(0.0, limit.seconds - self.seconds))
        except exceptions.GetTimeoutError:
            raise WorkerLost(
                f"{self.worker} did not finish `{self.method}` {limit}; its log: {self.worker.log}"
            ) from None
        except exceptions.RayTaskError as error:
            raise failure(self.worker, self.method, error) from None
        except LOST as error:
            raise WorkerLost(died(self.worker, self.method, error)) from None

    def settle(self, timeout_s: float) -> None:
        """Wait for its end, whatever that is."""
        wait([self.ref], timeout=timeout_s)


def first_done(calls: Sequence[Call], timeout_s: float) -> list[Call]:
    """Those that are done after at most so long; returns as soon as there is one."""
    refs = {call.ref: call for call in calls}
    done, _ = wait(list(refs), num_returns=1, timeout=timeout_s)
    return [refs[ref] for ref in done]


def failure(worker: Worker, method: str, error: exceptions.RayTaskError) -> Exception:
    """Our own errors keep their kind and their words; of any other, everything is told."""
    if isinstance(error.cause, OWN):
        return type(error.cause)(f"{worker}: {error.cause}")
    # Where it is an instance of its cause's class as well, what it says of itself holds the traceback. Ray colours it.
    told = Text.from_ansi(vars(error).get("traceback_str") or str(error)).plain
    return WorkerLost(f"{worker} failed in `{method}`; its log: {worker.log}\n{told.strip()}")


def died(worker: Worker, method: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{worker} died during `{method}`: {reason[:600]}{last_words(worker.log)}"


def share(value: Any) -> Any:
    """A value that several workers get: stored once, taken by each."""
    return put(value)


def fetch(shared: Any) -> Any:
    """What was shared; RunError where it cannot be had, RoadBroken where it is gone with the process that shared it."""
    try:
        return get(shared, timeout=FETCH_S)
    except exceptions.ObjectLostError:
        raise RoadBroken("what it was to read is gone with the process that shared it") from None
    except exceptions.RayError as cause:
        raise RunError(f"an object of the run cannot be fetched from Ray's memory: {cause}") from cause


class Cluster:
    """Ray, joined or started; `reserve` room for every worker of the run, then `spawn` them."""

    def __init__(self, placement: Placement, cpus: int, logs: Path) -> None:
        self.placement, self.logs = placement, logs
        self._places: list[tuple[PlacementGroup, int]] = []
        """Of each bundle: its group, and its number there."""
        join(placement, cpus)

    @property
    def gpus(self) -> float:
        return cluster_resources().get("GPU", 0)

    def reserve(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """One bundle per place for a worker, or for an engine and the learners on its devices."""
        await_resources(self.placement, bundles)
        self._places = reserve(self.placement, bundles)

    @property
    def nodes(self) -> int:
        """On which the reserved bundles lie."""
        return len({nodes_of(group)[index] for group, index in self._places})

    def has_room(self, bundle: int) -> bool:
        """Whether a bundle lies on a node; one of a lost node does again when another has room for it."""
        group, index = self._places[bundle]
        return bool(nodes_of(group)[index])

    def spawn(
        self,
        role: type,
        name: str,
        bundle: int,
        need: Mapping[str, float],
        threads: int,
        *arguments: Any,
        gpus: Sequence[str] = (),
    ) -> Worker:
        """Start a worker whose methods run in so many threads; beside what it needs it uses these GPUs, which others
        hold. It is still being made when this returns; errors of that show in its first call."""
        log = self.logs / f"{name.replace(' ', '-')}.log"
        # An engine of several devices takes cores for its own workers, each of which reads this.
        environ = {"OMP_NUM_THREADS": str(self.placement.cpus)}
        if gpus:
            # Older versions of Ray hide all GPUs from a worker that holds none, unless they are told this.
            environ |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        group, index = self._places[bundle]
        actor = (
            remote(concurrency_groups={BESIDE: 1, PULSE: 1})(role)
            .options(
                num_cpus=need["CPU"],
                num_gpus=need["GPU"],
                max_restarts=0,
                max_concurrency=threads,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=index
                ),
                runtime_env={"env_vars": environ},
            )
            .remote(str(log), *arguments)
        )
        worker = Worker(actor, name, log)
        if node := nodes_of(group)[index]:
            # More is known when the worker tells it, which one that breaks while it is made never does.
            worker.place = f"node {node[:8]}"
        return worker

    def close(self) -> None:
        shutdown()


def join(placement: Placement, cpus: int) -> None:
    """Be in the cluster of `placement.address`, or start one on this machine, with its ports as in `build.loopback`."""
    if is_initialized():
        raise RunError("this process is in a Ray cluster already; call ray.shutdown() before the run")
    common: dict[str, Any] = {
        "namespace": f"tandem-{secrets.token_hex(6)}",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
        "runtime_env": {"worker_process_setup_hook": PREPARE},
    }
    if placement.address is not None:
        where: dict[str, Any] = {"address": placement.address}
    else:
        # More workers than cores are only slow, never impossible.
        where = {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, cpus),
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
        }
    # Ray ends the process at a signal; the run saves a checkpoint first.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        init(**where, **common)
    except (ConnectionError, exceptions.RayError, RuntimeError, ValueError, TimeoutError) as cause:
        raise ConfigError(
            f"placement.address={placement.address or 'null'}: Ray cannot be reached or started: {cause}. On every "
            "machine of a cluster, RAY_AUTH_MODE=token and the same token must be set; see docs/cluster.md"
        ) from cause
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def await_resources(placement: Placement, bundles: Sequence[Mapping[str, float]]) -> None:
    """A cluster that was joined may still lack nodes, which are waited for. What a Ray of the run's own cannot give is
    an error now."""
    limit = placement.start_timeout_s if placement.address is not None else 0.0
    deadline, said = time.monotonic() + limit, False
    while short := too_few(bundles):
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"{short}; lower placement.learners, placement.engines, placement.cpus or placement.gpus, or add nodes"
            )
        if not said:
            log.warning("%s; waits up to %.0f s for nodes that join", short, limit)
            said = True
        time.sleep(0.2)


def too_few(bundles: Sequence[Mapping[str, float]]) -> str:
    """What all nodes together cannot give, in words; empty where they can."""
    have = cluster_resources()
    for kind in ("CPU", "GPU"):
        need = sum(bundle.get(kind, 0) for bundle in bundles)
        if need > have.get(kind, 0):
            return f"the placement asks for {need:g} {kind} in all and the cluster has {have.get(kind, 0):g}"
    return ""


def reserve(placement: Placement, bundles: Sequence[Mapping[str, float]]) -> list[tuple[PlacementGroup, int]]:
    """Room for all bundles or for none, where Ray's strategy puts them. What a group has lost is re-placed only all at
    once: where engines may be lost and learners not, each has a group of its own."""
    wanted = [{kind: amount for kind, amount in bundle.items() if amount} for bundle in bundles]
    deadline = time.monotonic() + placement.start_timeout_s
    while True:
        group = placement_group(wanted, strategy="SPREAD" if placement.spread else "PACK")
        if not placed_until(group, wanted, deadline):
            raise RunError(
                f"no room on the cluster within placement.start_timeout_s={placement.start_timeout_s:g}: "
                f"{asked_and_free(wanted)}; another run may hold the rest"
            )
        if placement.kind == "colocated" or len(set(nodes_of(group).values())) == 1:
            return [(group, index) for index in range(len(wanted))]
        if groups := separate(group, wanted):
            return [(single, 0) for single in groups]


def placed_until(group: PlacementGroup, wanted: Sequence[Mapping[str, float]], deadline: float) -> bool:
    """Wait for the places of a group, and say so where that takes a while."""
    left = deadline - time.monotonic()
    if group.wait(math.ceil(max(min(left, SILENT_S), 1))):  # Ray counts whole seconds.
        return True
    left = deadline - time.monotonic()
    if left > 0:
        log.warning("waits up to %.0f s for room on the cluster: %s", left, asked_and_free(wanted))
    return bool(group.wait(math.ceil(max(left, 1))))


def asked_and_free(wanted: Sequence[Mapping[str, float]]) -> str:
    free, said = available_resources(), []
    for kind in ("CPU", "GPU"):
        parts = [bundle[kind] for bundle in wanted if kind in bundle]
        if parts:
            said.append(
                f"{sum(parts):g} {kind} needed, up to {max(parts):g} on one node, {free.get(kind, 0):g} free on all"
            )
    return " and ".join(said)


def separate(group: PlacementGroup, bundles: Sequence[Mapping[str, float]]) -> list[PlacementGroup]:
    """In place of a group one for each of its bundles, on the same node; none where another run took the room."""
    nodes, free = nodes_of(group), available_resources()
    remove_placement_group(group)
    # Until the nodes have reported, Ray takes the room for occupied, and would turn to other nodes.
    back = {
        kind: free.get(kind, 0) + sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU")
    }
    patience = time.monotonic() + RETAKE_S
    while time.monotonic() < patience:
        now = available_resources()
        # Sums of parts are not exact.
        if all(now.get(kind, 0) > back[kind] - 1e-3 for kind in back):
            break
        time.sleep(0.02)
    # A target and no more: where its node is lost a bundle goes to any other.
    groups = [
        placement_group([bundle], strategy="STRICT_PACK", _soft_target_node_id=nodes[index])
        for index, bundle in enumerate(bundles)
    ]
    if all(each.wait(RETAKE_S) for each in groups):
        return groups
    for each in groups:
        remove_placement_group(each)
    return []


def nodes_of(group: PlacementGroup) -> Mapping[int, str]:
    """Where its bundles lie; an empty name while one has no place."""
    return placement_group_table(group)["bundles_to_node_id"]


def whereabouts() -> str:
    """Of the worker that asks: node and process."""
    context = get_runtime_context()
    return f"node {context.get_node_id()[:8]} at {get_node_ip_address()}, pid {os.getpid()}"


def own_gpus() -> list[str]:
    """Those that Ray gave to the worker that asks, as CUDA_VISIBLE_DEVICES names them."""
    return list(get_runtime_context().get_accelerator_ids()["GPU"])


def own_address() -> str:
    """Of the worker's node, as the other nodes reach it."""
    return str(get_node_ip_address())
