"""Who sits where: bundles of devices, one per worker, or per engine and the learners on its devices, and the workers on
them."""

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path

from tandem.config.run import Run
from tandem.errors import ConfigError
from tandem.placement.cluster.ahead import Line
from tandem.placement.cluster.broadcast import Broadcasting, Reading
from tandem.placement.cluster.carried import pack
from tandem.placement.cluster.engine_worker import EngineWorker
from tandem.placement.cluster.engines import Engines
from tandem.placement.cluster.guard import Guard
from tandem.placement.cluster.learner_worker import Facts, LearnerWorker
from tandem.placement.cluster.learners import (
    InUnits,
    Learners,
    Meanwhile,
    RemoteActor,
    RemoteCritic,
    RemoteReference,
    RemoteRewardModel,
)
from tandem.placement.cluster.limit import start_limit
from tandem.placement.cluster.port import Cluster, Worker
from tandem.rollout import Sampler


def cpus(run: Run) -> int:
    """Cores of all workers together."""
    placement = run.placement
    return placement.cpus * (placement.learners + placement.engines * run.engine.tensor_parallel)


class Placed:
    """The workers of a run."""

    def __init__(self, run: Run, cluster: Cluster, root: Path, line: Line, guard: Guard) -> None:
        self.run, self.cluster, self.root, self.line = run, cluster, root, line
        placement = run.placement
        self._learner, self._engine = needs(run, cluster.gpus)
        self._gpus: list[list[str]] = []
        """Of each learner, where engines share them."""
        if self.shared:
            wide = run.engine.tensor_parallel
            all_of_them = {kind: wide * self._learner[kind] + self._engine[kind] for kind in self._learner}
            cluster.reserve([all_of_them] * placement.engines)
        else:
            cluster.reserve([self._learner] * placement.learners + [self._engine] * placement.engines)
        workers = [self._spawn_learner(rank) for rank in range(placement.learners)]
        self.learners = Learners(workers, run, self._learners_turn if self.shared else nothing)
        road = (Broadcasting if run.engine.transfer == "broadcast" else Reading)(workers[0], run)
        turn = self.learners.sleep if run.learner.sleep else nothing
        self.engines = Engines(self._spawn_engine, self._lacks, placement, road, turn, guard.watch)

    @property
    def shared(self) -> bool:
        return self.run.placement.kind == "colocated"

    def build_learners(self, start: Path | None, reference: Path | None) -> Facts:
        """Load the models of all learners. Engines on devices of their own are made meanwhile; one that shares a device
        measures what is left of it."""
        check_road(self.run, self.cluster.nodes)
        if not self.shared:
            self.engines.fill()
        limit = start_limit(self.run.placement)
        for worker in self.learners.workers:
            worker.place = worker.call("place").result(limit)
        if self.shared:
            self._gpus = [worker.call("gpus").result(limit) for worker in self.learners.workers]
        # No folder in the memory of one node is seen by another; of a folder that the user names we trust that it is.
        apart = self.cluster.nodes > 1 and self.run.engine.transfer == "auto"
        root = None if apart else str(self.root)
        address = self.learners.workers[0].call("meeting_point").result(limit)
        self.learners.see_folders = self._are_seen(Path(self.run.run_dir).absolute())
        give = (lambda folder: str(folder.absolute())) if self.learners.see_folders else pack
        folders = [None if folder is None else give(folder) for folder in (start, reference)]
        return self.learners.call("build", address, *folders, root, limit=limit)

    def _are_seen(self, folder: Path) -> bool:
        """Whether every learner sees the files of a folder of this process."""
        with tempfile.NamedTemporaryFile(prefix=".seen-", dir=folder) as file:
            calls = [worker.call("sees", file.name) for worker in self.learners.workers]
            return all(call.result(start_limit(self.run.placement)) for call in calls)

    def close_learners(self) -> None:
        """Remove the weights that lie on the road, which a learner that is gone cannot. Then nobody waits for one."""
        self.learners.workers[0].call("close").settle(5.0)
        for worker in self.learners.workers:
            worker.kill()

    def actor(self, facts: Facts) -> RemoteActor:
        return RemoteActor(self.learners, facts)

    def reference(self) -> RemoteReference:
        return RemoteReference(self.learners)

    def critic(self) -> RemoteCritic:
        return RemoteCritic(self.learners)

    def beside_sampling(self, sampler: Sampler, works: Sequence[InUnits]) -> None:
        """Have learners do these while engines sample, where they can."""
        if works and Meanwhile.helps(self.run):
            sampler.on_group = Meanwhile(self.run, works)

    def reward_model(self) -> RemoteRewardModel:
        return RemoteRewardModel(self.learners, self.engines.sleep if self.shared else None)

    def _learners_turn(self) -> None:
        # What went wrong in the line is told to whoever takes the next groups; learners can still save what they have.
        wait([self.line.submit(self.engines.sleep)])
        if self.line.failed:
            self.engines.end()

    def _spawn_learner(self, rank: int) -> Worker:
        bundle = rank // self.run.engine.tensor_parallel if self.shared else rank
        return self.cluster.spawn(LearnerWorker, f"learner {rank}", bundle, self._learner, 1, self.run, rank)

    def _spawn_engine(self, number: int) -> Worker:
        wide = self.run.engine.tensor_parallel
        gpus = [gpu for held in self._gpus[number * wide : (number + 1) * wide] for gpu in held]
        # One thread works, the other says how far it is.
        return self.cluster.spawn(
            EngineWorker, f"engine {number}", self._bundle(number), self._engine, 2, self.run, gpus=gpus
        )

    def _lacks(self, number: int) -> str:
        if self.cluster.has_room(self._bundle(number)):
            return ""
        return " and ".join(f"{amount:g} {kind}" for kind, amount in self._engine.items() if amount)

    def _bundle(self, number: int) -> int:
        return number if self.shared else self.run.placement.learners + number


def needs(run: Run, gpus_there: float) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """What a learner and an engine take; one that shares its devices uses those that its learners hold."""
    placement, devices = run.placement, run.engine.tensor_parallel
    auto = 1.0 if gpus_there and run.device != "cpu" else 0.0
    gpus = auto if placement.gpus is None else placement.gpus
    own = 0.0 if placement.kind == "colocated" else gpus
    learner = {"CPU": float(placement.cpus), "GPU": gpus}
    return learner, {"CPU": float(placement.cpus * devices), "GPU": own * devices}


def check_road(run: Run, nodes: int) -> None:
    """ConfigError where weights would go through a folder that only one node has."""
    if nodes > 1 and run.engine.transfer == "files" and run.engine.transfer_dir is None:
        raise ConfigError(
            f"engine.transfer=files: the processes are on {nodes} nodes, which share no memory; set "
            "engine.transfer_dir to a folder that all of them see, or engine.transfer=auto"
        )


def nothing() -> None:
    """Who shares no device need not ask for its turn."""
