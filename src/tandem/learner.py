"""The roles that run a model over whole batches: actor and critic, which learn, and the reference, which does not."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace

import torch
from torch import Tensor

from tandem.algorithms import add, means, policy_loss
from tandem.config.run import Run
from tandem.config.sections import Algorithm, Learner
from tandem.config.sections import Optimizer as OptimizerConfig
from tandem.errors import RunError
from tandem.model import LanguageModel, token_logprobs, token_values
from tandem.model.finite import check_updated
from tandem.model.kept import Kept
from tandem.model.parallel.mesh import local
from tandem.optimizer import Optimizer
from tandem.types import Batch, BatchT, Experience, take, to_device
from tandem.value import value_loss

MIB = 2**20
PROOF_EVERY = 20
"""Updates from one to the next that is given nothing of what sampling computed, so that `rollout/logp_gap_mean` says of
it whether sampler and trainer agree."""


def micro_batches(
    length_B: Tensor,
    learner: Learner,
    prompt_length_B: Tensor | None = None,
    group_B: Tensor | None = None,
) -> list[Tensor]:
    """Row indices in packs of at most the tokens that `learner` gives their longest row.

    Long rows go with long rows. With `group_B`, rows of a group go together and their prompt counts once per pack.
    """
    lengths = length_B.tolist()
    groups = list(range(len(lengths))) if group_B is None else group_B.tolist()
    shared = [0] * len(lengths) if prompt_length_B is None else prompt_length_B.tolist()
    longest: dict[int, int] = {}
    for group, length in zip(groups, lengths):
        longest[group] = max(length, longest.get(group, 0))
    packs: list[list[int]] = []
    room, last = 0, None
    for row in sorted(range(len(lengths)), key=lambda i: (-longest[groups[i]], groups[i], i)):
        cost = lengths[row] - (shared[row] if packs and groups[row] == last else 0)
        if cost > room or not packs:
            packs.append([])
            cost = lengths[row]
            room = learner.room(cost, shared[row])
        packs[-1].append(row)
        room, last = room - cost, groups[row]
    return [torch.tensor(pack) for pack in packs]


def units(batch: Batch, groups: int) -> Iterator[Tensor]:
    """Row indices of every so many groups in turn."""
    unit_B = batch.group_B // groups
    for unit in unit_B.unique():
        yield (unit_B == unit).nonzero().squeeze(1)


def silenced(batch: BatchT) -> BatchT:
    """The shortest row with nothing in it to train or to weigh."""
    row = take(batch, batch.length_B.argmin()[None])
    zeroed = {}
    for name in (f.name for f in fields(row) if f.name.endswith("_BT") and f.name != "tokens_BT"):
        value = getattr(row, name)
        zeroed[name] = None if value is None else torch.zeros_like(value)
    return replace(row, **zeroed)


def in_units(batch: Batch, groups: int, compute: Callable[[Batch], Tensor]) -> Tensor:
    """[B, T]: each unit of so many groups as if it were alone, so that one may be computed as soon as its answers are
    there."""
    made_BT = torch.zeros(batch.tokens_BT.shape)
    for rows in units(batch, groups):
        unit_BT = compute(take(batch, rows))
        made_BT[rows, : unit_BT.shape[1]] = unit_BT
    return made_BT


class Role:
    """A model as the loop sees it: what it gives to a batch."""

    def __init__(self, model: LanguageModel, run: Run) -> None:
        self.model, self.run = model, run

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in the forward pass."""
        return self.model.network.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept from step to step, what is here of it."""
        module = self.model.module
        return [local(tensor) for tensor in (*module.parameters(), *module.buffers())]

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """`logp_BT` at the sampled tokens at the sampling temperature, on the CPU; 0 elsewhere."""
        return self._each(batch, lambda part: self._token_logprobs(part)[0])

    def _each(self, batch: Batch, what: Callable[[Batch], Tensor]) -> Tensor:
        """`what(part)` of every micro-batch, [B, T] on the CPU."""
        self.model.module.eval()
        made_BT = torch.zeros(batch.tokens_BT.shape)

        def keep(rows: Tensor, part: Batch) -> None:
            part_BT = what(part)
            made_BT[rows, : part_BT.shape[1]] = part_BT[: len(rows)].cpu()

        self.model.forward_each(self._micro_batches(batch), keep, attention=self.run.learner.attention)
        return self.model.mesh.sum(made_BT)

    def _micro_batches(self, batch: BatchT) -> Iterator[tuple[Tensor, BatchT]]:
        """This process's rows in packs, each with its part of the batch on the device.

        All processes get equally many, since they compute in step: those with fewer end on packs of no rows, whose
        part is silenced.
        """
        packs = [self._packs(batch, rows) for rows in self.model.mesh.shares(batch)]
        mine = packs[self.model.mesh.data_rank]
        idle = max(map(len, packs)) - len(mine)
        for rows in [*mine, *[torch.empty(0, dtype=torch.long)] * idle]:
            part = take(batch, rows) if len(rows) else silenced(batch)
            yield rows, to_device(part, self.model.device)

    def _packs(self, batch: Batch, rows: Tensor) -> list[Tensor]:
        length_B, prompt_length_B, group_B = (
            batch.length_B[rows],
            batch.prompt_length_B[rows],
            batch.group_B[rows],
        )
        return [rows[pack] for pack in micro_batches(length_B, self.run.learner, prompt_length_B, group_B)]

    def _token_logprobs(self, batch: Batch, kept: Kept | None = None) -> tuple[Tensor, Tensor]:
        return token_logprobs(
            self.model,
            batch.tokens_BT,
            batch.mask_BT,
            batch.length_B,
            prompt_length_B=batch.prompt_length_B,
            group_B=batch.group_B,
            temperature=self.run.sampling.temperature,
            logits_bytes=self.run.learner.logits_mb * MIB,
            entropy_gradient=self.run.algorithm.entropy > 0,
            attention=self.run.learner.attention,
            kept=kept,
        )


class Pupil(Role):
    """A role that learns: with an optimizer, whose settings are below `key`."""

    key: str

    def __init__(
        self, model: LanguageModel, run: Run, optimizer: OptimizerConfig, offload_gradients: bool
    ) -> None:
        super().__init__(model, run)
        self.optimizer = Optimizer(
            model.trainable(),
            optimizer,
            run.total_updates,
            norm=model.gradient_norm,
            offload_gradients=offload_gradients,
        )
        self.nonfinite_in_a_row = 0
        if run.learner.checkpointing:
            model.network.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def tensors(self) -> list[Tensor]:
        return [*super().tensors, *self.optimizer.tensors]

    def counters(self) -> dict[str, int]:
        """What a checkpoint needs beside tensors."""
        return {"nonfinite_in_a_row": self.nonfinite_in_a_row, "updates": self.optimizer.updates}

    def restore_counters(self, saved: Mapping[str, int]) -> None:
        self.nonfinite_in_a_row = saved["nonfinite_in_a_row"]
        self.optimizer.updates = saved["updates"]

    def _learn(
        self,
        parts: Sequence[Experience],
        live: Callable[[Experience], Tensor],
        accumulate: Callable[[Experience], dict[str, float]],
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One optimizer update per part, from its rows `live(part)`; parts without any and non-finite ones change
        nothing at all. The sums of `accumulate(part)`, which brings the gradient, and figures of the updates."""
        totals: dict[str, float] = {}
        norms, skipped_empty, skipped_nonfinite = [], 0, 0
        self.model.module.train()
        lr = self.optimizer.lr
        for part in parts:
            rows = live(part)
            if not len(rows):
                skipped_empty += 1
                continue
            self.optimizer.zero_grad()
            sums = self.model.mesh.combine(accumulate(take(part, rows)))
            norm = self.optimizer.gradient_norm()
            size = float(norm)
            if not (math.isfinite(size) and math.isfinite(sums["loss/total"])):
                skipped_nonfinite += 1
                self._count_nonfinite(part, size)
                continue
            self.nonfinite_in_a_row, lr = 0, self.optimizer.lr
            self.optimizer.step(norm)
            check_updated(self.model, lr, f"{self.key}.optimizer.lr")
            if norms:
                # Only the first update still has the sampler's weights: later gaps are the policy's own motion.
                sums = {name: value for name, value in sums.items() if "gap" not in name}
            norms.append(size)
            add(totals, sums)
        self.optimizer.zero_grad()
        return totals, {
            "grad_norm": sum(norms) / max(1, len(norms)),
            "lr": lr,
            "updates": len(norms),
            "skipped_empty": skipped_empty,
            "skipped_nonfinite": skipped_nonfinite,
        }

    def _backward(
        self, part: Experience, loss: Callable[[Experience], tuple[Tensor, dict[str, Tensor]]]
    ) -> dict[str, float]:
        """Gradient of one update, in micro-batches; the loss's weights make their sum independent of the cut."""
        totals: dict[str, float] = {}

        def loss_of(_: Tensor, piece: Experience) -> Tensor:
            made, sums = loss(piece)
            add(totals, {name: float(value) for name, value in sums.items()})
            return made

        pieces, attention = self._micro_batches(part), self.run.learner.attention
        self.model.backward_each(pieces, loss_of, self.optimizer.collect, attention=attention)
        return totals

    def _count_nonfinite(self, part: Experience, norm: float) -> None:
        self.nonfinite_in_a_row += 1
        if self.nonfinite_in_a_row >= self.run.learner.max_nonfinite:
            raise RunError(
                f"loss or gradient was not finite (gradient norm {norm}) in {self.nonfinite_in_a_row} updates in a row"
                f"; the weights are those before them. Groups of the last one: {part.group_B.unique().tolist()}. "
                f"Lower {self.key}.optimizer.lr, or look at the rollouts of this step"
            )


