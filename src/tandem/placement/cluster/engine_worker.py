"""An engine in a process of its own: it samples from a copy of the weights, and only from the version asked for."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tandem.config.run import Run
from tandem.device import pick
from tandem.engine import Completion, Pause, Request, SamplingParams
from tandem.engine.ipc import IpcRoad
from tandem.engine.receiver import ReceivingEngine
from tandem.engine.roads import BroadcastRoad, FilesRoad, Meeting, Road
from tandem.engine.vllm import VllmEngine
from tandem.engine.weights import Offer
from tandem.errors import RunError
from tandem.model import LanguageModel, load, tokenizer_of
from tandem.model.load import DTYPES, existing
from tandem.model.new import new_network
from tandem.model.parallel.load import empty_network
from tandem.placement.cluster.objects import ArrivedWeights, ObjectsRoad
from tandem.placement.cluster.process import Process
from tandem.placement.copied import vllm_engine


class Abandoned(RunError):
    """The answers are no longer wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an engine is."""

    tokens: int
    answers: list[tuple[int, Completion]]
    """Done since the last question, by the places of their requests."""


class EngineWorker(Process):
    def __init__(self, log: str, run: Run) -> None:
        super().__init__(log, run)
        self._number = self._tokens = self._wanted = self._abandoned = 0
        self._finished: list[tuple[int, Completion]] = []
        self._engine: ReceivingEngine | VllmEngine | None = None
        self._meeting: Meeting | None = None

    @property
    def engine(self) -> ReceivingEngine | VllmEngine:
        assert self._engine is not None, "`build` makes the engine"
        return self._engine

    def build(self) -> str:
        """Make the engine; returns the place of this process."""
        make = vllm if self.run.engine.kind == "vllm" else embedded
        self._engine = make(self.run, self.log)
        return self.place()

    def update(self, offer: Offer, probe: tuple[int, ...] | None) -> tuple[float, ...] | None:
        """Take a version of the weights; returns the log-probabilities of the tokens of the probe, if there is one."""
        if offer.road == "broadcast":
            self._join(offer.place)
        elif isinstance(self.engine, ReceivingEngine):
            self.engine.road = reading_end(offer.road, self.engine.model.device)
        if offer.road == "objects" and isinstance(self.engine, VllmEngine):
            # vLLM's own workers are not Ray's: they read files.
            with closing(FilesRoad(self.log.with_suffix(".weights"))) as road:
                self.engine.update(road.offer(offer.version, ArrivedWeights(offer), verify=offer.verify))
        else:
            self.engine.update(offer)
        return None if probe is None else self.engine.score([probe])[0]

    def generate(
        self, number: int, requests: Sequence[Request], params: SamplingParams, version: int
    ) -> list[Completion]:
        """As the engine does, from the weights of `version`; refused where it has others. `number` is the call's."""
        if self.engine.version != version:
            raise RunError(f"the engine has version {self.engine.version} of the weights, not {version}")
        self._finished, self._tokens, self._number = [], 0, number
        return self.engine.generate(requests, params, poll=self._note, on_done=self._keep)

    def progress(self, number: int, heard: int) -> Progress:
        """Of the call of that number, whose first `heard` answers are known."""
        if number != self._number:
            return Progress(tokens=0, answers=[])
        return Progress(tokens=self._tokens, answers=self._finished[heard:])

    def pause(self, version: int) -> None:
        """Calls that sample from older weights than these end between two tokens, with their answers as far as they
        are."""
        self._wanted = version

    def abandon(self, number: int) -> None:
        """End the call of that number and those before it, under way or to come: methods may begin in another order
        than they were asked for."""
        self._abandoned = max(self._abandoned, number)

    def sleep(self) -> None:
        """Give the device's memory to the learner beside it; the next version of the weights wakes the engine."""
        self.engine.sleep()

    def close(self) -> None:
        """vLLM's own processes, which would be a moment behind this one, end now."""
        if isinstance(self._engine, VllmEngine):
            self._engine.close()
            self._engine = None

    def _keep(self, index: int, completion: Completion) -> None:
        self._finished.append((index, completion))

    def _join(self, meeting: Meeting) -> None:
        """Be in the group of a broadcast."""
        if meeting == self._meeting:
            return
        self._meeting = None
        if isinstance(self.engine, ReceivingEngine):
            place = (meeting.host, meeting.port, meeting.first_rank, meeting.size)
            road = BroadcastRoad(*place, self.engine.model.device, meeting.timeout_s)
            road.connect()
            self.engine.road = road
        else:
            self.engine.connect("broadcast", **{k: v for k, v in asdict(meeting).items() if k != "number"})
        self._meeting = meeting

    def _note(self, done: int, tokens: int) -> None:
        self._tokens = tokens
        if self._number <= self._abandoned:
            raise Abandoned("the answers are no longer wanted")
        if self.engine.version < self._wanted:
            raise Pause


def reading_end(road: str, device: torch.device) -> Road:
    """Of a road that needs no meeting."""
    match road:
        case "ipc":
            return IpcRoad(device)
        case "objects":
            return ObjectsRoad()
        case _:
            return FilesRoad()


def embedded(run: Run, log: Path) -> ReceivingEngine:
    config = run.model.model_copy(update={"dtype": run.engine_dtype})
    model = load(config, tokenizer_of(config), pick(run.device), seed=run.seed)
    return ReceivingEngine(model, FilesRoad(), run.sampling.slots, run.learner.room())


def without_weights(run: Run) -> LanguageModel:
    """The policy without an adapter, none of whose weights is read."""
    config, tokenizer = run.model, tokenizer_of(run.model)
    if config.new is not None:
        return LanguageModel(new_network(config.new, tokenizer, run.seed), tokenizer, "model.new")
    source = existing(config.path)
    network = empty_network(source, DTYPES[config.dtype], config.trust_remote_code)
    return LanguageModel(network, tokenizer, source)


def vllm(run: Run, log: Path) -> VllmEngine:
    engine = vllm_engine(run, without_weights(run), log.with_suffix(".model"))
    if run.engine.transfer != "broadcast":
        engine.connect("ipc" if run.engine.transfer == "ipc" else "files")
    return engine
