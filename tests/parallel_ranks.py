"""What the processes of a parallel test run: updates of tiny models in many layouts, one launch for all of them."""

import json
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes

from slices import counted_reads, weight_bytes
from tandem.checkpoint.sharded import read_sharded, write_sharded
from tandem.config import Run
from tandem.config.layout import Layout
from tandem.config.sections import Model
from tandem.engine.probe import policy_logp, probe_tokens
from tandem.errors import ConfigError, RunError
from tandem.learner import Actor
from tandem.model import load
from tandem.model.asleep import Asleep
from tandem.model.finite import check_updated
from tandem.model.new import new_tokenizer
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.load import load_sharded
from tandem.model.parallel.mesh import local
from tandem.model.parallel.shard import on_grid
from tandem.placement.ranks import actor_of, build_reference
from tandem.train.snapshot import read_learned, write_learned
from tandem.types import Experience, take
from tiny_step import experience, run

CPU = torch.device("cpu")
PROBE = probe_tokens(264, 128)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout, and what else of the run is not as usual."""

    layout: dict[str, Any]
    family: str = "qwen2_grouped"
    lora: bool = False
    dtype: str = "fp32"
    learner: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    chunks: bool = False
    """The output head takes one token at a time, and again in the backward pass."""
    rows: int = 12

    @property
    def reference(self) -> "Case":
        """The same on one process."""
        return replace(self, layout={})

    def model(self, folder: Path) -> Model:
        # A rank that no number of processes divides: some have more of an adapter than others, or nothing.
        lora = {"rank": 3, "alpha": 8.0} if self.lora else None
        return Model.model_validate({"path": str(folder / self.family), "lora": lora, "dtype": self.dtype})

    def run(self, folder: Path) -> Run:
        made = run(
            optimizer={"lr": 0.5, "eps": 1.0, "clip_grad": None, **self.optimizer},
            **{"tokens_per_forward": 64, **self.learner},
        )
        learner = made.learner.model_copy(update={"logits_mb": 0}) if self.chunks else made.learner
        return made.model_copy(update={"model": self.model(folder), "learner": learner})


CASES = {
    4: {
        "shard": Case(layout={}),
        "replicate x shard": Case(layout={"replicate": 2}, learner={"tokens_per_forward": 16}),
        "shard x sequence": Case(layout={"tensor": 2}),
        "shard x tensor": Case(layout={"tensor": 2, "sequence": False}, family="qwen3"),
        "context": Case(layout={"context": 4}),
        "context x sequence": Case(layout={"context": 2, "tensor": 2}),
        "shard x context": Case(layout={"context": 2}),
        "tensor of 4": Case(layout={"tensor": 4}, family="qwen2_untied"),
        "shard lora": Case(layout={}, lora=True),
        "shard x sequence lora": Case(layout={"tensor": 2}, lora=True),
        "replicate x shard lora": Case(layout={"replicate": 2}, lora=True),
        "context lora": Case(layout={"context": 4}, lora=True),
        "tensor of 4 lora": Case(layout={"tensor": 4}, family="qwen2_untied", lora=True),
    },
    2: {
        "shard": Case(layout={"shard": 2}),
        "replicate": Case(layout={"replicate": 2}, learner={"tokens_per_forward": 16}),
        "tensor": Case(layout={"tensor": 2, "sequence": False}),
        "sequence": Case(layout={"tensor": 2}),
        "context": Case(layout={"context": 2}),
        "shard untied": Case(layout={}, family="qwen2_untied"),
        "sequence untied": Case(layout={"tensor": 2}, family="qwen2_untied"),
        "tensor head norms": Case(layout={"tensor": 2, "sequence": False}, family="qwen3"),
        "sequence head norms": Case(layout={"tensor": 2}, family="qwen3"),
        "sequence mistral": Case(layout={"tensor": 2}, family="mistral"),
        "shard mistral": Case(layout={}, family="mistral"),
        "context one key head": Case(layout={"context": 2}, family="llama"),
        "shard lora": Case(layout={}, lora=True),
        "replicate lora": Case(layout={"replicate": 2}, lora=True),
        "tensor lora": Case(layout={"tensor": 2, "sequence": False}, lora=True),
        "sequence lora": Case(layout={"tensor": 2}, lora=True),
        "context lora": Case(layout={"context": 2}, lora=True),
        "shard, one pack": Case(layout={}, learner={"tokens_per_forward": 4096}),
        "shard, one row": Case(layout={}, rows=1),
        "shard, recomputed, head in chunks": Case(layout={}, learner={"checkpointing": True}, chunks=True),
        "sequence, recomputed, head in chunks": Case(
            layout={"tensor": 2}, learner={"checkpointing": True}, chunks=True
        ),
        "shard, weights on the host": Case(layout={"offload_parameters": True}),
        "shard, gradients on the host": Case(layout={"offload_gradients": True}),
        "shard, optimizer on the host": Case(layout={}, optimizer={"offload": True}),
        "shard, gradients and optimizer on the host": Case(
            layout={"offload_gradients": True}, optimizer={"offload": True}
        ),
        "sequence, weights on the host": Case(layout={"tensor": 2, "offload_parameters": True}),
        "shard lora, all on the host": Case(
            layout={"offload_parameters": True}, lora=True, optimizer={"offload": True}
        ),
        "shard, clipped": Case(layout={}, optimizer={"clip_grad": 0.05}),
    },
}

SAVED = {
    "plain": Case(layout={"tensor": 2}),
    "adapter": Case(layout={"tensor": 2}, lora=True),
    "masters": Case(layout={"tensor": 2}, dtype="bf16"),
}
"""Saved by 4 processes, resumed by 2 in each of these layouts."""
RESUMED = {"shard": {}, "tensor": {"tensor": 2, "sequence": False}, "context": {"context": 2}}
FEWER = Case(layout={"tensor": 2})
"""Saved by 2 processes, resumed by 4 in each of these layouts."""
MORE = {"shard of 4": {}, "shard x tensor": {"tensor": 2}, "context x tensor": {"context": 2, "tensor": 2}}


def single(case: Case, folder: Path) -> tuple[Actor, Experience]:
    """One process, and the experience that every layout is given."""
    case = case.reference
    actor = Actor(load(case.model(folder), new_tokenizer(), CPU), case.run(folder))
    return actor, take(experience(actor, off_policy=0.4), torch.arange(case.rows))


def two_shapes(part: Experience) -> list[Experience]:
    """Two updates: all rows, and then the shorter half of them, so that neither number nor lengths of packs stay."""
    return [part, take(part, part.length_B.argsort()[: -(-part.size // 2)])]


def spread(case: Case, folder: Path) -> Actor:
    """The actor in its layout."""
    grid = Grid(Layout.model_validate(case.layout), CPU, "learner.layout")
    return actor_of(case.run(folder), load_sharded(case.model(folder), new_tokenizer(), grid))


def weights_of(actor: Actor) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in actor.model.weights()}


def masters_of(actor: Actor) -> dict[str, torch.Tensor]:
    model, weights = actor.model, actor.model.trainable()
    return {
        name: on_grid(values, weights[name], model.parts[name], model.grid).full_tensor()
        for name, values in actor.optimizer.master_tensors.items()
    }


def launch(work: Callable[..., None], world: int, folder: Path) -> None:
    """Run `work(rank, world, address, folder)` in so many processes; an error in one is this process's error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # The server imports torch once for the processes of all launches.
    multiprocessing.set_forkserver_preload(["tandem.placement.ranks", "tandem.checkpoint.sharded"])
    start_processes(work, (world, address, str(folder)), nprocs=world, start_method="forkserver")