class Policy(ABC):
    """What learns to answer, wherever it is computed."""

    run: Run

    @abstractmethod
    def logprobs(self, batch: Batch) -> Tensor:
        """As `Role.logprobs`."""

    def old_logprobs(self, batch: Batch) -> Tensor | None:
        """The ratio's denominator: None where the ratio is 1, or as `Run.old_logp` says."""
        match self.run.old_logp:
            case "none":
                return None
            case "rollout":
                return batch.policy_logp_BT
            case "recompute":
                return self.logprobs(batch)


class Actor(Pupil, Policy):
    """The policy and its optimizer."""

    key = "learner"

    def __init__(
        self, model: LanguageModel, run: Run, *, offload_gradients: bool = False, kept: Kept | None = None
    ) -> None:
        super().__init__(model, run, run.learner.optimizer, offload_gradients)
        self.kept = kept
        """What sampling made of the answers of a step, until the first update."""

    def update(self, parts: Sequence[Experience], kl_coef: float) -> dict[str, float]:
        """One optimizer update per part. Parts without signal and non-finite ones change nothing at all."""
        algorithm = self.run.algorithm
        totals, done = self._learn(
            parts, lambda part: live_rows(part, algorithm), lambda part: self._accumulate(part, kl_coef)
        )
        self._forget()
        norm = done.pop("grad_norm")
        figures = {f"actor/{name}": value for name, value in done.items()}
        return {**means(totals, int(done["updates"])), "grad_norm": norm, **figures}

    def _accumulate(self, part: Experience, kl_coef: float) -> dict[str, float]:
        kept = None if self.optimizer.updates % PROOF_EVERY == 0 else self.kept

        def loss(piece: Experience) -> tuple[Tensor, dict[str, Tensor]]:
            logp_BT, entropy_BT = self._token_logprobs(piece, kept)
            return policy_loss(logp_BT, entropy_BT, piece, self.run.algorithm, kl_coef)

        self._begin_dropout()
        sums = self._backward(part, loss)
        self._forget()
        return sums

    def _forget(self) -> None:
        if self.kept is not None:
            self.kept.forget()

    def _begin_dropout(self) -> None:
        """What an update drops follows from its number and the process, so a run that goes on drops the same: of all
        processes' generators a checkpoint has only the first's."""
        lora = self.run.model.lora
        if lora is not None and lora.dropout:
            place = (self.run.seed, self.optimizer.updates, self.model.mesh.data_rank)
            torch.manual_seed(random.Random(str(place)).getrandbits(32))


