"""One of the processes that train: all roles but the engine, and the sending end of the weights' road."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tandem.config.run import Run
from tandem.device import describe, give_back, pick
from tandem.engine.ipc import IpcRoad, joined
from tandem.engine.probe import probe_of
from tandem.engine.roads import FilesRoad, Meeting
from tandem.engine.weights import ModelWeights, Offer, TensorSpec, Weights, spec_of
from tandem.learner import Actor, Critic, Reference
from tandem.model import LanguageModel, load, tokenizer_of
from tandem.model.asleep import Asleep
from tandem.model.compiled import compile_blocks
from tandem.model.load import DTYPES
from tandem.model.parallel.folder import adapter_weights
from tandem.placement import ranks
from tandem.placement.cluster import port
from tandem.placement.cluster.broadcast import Sender
from tandem.placement.cluster.carried import Files, at_hand
from tandem.placement.cluster.objects import ObjectsRoad
from tandem.placement.cluster.parcel import Parcel
from tandem.placement.cluster.process import Process
from tandem.placement.inline import critic_of, reference_of, reward_model_of
from tandem.reward_model import RewardModel
from tandem.types import Batch, Experience


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the driver must know of a model that it does not have."""

    stop_tokens: frozenset[int]
    max_positions: int
    dtype: torch.dtype
    device: str