def everything(rank: int, world: int, address: str, place: str) -> None:
    """What this number of processes is asked; rank 0 writes what came out."""
    torch.set_num_threads(1)
    connect(rank, world, address, CPU, timeout_s=120)
    folder = Path(place)
    for name, case in CASES[world].items():
        update(case, folder, folder / f"{world} {name}", rank)
    if world == 4:
        for name, case in SAVED.items():
            save_and_go_on(case, folder, folder / f"saved {name}", rank)
        reads_at_most(0.27, Case(layout={"tensor": 2}, family="qwen2_untied"), folder)
    else:
        for name, case in SAVED.items():
            for layout, sizes in RESUMED.items():
                go_on(replace(case, layout=sizes), folder, folder / f"saved {name}", layout, rank)
        for name, case in SAVED.items():
            for layout, sizes in RESUMED.items():
                take_over_from_one(replace(case, layout=sizes), folder, f"{name} {layout}", rank)
        save_and_go_on(FEWER, folder, folder / "saved fewer", rank)
        slices_only(folder)
        weights_in_pickles_are_refused(folder)
        copies_are_summed_once_per_update(folder)
        a_broken_weight_is_known_to_all(Case(layout={}), folder, rank)
        a_new_model_is_the_same()
        reference_in_another_layout(folder)
        export_while_training(folder)


