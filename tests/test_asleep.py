"""Tensors that wait in host memory come back bit for bit, and whoever held them holds them still."""

import pytest
import torch

from tandem.learner import Actor
from tandem.model.asleep import Asleep
from tiny_models import language_model
from tiny_step import experience, run

CPU = torch.device("cpu")


def asleep_between_updates(device: torch.device) -> None:
    """Two updates with a sleep between them are two updates."""
    ends = []
    for sleeps in (False, True):
        model = language_model()
        model.module.to(device)
        actor = Actor(model, run())
        part = experience(actor)
        actor.update([part], 0.05)
        if sleeps:
            tensors = actor.tensors
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            on_device = sum(storages.values()) - on_host(actor, device)
            before = [t.detach().clone() for t in tensors]
            asleep = Asleep(tensors, device)
            assert asleep.nbytes == on_device > 0
            assert all(t.untyped_storage().nbytes() == 0 for t in tensors if t.device.type == device.type)
            asleep.wake()
            assert all(torch.equal(a, b) for a, b in zip(before, tensors))
        actor.update([part], 0.05)
        ends.append([weight.detach().cpu() for weight in model.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def on_host(actor: Actor, device: torch.device) -> int:
    """Step counts, where the device is another."""
    return 0 if device == CPU else sum(t.nbytes for t in actor.tensors if t.device.type != device.type)


def test_an_update_after_sleep_is_the_update():
    asleep_between_updates(CPU)


@pytest.mark.gpu
def test_an_accelerator_gets_its_memory_back():
    device = torch.device("cuda")
    asleep_between_updates(device)
    numbers = torch.ones(1 << 24, device=device)
    view, used = numbers[7:9], torch.cuda.memory_reserved()
    asleep = Asleep([numbers], device)
    assert torch.cuda.memory_reserved() <= used - numbers.numel() * 4
    asleep.wake()
    assert view.tolist() == [1.0, 1.0]


def test_views_of_one_storage_move_once():
    joined = torch.arange(12.0)
    parts = [joined[:4].view(2, 2), joined[4:]]
    asleep = Asleep([*parts, parts[0]], CPU)
    assert asleep.nbytes == joined.numel() * 4 and joined.untyped_storage().nbytes() == 0
    asleep.wake()
    assert torch.equal(parts[1], torch.arange(4.0, 12.0)) and parts[0][1, 1] == 3
