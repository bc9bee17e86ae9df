"""What an update drops of an adapter's input follows from the run's seed, the update's number and the process alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel_ranks import CPU, Case, launch, single, spread, weights_of
from tandem.config import Run
from tandem.config.sections import Lora, Model
from tandem.learner import Actor
from tandem.model import LanguageModel
from tandem.model.load import with_adapter
from tandem.model.new import new_tokenizer
from tandem.model.parallel.grid import connect
from tandem.model.parallel.mesh import Mesh
from tandem.train.snapshot import read_learned, write_learned
from tandem.types import Batch
from tiny_models import network
from tiny_step import experience, run


def dropping(share: float, seed: int = 0) -> Run:
    model = Model.model_validate({"new": {}, "lora": {"rank": 3, "alpha": 8.0, "dropout": share}})
    return run().model_copy(update={"model": model, "seed": seed})


class Second(Mesh):
    """The second of two processes, which has all the rows."""

    data_rank = 1

    def shares(self, batch: Batch) -> list[torch.Tensor]:
        return [torch.empty(0, dtype=torch.long), *super().shares(batch)]


class Dropping(Case):
    """With dropout of the adapter, where there is one."""

    def model(self, folder: Path) -> Model:
        made = super().model(folder)
        lora = made.lora.model_copy(update={"dropout": 0.5}) if made.lora else None
        return made.model_copy(update={"lora": lora})


def moved(share: float, noise: int, *, number: int = 0, seed: int = 0, mesh: Mesh | None = None):
    """The adapter after an update of a fresh actor, torch's generator having stood at `noise`."""
    made = dropping(share, seed)
    lora = made.model.lora
    assert isinstance(lora, Lora)
    actor = Actor(
        LanguageModel(with_adapter(network("qwen2_grouped"), lora, 0, None), new_tokenizer(), "tiny"), made
    )
    part = experience(actor)
    actor.optimizer.updates = number
    if mesh is not None:
        actor.model.mesh = mesh
    torch.manual_seed(noise)
    actor.update([part], 0.05)
    after = torch.initial_seed()
    return torch.cat([w.detach().flatten() for w in actor.model.trainable().values()]), after


def test_what_is_dropped_follows_from_seed_update_and_process():
    first, _ = moved(0.5, noise=1)
    assert torch.equal(moved(0.5, noise=2)[0], first)
    others = [{"number": 1}, {"seed": 1}, {"mesh": Second()}]
    assert not any(torch.equal(moved(0.5, noise=1, **other)[0], first) for other in others)


def test_without_dropout_torchs_generator_is_left_alone():
    assert moved(0.0, noise=7)[1] == 7


def resuming(rank: int, world: int, address: str, place: str) -> None:
    """Three updates, and the third once more from a checkpoint of the first two, by generators that stand elsewhere."""
    torch.set_num_threads(1)
    connect(rank, world, address, CPU, timeout_s=120)
    folder = Path(place)
    # Of the rows the processes have unequal shares, so they draw unequally often.
    case = Dropping(layout={"shard": 2}, lora=True, rows=7)
    _, part = single(replace(case, lora=False), folder)
    actor = spread(case, folder)
    actor.update([part, part], 0.05)
    words = json.loads(json.dumps(write_learned(actor, None, folder, False)))
    counters = actor.counters()
    actor.update([part], 0.05)
    expected = weights_of(actor)
    torch.manual_seed(99)
    again = spread(case, folder)
    read_learned(again, None, folder, words["optimizer"], words["random"])
    again.restore_counters(counters)
    again.update([part], 0.05)
    for name, weight in weights_of(again).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.slow
def test_learners_with_dropout_go_on_from_a_checkpoint_as_they_would_have(tmp_path):
    network("qwen2_grouped").save_pretrained(tmp_path / "qwen2_grouped")
    launch(resuming, 2, tmp_path)