def more(rank: int, world: int, address: str, place: str) -> None:
    """What goes on with what fewer processes have saved."""
    torch.set_num_threads(1)
    connect(rank, world, address, CPU, timeout_s=120)
    for layout, sizes in MORE.items():
        go_on(replace(FEWER, layout=sizes), Path(place), Path(place) / "saved fewer", layout, rank)


def update(case: Case, folder: Path, out: Path, rank: int) -> None:
    """Two updates: of an adapter, only the second moves both factors."""
    _, part = single(case, folder)
    actor = spread(case, folder)
    logp_BT = actor.logprobs(part)
    figures = actor.update(two_shapes(part), 0.05)
    weights = weights_of(actor)
    actor.model.module.eval()
    probe_T = torch.tensor(policy_logp(actor.model, PROBE))
    if rank == 0:
        save_file({"logp_BT": logp_BT, "probe_T": probe_T, **weights}, f"{out}.safetensors")
        Path(f"{out}.json").write_text(json.dumps(figures))


def save_and_go_on(case: Case, folder: Path, out: Path, rank: int) -> None:
    _, part = single(case, folder)
    actor = spread(case, folder)
    actor.update([part, part], 0.05)
    write_sharded(out, actor.model, actor.optimizer)
    then, masters = weights_of(actor), masters_of(actor)
    actor.update([part], 0.05)
    later = weights_of(actor)
    if rank == 0:
        for name, tensors in {"then": then, "masters": masters, "later": later}.items():
            save_file(tensors, f"{out} {name}.safetensors")


def go_on(case: Case, folder: Path, saved: Path, layout: str, rank: int) -> None:
    _, part = single(case, folder)
    actor = spread(case, folder)
    read_sharded(saved, actor.model, actor.optimizer)
    assert actor.optimizer.updates == 2
    masters, saved_masters = masters_of(actor), load_file(f"{saved} masters.safetensors")
    assert masters.keys() == saved_masters.keys()
    for name, values in saved_masters.items():
        assert torch.equal(masters[name], values), f"{layout}: master of {name}"
    asleep = Asleep(actor.tensors, CPU)
    assert asleep.nbytes > sum(weight.nbytes for weight in actor.optimizer.masters.values())
    asleep.wake()
    then = load_file(f"{saved} then.safetensors")
    for name, weight in actor.model.weights():
        assert torch.allclose(weight, then[name], atol=1e-7, rtol=1e-6), f"{layout}: {name}"
    actor.update([part], 0.05)
    later = weights_of(actor)
    if rank == 0:
        save_file(later, f"{saved} {layout}.safetensors")


def saved_by_one(case: Case, folder: Path, out: Path) -> None:
    """A checkpoint of one process after two updates, and its weights after a third."""
    actor, part = single(case, folder)
    actor.update([part, part], 0.05)
    out.mkdir()
    words = write_learned(actor, None, out, False)
    (out / "words.json").write_text(json.dumps(words))
    actor.update([part], 0.05)
    save_file(weights_of(actor), f"{out} later.safetensors")


def take_over_from_one(case: Case, folder: Path, name: str, rank: int) -> None:
    _, part = single(case, folder)
    actor = spread(case, folder)
    saved = folder / f"one {name.split()[0]}"
    words = json.loads((saved / "words.json").read_text())
    read_learned(actor, None, saved, words["optimizer"], words["random"])
    actor.update([part], 0.05)
    later = weights_of(actor)
    if rank == 0:
        save_file(later, folder / f"from one {name}.safetensors")


def slices_only(folder: Path) -> None:
    """Of two processes each reads half of a folder; where weights are only split over tensor, the norms too."""
    reads_at_most(0.5, Case(layout={}, family="qwen2_untied"), folder)
    reads_at_most(0.5, Case(layout={"context": 2}, family="qwen2_untied"), folder)
    reads_at_most(0.52, Case(layout={"tensor": 2}, family="qwen2_untied"), folder)
    reads_at_most(0.55, Case(layout={"pipeline": 2}, family="qwen2_untied"), folder)
    # Its weights lie in many files.
    reads_at_most(0.5, Case(layout={}, family="qwen3"), folder)
    reads_at_most(0.52, Case(layout={"tensor": 2}, family="qwen3"), folder)


