"""The feed-forward that holds less: Transformers' numbers bit for bit, in fewer bytes."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import silu

from tandem.model.feed_forward import FeedForward, Gate, lighten
from tiny_models import FAMILIES, OTHERS, language_model, network

ROWS = 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_the_gate_and_its_gradients_are_pytorchs(dtype, wanted):
    generator = torch.Generator().manual_seed(0)
    values = [(3 * torch.randn(ROWS, 24, generator=generator)).to(dtype) for _ in range(3)]
    upstream, found = values.pop(), []
    for gate in (Gate.apply, lambda gate, up: silu(gate) * up):
        inputs = [value.clone().requires_grad_(want) for value, want in zip(values, wanted)]
        inner = gate(*inputs)
        inner.backward(upstream)
        found.append([inner.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_a_layer_does_what_transformers_does_and_holds_one_tensor_less(family):
    theirs = network(family).model.layers[0].mlp
    ours = copy.deepcopy(theirs)
    lighten(ours)
    assert type(ours) is FeedForward
    x = torch.randn(1, ROWS, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for layer in (ours, theirs):
        held: dict[int, int] = {}

        def hold(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        layer.zero_grad()
        with saved_tensors_hooks(hold, lambda tensor: tensor):
            y = layer(x)
        y.square().sum().backward()
        found.append((y.detach(), [p.grad for p in layer.parameters()], sum(held.values())))
    (our_y, our_gradients, our_held), (their_y, their_gradients, their_held) = found
    assert torch.equal(our_y, their_y) and all(map(torch.equal, our_gradients, their_gradients))
    assert their_held - our_held == ROWS * 48


def test_every_layer_of_a_model_is_lightened_and_what_is_not_known_left_alone():
    layers = [layer.mlp for layer in language_model().decoder.layers]
    assert [type(mlp) for mlp in layers] == [FeedForward] * 2
    other = network("qwen2_tied").model.layers[0].mlp
    before, other.act_fn = type(other), nn.GELU()
    lighten(other)
    assert type(other) is before