class Critic(Pupil):
    """What predicts the reward to come before each token, and its optimizer."""

    key = "critic"

    def __init__(self, model: LanguageModel, run: Run, *, offload_gradients: bool = False) -> None:
        super().__init__(model, run, run.critic.optimizer, offload_gradients)

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """`value_BT` at the sampled tokens, on the CPU, unit by unit; 0 elsewhere."""
        return in_units(batch, self.run.step_unit, lambda unit: self._each(unit, self._token_values))

    def update(self, parts: Sequence[Experience]) -> dict[str, float]:
        """One optimizer update per part, as the actor's, from all rows that are trained."""
        totals, done = self._learn(
            parts, lambda part: part.mask_BT.any(-1).nonzero().squeeze(1), self._accumulate
        )
        loss = totals.get("loss/total", 0.0) / max(1, done["updates"])
        clipped = totals.get("clipped", 0.0) / max(1.0, totals.get("tokens", 0.0))
        figures = {"value_loss": loss, "value_clipfrac": clipped, **done}
        return {f"critic/{name}": value for name, value in figures.items()}

    def _accumulate(self, part: Experience) -> dict[str, float]:
        clip = self.run.algorithm.value_clip
        return self._backward(part, lambda piece: value_loss(self._token_values(piece), piece, clip))

    def _token_values(self, batch: Batch) -> Tensor:
        return token_values(
            self.model,
            batch.tokens_BT,
            batch.mask_BT,
            batch.length_B,
            prompt_length_B=batch.prompt_length_B,
            group_B=batch.group_B,
            attention=self.run.learner.attention,
        )


class Reference(Role):
    """Where the KL term pulls to: a model of its own, or the actor's with its adapter off."""

    def __init__(self, model: LanguageModel, run: Run, *, adapter_off: bool) -> None:
        super().__init__(model, run)
        self.adapter_off = adapter_off

    def logprobs(self, batch: Batch) -> Tensor:
        """As `Role.logprobs`, unit by unit."""
        with self.model.base() if self.adapter_off else nullcontext():
            return in_units(batch, self.run.step_unit, super().logprobs)

    def refresh(self, actor: Actor) -> None:
        """Take over the actor's weights."""
        self.model.take_over(actor.model)


def live_rows(part: Experience, algorithm: Algorithm) -> Tensor:
    """Rows that can have a gradient: without KL and entropy terms a row of zero advantages has none, exactly."""
    trained_B = part.mask_BT.any(-1)
    kl_term = part.ref_logp_BT is not None and algorithm.kl.place == "loss"
    if not (kl_term or algorithm.entropy):
        trained_B &= (part.advantage_BT * part.weight_BT != 0).any(-1)
    return trained_B.nonzero().squeeze(1)