class GatheredWeights:
    """As `ModelWeights`, of a model on many processes; every process iterates, in step."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        self.model = model
        self.adapter = model.adapter
        self.dtype = None if self.adapter else dtype
        self._specs = tuple(spec_of(name, tensor, self.dtype) for name, tensor in self._whole())

    def specs(self) -> tuple[TensorSpec, ...]:
        return self._specs

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.to(self.dtype or tensor.dtype)) for name, tensor in self._whole())

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        return adapter_weights(self.model) if self.adapter else self.model.weights()


class LearnerWorker(Process):
    """All ranks are called with the same arguments, in step; what they return is that of rank 0."""

    def __init__(self, log: str, run: Run, rank: int) -> None:
        super().__init__(log, run)
        self.rank, self.world = rank, run.placement.learners
        self.reference: Reference | None = None
        self.critic: Critic | None = None
        self.reward_model: RewardModel | None = None

    def sees(self, file: str) -> bool:
        """Whether a file of the driver is there in this process."""
        return Path(file).is_file()

    def build(
        self, address: str, weights: str | Files | None, reference: str | Files | None, root: str | None
    ) -> Facts | None:
        """Load the models: the policy from `weights`, a folder, where the run has one; the ranks meet at `address`.
        Versions of the weights for the engines go below `root`, or through Ray."""
        with at_hand(weights) as start, at_hand(reference) as folder:
            self._load(address, start, folder)
        self.dtype = DTYPES[self.run.engine_dtype]
        self.weights = self._weights()
        self.road = self._sending_end(root)
        return self._facts() if self.rank == 0 else None

    def _load(self, address: str, start: Path | None, folder: Path | None) -> None:
        run = self.run
        if self.world == 1:
            model = load(run.model, tokenizer_of(run.model), pick(run.device), seed=run.seed, resume=start)
            if run.learner.compile:
                compile_blocks(model)
            self.actor = Actor(model, run)
            self.reference = reference_of(run, model, folder) if run.needs_reference else None
            self.critic = critic_of(run, model) if run.needs_critic else None
            self.reward_model = reward_model_of(run, model)
        else:
            self.actor = ranks.build_actor(run, run.learner.layout, self.rank, self.world, address, start)
            if run.needs_reference:
                self.reference = ranks.build_reference(run, run.reference.layout, self.actor, folder)
            if run.needs_critic:
                self.critic = ranks.build_critic(run, run.critic.layout, self.actor)
            if (judge := run.reward.model) is not None:
                self.reward_model = ranks.build_reward_model(run, judge.layout, self.actor)

    def logprobs(self, batch: Batch) -> Tensor | None:
        return self._first(self.actor.logprobs(batch))

    def reference_logprobs(self, batch: Batch) -> tuple[Tensor, float] | None:
        """And the seconds that they took."""
        assert self.reference is not None
        began = time.monotonic()
        logp_BT = self.reference.logprobs(batch)
        return self._first((logp_BT, time.monotonic() - began))

    def reward_scores(self, batch: Batch) -> tuple[Tensor, float] | None:
        """And the seconds that they took."""
        assert self.reward_model is not None
        return self._first(self.reward_model.timed_scores(batch))

    def update(self, parts: Sequence[Experience], kl_coef: float) -> tuple[Any, Any] | None:
        """The figures of the update, and the actor's counters after it."""
        figures = self.actor.update(parts, kl_coef)
        if self.run.placement.kind == "colocated":
            give_back(self.actor.model.device)
        return self._first((figures, self.actor.counters()))

    def values(self, batch: Batch) -> tuple[Tensor, float] | None:
        """And the seconds that they took."""
        assert self.critic is not None
        began = time.monotonic()
        value_BT = self.critic.values(batch)
        return self._first((value_BT, time.monotonic() - began))

    def update_critic(self, parts: Sequence[Experience]) -> tuple[Any, Any] | None:
        """As `update`."""
        assert self.critic is not None
        figures = self.critic.update(parts)
        return self._first((figures, self.critic.counters()))

    def restore_counters(self, saved: Mapping[str, int]) -> None:
        self.actor.restore_counters(saved)

    def refresh(self) -> None:
        assert self.reference is not None
        self.reference.refresh(self.actor)

    def offer(self, version: int, verify: bool) -> Parcel | None:
        """Put the weights as they are now on the road."""
        offer = self._offer(version, verify)
        probe = probe_of(self.actor.model, self.dtype) if verify else None
        return self._first(None if offer is None else Parcel(offer, probe))

    def sleep(self) -> int:
        """Give the device's memory to the engine beside it; returns the bytes that wait in host memory."""
        roles = (self.actor, self.reference, self.critic, self.reward_model)
        tensors = [tensor for role in roles if role is not None for tensor in role.tensors]
        self._asleep = Asleep(tensors, self.actor.model.device)
        return self._asleep.nbytes

    def wake(self) -> None:
        """Everything is where it was."""
        self._asleep.wake()

    @port.pulse
    def pulse(self) -> None:
        """It is there."""

    @port.beside
    def meet(self, number: int, size: int, timeout_s: float) -> Meeting:
        """As `Sender.meet`."""
        assert isinstance(self.road, Sender)
        return self.road.meet(number, size, timeout_s)

    @port.beside
    def send(self, offer: Offer) -> None:
        """As `Sender.send`, beside what this process computes."""
        assert isinstance(self.road, Sender)
        self.road.send(offer)

    def apply(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(actor, reference, *arguments)` where these are, and its value, of every rank."""
        return work(self.actor, self.reference, *arguments)

    def apply_critic(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """As `apply`, of `work(critic, *arguments)`."""
        return work(self.critic, *arguments)

    def close(self) -> None:
        if self.rank == 0:
            self.road.close()

    def _first(self, value: Any) -> Any:
        return value if self.rank == 0 else None

    def _offer(self, version: int, verify: bool) -> Offer | None:
        """That of rank 0, with the handles of all ranks where each shares its memory with an engine."""
        if isinstance(self.road, IpcRoad):
            offers = [self.road.offer(version, self.weights, verify=verify)] * self.world
            if self.world > 1:
                dist.all_gather_object(offers, offers[0])
            return joined(offers)
        if self.rank == 0:
            return self.road.offer(version, self.weights, verify=verify)
        for _ in self.weights:
            """All ranks gather what rank 0 sends."""
        return None

    def _sending_end(self, root: str | None) -> FilesRoad | ObjectsRoad | Sender | IpcRoad:
        # As many as may be under way while the newest is made, and that of an engine that is started anew.
        keep = self.run.sampling.max_lag + 2
        if self.run.engine.transfer == "broadcast":
            return Sender(port.own_address(), self.actor.model.device, keep)
        if self.run.engine.transfer == "ipc":
            return IpcRoad(self.actor.model.device)
        return ObjectsRoad() if root is None else FilesRoad(Path(root), keep)

    def _weights(self) -> Weights:
        if self.world > 1:
            return GatheredWeights(self.actor.model, self.dtype)
        return ModelWeights(self.actor.model, self.dtype)

    def _facts(self) -> Facts:
        model = self.actor.model
        return Facts(
            stop_tokens=model.stop_tokens,
            max_positions=model.max_positions,
            dtype=model.network.dtype,
            device=describe(model.device),
        )