def reads_at_most(share: float, case: Case, folder: Path) -> None:
    """Of the bytes of its folder, and not much less."""
    total = weight_bytes(folder / case.family)
    with counted_reads() as counted:
        spread(case, folder)
    assert 0.8 * share * total < counted.read <= share * total, (case, counted.read / total)


def weights_in_pickles_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"bin lacks [0-9]+ weights: .* use a whole folder"):
        spread(Case(layout={}, family="bin"), folder)


def copies_are_summed_once_per_update(folder: Path) -> None:
    """However many micro-batches there are: once for each unit of FSDP, and again for the norm and the figures."""
    counts = {}
    for tokens in (16, 4096):
        case = Case(layout={"replicate": 2, "shard": 1}, learner={"tokens_per_forward": tokens})
        _, part = single(case, folder)
        actor = spread(case, folder)
        packs = len(list(actor._micro_batches(part)))
        with counting(dist, "all_reduce") as calls:
            actor.update([part], 0.05)
        counts[packs] = len(calls)
    assert len(counts) == 2 and len(set(counts.values())) == 1, counts


def a_broken_weight_is_known_to_all(case: Case, folder: Path, rank: int) -> None:
    """That of the last process: no other goes on without it, and all say the same."""
    actor = spread(case, folder)
    check_updated(actor.model, 1.0, "learner.optimizer.lr")
    name, weight = next((n, w) for n, w in reversed(actor.model.trainable().items()) if local(w).numel())
    if rank == dist.get_world_size() - 1:
        local(weight).detach().view(-1)[-1] = torch.nan
    names = [name] * dist.get_world_size()
    dist.all_gather_object(names, name)
    with pytest.raises(RunError, match=f"learning rate 1 left .* not finite, {names[-1]} the first"):
        check_updated(actor.model, 1.0, "learner.optimizer.lr")


@contextmanager
def counting(owner: Any, name: str) -> Iterator[list[None]]:
    """The calls of a function, one entry each."""
    calls: list[None] = []
    plain = getattr(owner, name)

    def counted(*arguments: Any, **keys: Any) -> Any:
        calls.append(None)
        return plain(*arguments, **keys)

    setattr(owner, name, counted)
    yield calls
    setattr(owner, name, plain)


def a_new_model_is_the_same() -> None:
    config = Model.model_validate({"new": {"hidden_size": 32, "layers": 1, "heads": 4, "kv_heads": 2}})
    whole = dict(load(config, new_tokenizer(), CPU, seed=5).weights())
    for sizes in ({}, {"tensor": 2}):
        grid = Grid(Layout.model_validate(sizes), CPU, "learner.layout")
        for name, weight in load_sharded(config, new_tokenizer(), grid, seed=5).weights():
            assert torch.equal(weight, whole[name]), (sizes, name)


def reference_in_another_layout(folder: Path) -> None:
    case = Case(layout={})
    _, part = single(case, folder)
    actor = spread(case, folder)
    start_BT = actor.logprobs(part)
    reference = build_reference(case.run(folder), Layout(tensor=2), actor)
    actor.update([part], 0.05)
    assert torch.allclose(reference.logprobs(part), start_BT, atol=1e-5)
    assert not torch.allclose(actor.logprobs(part), start_BT, atol=1e-2)
    reference.refresh(actor)
    assert torch.allclose(reference.logprobs(part), actor.logprobs(part), atol=1e-5)
    adapted = Case(layout={"tensor": 2}, lora=True)
    actor = spread(adapted, folder)
    base = build_reference(adapted.run(folder), Layout(), actor)
    actor.update([part, part], 0.05)
    assert torch.allclose(base.logprobs(part), start_BT, atol=1e-5)
    assert not torch.allclose(actor.logprobs(part), start_BT, atol=1e-2)


def export_while_training(folder: Path) -> None:
    for name, case in {"whole": Case(layout={}), "adapter": Case(layout={"tensor": 2}, lora=True)}.items():
        _, part = single(case, folder)
        actor = spread(case, folder)
        actor.update([part, part], 0.05)
        actor.model.save_merged(folder / f"export {name}")
        actor.model.save(folder / f"kept {name}")
        logp_BT = actor.logprobs(part)
        if actor.model.grid.host.get_rank() == 0:
            save_file({"logp_BT": logp_BT}, folder / f"export {name}.safetensors")
