"""What the processes of a plan's test do: they lay a model out, update it, and say how many bytes each holds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.config import Run
from tandem.config.sections import Model
from tandem.learner import Actor
from tandem.model.new import new_tokenizer
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.load import load_sharded
from tandem.model.parallel.mesh import local
from tandem.types import Experience
from tiny_step import run

LAYOUTS: dict[str, dict[str, Any]] = {
    "shard": {"shard": 2},
    "replicate": {"replicate": 2},
    "tensor": {"tensor": 2},
    "tensor without sequence": {"tensor": 2, "sequence": False},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
    "uneven pipeline": {"pipeline": 2, "pipeline_layers": [4, 1]},
    "interleaved pipeline": {"pipeline": 2, "pipeline_chunks": 2},
    "gpipe": {"pipeline": 2, "pipeline_schedule": "gpipe"},
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pipeline, tied": ("tied", {"pipeline": 2}),
    "shard, mixture": ("mixture", {"shard": 2}),
    "tensor, mixture": ("mixture", {"tensor": 2}),
    "expert, mixture": ("mixture", {"expert": 2}),
    "shard, bf16": ("model", {"shard": 2}),
    "tensor without sequence, bf16": ("model", {"tensor": 2, "sequence": False}),
}
"""Layouts of other models than the one called `model` in float32, and these."""
PROMPT, ANSWER, GROUPS, ANSWERS = 8, 16, 6, 4


def asked(folder: Path, name: str) -> Run:
    """Of six groups, each is a micro-batch."""
    kind, sizes = OTHERS[name] if name in OTHERS else ("model", LAYOUTS[name])
    made = run(
        algorithm={"kl": {"coef": 0.0}, "entropy": 0.0},
        tokens_per_forward=PROMPT + ANSWERS * ANSWER,
        layout=sizes,
    )
    sampling = made.sampling.model_copy(
        update={"prompts_per_step": GROUPS, "answers_per_prompt": ANSWERS, "max_answer_tokens": ANSWER}
    )
    model = Model(path=str(folder / kind), dtype="bf16" if "bf16" in name else "fp32")
    return made.model_copy(update={"sampling": sampling, "model": model})


def bytes_of_each(rank: int, world: int, address: str, place: str) -> None:
    """Writes `held.json`: for each layout, bytes by purpose and exchanges by kind of every process."""
    torch.set_num_threads(1)
    connect(rank, world, address, torch.device("cpu"), timeout_s=120)
    folder, found = Path(place), {}
    for name in (*LAYOUTS, *OTHERS):
        made = asked(folder, name)
        grid = Grid(made.learner.layout, torch.device("cpu"), "learner.layout")
        actor = Actor(load_sharded(made.model, new_tokenizer(), grid), made)
        weights = list(actor.model.module.parameters())
        with kept_for_backward(actor.model.module) as kept, Counted() as counted:
            actor._accumulate(full_step(GROUPS, PROMPT, ANSWERS, ANSWER), 0.0)
        gradients = [local(weight.grad) for weight in weights if weight.grad is not None]
        actor.optimizer.step(actor.optimizer.gradient_norm())
        states = [local(t) for s in actor.optimizer.adamw.state.values() for t in s.values() if t.ndim]
        parts = {
            "weights": [local(weight) for weight in weights],
            "gradients": gradients,
            "optimizer": states,
        }
        bytes_of = {part: sum(t.nbytes for t in tensors) for part, tensors in parts.items()}
        everyone: list[dict[str, int]] = [{}] * world
        dist.all_gather_object(everyone, bytes_of | {"kept": kept.most} | counted.exchanges)
        found[name] = everyone
    if rank == 0:
        (folder / "held.json").write_text(json.dumps(found))


EXCHANGES = {
    "gather": torch.ops.c10d._allgather_base_,
    "scatter": torch.ops.c10d._reduce_scatter_base_,
    "reduce": torch.ops.c10d.allreduce_,
    "turn": torch.ops.c10d.alltoall_base_,
}


class Counted(TorchDispatchMode):
    """The exchanges of this process, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanges = dict.fromkeys(EXCHANGES, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, operation in EXCHANGES.items():
            self.exchanges[name] += function.overloadpacket is operation
        return function(*args, **(kwargs or {}))


@dataclass(slots=True)
class Kept:
    """Bytes that backward passes wait for."""

    most: int = 0
    here: dict[int, list[int]] = field(default_factory=dict)
    """By place in memory, bytes and how many hold them."""

    @property
    def now(self) -> int:
        return sum(size for size, _ in self.here.values())


class Holder:
    """One tensor that is kept."""

    def __init__(self, tensor: Tensor, kept: Kept) -> None:
        self.tensor, self.kept = tensor, kept
        self.place = tensor.untyped_storage().data_ptr()
        kept.here.setdefault(self.place, [tensor.untyped_storage().nbytes(), 0])[1] += 1
        kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        entry = self.kept.here[self.place]
        entry[1] -= 1
        if not entry[1]:
            del self.kept.here[self.place]


@contextmanager
def kept_for_backward(module: torch.nn.Module) -> Iterator[Kept]:
    """Most bytes at once that are kept for backward passes, weights not among them, nor those that are gathered while
    they are used."""
    kept = Kept()

    def keep(tensor: Tensor) -> Tensor | Holder:
        own = {local(weight).untyped_storage().data_ptr() for weight in module.parameters()}
        return tensor if local(tensor).untyped_storage().data_ptr() in own else Holder(tensor, kept)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t.tensor if isinstance(t, Holder) else t):
        yield kept


def full_step(groups: int, prompt: int, answers: int, length: int) -> Experience:
    """A step in which every prompt and every answer has this length."""
    rows, columns = groups * answers, prompt + length
    tokens_BT = torch.randint(0, 200, (rows, columns))
    tokens_BT[:, :prompt] = torch.randint(0, 200, (groups, prompt)).repeat_interleave(answers, 0)
    mask_BT = (torch.arange(columns) >= prompt).expand(rows, -1)
    ones_BT = mask_BT.float()
    return Experience(
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        rollout_logp_BT=-ones_BT,
        policy_logp_BT=-ones_BT,
        reward_B=torch.ones(rows).double(),
        group_B=torch.arange(groups).repeat_interleave(answers),
        length_B=torch.full((rows,), columns),
        prompt_length_B=torch.full((rows,), prompt),
        truncated_B=torch.zeros(rows, dtype=torch.bool),
        version_B=torch.zeros(rows, dtype=torch.long),
        old_logp_BT=None,
        advantage_BT=ones_BT,
        correction_BT=ones_BT,
        weight_BT=ones_BT / rows,
        ref_logp_BT=None,
        value_BT=ones_BT / 2,
        return_BT=ones_BT,
    )
