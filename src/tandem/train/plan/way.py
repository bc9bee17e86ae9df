"""A learner's and an engine's end of a road in one process, to see how long weights take on it."""

from concurrent.futures import ThreadPoolExecutor

import torch

from tandem.engine.ipc import IpcRoad
from tandem.engine.probe import probe_of
from tandem.engine.receiver import ReceivingEngine
from tandem.engine.roads import BroadcastRoad, FilesRoad, MemoryRoad, Road
from tandem.engine.weights import ModelWeights
from tandem.model import LanguageModel

CPU, HERE = torch.device("cpu"), "127.0.0.1"


class Way:
    """From one model to another of the same sizes, whose weights it replaces, by `memory`, `ipc`, `files` or
    `broadcast`."""

    def __init__(self, road: str, sender: LanguageModel, receiver: LanguageModel) -> None:
        self.sender, self.dtype = sender, receiver.network.dtype
        self._weights = ModelWeights(sender, self.dtype)
        self._sending, theirs = broadcast() if road == "broadcast" else rereadable(road)
        self._engine = ReceivingEngine(receiver, theirs, slots=1)
        self._version = 0

    def close(self) -> None:
        if not isinstance(self._sending, MemoryRoad):
            self._sending.close()

    @property
    def nbytes(self) -> int:
        """Of a version."""
        return sum(tensor.nbytes for _, tensor in self._weights)

    def send(self, verify: bool) -> None:
        """The engine takes the next version."""
        self._version += 1
        offer = self._sending.offer(self._version, self._weights, verify=verify)
        if not isinstance(self._sending, BroadcastRoad):
            self._engine.update(offer)
            return
        with ThreadPoolExecutor(1) as beside:
            taken = beside.submit(self._engine.update, offer)
            self._sending.send(offer, self._weights)
            taken.result()

    def probe(self) -> None:
        """Both say the same of the probe. RunError where they do not."""
        probe = probe_of(self.sender, self.dtype)
        probe.check("the engine", self._version, self._engine.score([probe.tokens])[0])


def rereadable(road: str) -> tuple[MemoryRoad | IpcRoad | FilesRoad, Road]:
    """Both ends."""
    match road:
        case "memory":
            return MemoryRoad(), MemoryRoad()
        case "ipc":
            return IpcRoad(CPU), IpcRoad(CPU)
        case _:
            return FilesRoad(), FilesRoad()


def broadcast() -> tuple[BroadcastRoad, BroadcastRoad]:
    """Both ends, which have met."""
    ours = BroadcastRoad(HERE, 0, 0, 2, CPU)
    theirs = BroadcastRoad(HERE, ours.port, 1, 2, CPU)
    with ThreadPoolExecutor(1) as beside:
        joined = beside.submit(theirs.connect)
        ours.connect()
        joined.result()
    return ours, theirs
