"""The optimizer: schedule by hand, torch's own clipping, decay where it belongs, master weights that lose nothing."""

import copy

import pytest
import torch
from torch import nn

from tandem.config.sections import NewModel
from tandem.config.sections import Optimizer as OptimizerConfig
from tandem.model import LanguageModel, token_logprobs
from tandem.model.new import new_network, new_tokenizer
from tandem.optimizer import Optimizer, learning_rate

SHAPE = NewModel(hidden_size=16, layers=1, heads=2, kv_heads=1, max_positions=32)


def rates(total: int, **keys: object) -> list[float]:
    config = OptimizerConfig.model_validate({"lr": 1.0, **keys})
    return [learning_rate(config, update, total) for update in range(total)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [1.0] * 5),
        ({"warmup_updates": 2}, [0.5, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"schedule": "linear", "end_lr": 0.2}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "end_lr": 3.0}, [1.0, 1.5, 2.0, 2.5, 3.0]),
        ({"schedule": "cosine"}, [1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0.0]),
        ({"schedule": "cosine", "end_lr": 3.0}, [1.0, 2 - 2**-0.5, 2.0, 2 + 2**-0.5, 3.0]),
        ({"schedule": "linear", "warmup_updates": 2}, [0.5, 1.0, 1.0, 0.5, 0.0]),
        ({"schedule": "cosine", "warmup_updates": 2, "end_lr": 0.1}, [0.5, 1.0, 1.0, 0.55, 0.1]),
        ({"schedule": "linear", "warmup_updates": 10}, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
    ids=str,
)
def test_the_schedule_by_hand(keys, expected):
    assert rates(5, **keys) == pytest.approx(expected, abs=1e-12)


def test_the_schedule_of_one_update_and_beyond_its_end():
    assert rates(1, schedule="cosine", end_lr=0.5) == [1.0]
    config = OptimizerConfig(lr=1.0, schedule="linear", end_lr=0.5)
    assert learning_rate(config, 99, 5) == 0.5


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return new_network(SHAPE, new_tokenizer(), seed=0).to(dtype)


def optimizer_of(module: nn.Module, total: int = 100, **keys: object) -> Optimizer:
    config = OptimizerConfig.model_validate({"lr": 1e-2, "clip_grad": None, **keys})
    return Optimizer(dict(module.named_parameters()), config, total)


def backward(module: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Gradients of the cross-entropy of seeded tokens, through the trainer's own forward pass."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, 256, (2, 12), generator=generator)
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    mask_BT[:, 0] = False
    logp_BT, _ = token_logprobs(
        LanguageModel(module, new_tokenizer(), "new"),
        tokens_BT,
        mask_BT,
        torch.tensor([12, 12]),
        temperature=1.0,
        logits_bytes=2**20,
    )
    (-scale * logp_BT.sum() / mask_BT.sum()).backward()


def train(module: nn.Module, updates: int, **keys: object) -> Optimizer:
    optimizer = optimizer_of(module, **keys)
    for update in range(updates):
        optimizer.zero_grad()
        backward(module, seed=update)
        optimizer.step(optimizer.gradient_norm())
    return optimizer


def test_decay_spares_norms_and_biases():
    module = network()
    before = {name: w.detach().clone() for name, w in module.named_parameters()}
    optimizer = optimizer_of(module, lr=0.1, weight_decay=0.5)
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step(optimizer.gradient_norm())
    spared = [name for name, w in module.named_parameters() if torch.equal(w, before[name])]
    assert any("norm" in name for name in spared) and any(name.endswith("bias") for name in spared)
    for name, weight in module.named_parameters():
        assert ("norm" in name or name.endswith("bias")) == (name in spared)
        if name not in spared:
            torch.testing.assert_close(weight.detach(), before[name] * (1 - 0.1 * 0.5))


def test_weights_without_a_gradient_do_not_move():
    module = network()
    backward(module, seed=0)
    frozen = module.model.layers[0].mlp.up_proj.weight
    frozen.grad = None
    before = frozen.detach().clone()
    optimizer = optimizer_of(module, weight_decay=0.5)
    optimizer.step(optimizer.gradient_norm())
    assert torch.equal(frozen, before)


def test_only_matrices_can_be_trained_as_adapters_have_no_other_weights():
    matrix = nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer({"a": matrix}, OptimizerConfig(lr=0.1, clip_grad=None), 1)
    matrix.grad = torch.ones(2, 2)
    optimizer.step(optimizer.gradient_norm())
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.9))


@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_clipping_is_that_of_torch(bound):
    ours, theirs = network(), network()
    optimizer = optimizer_of(ours, clip_grad=bound)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    for update, scale in enumerate((10.0, 0.1, 1.0)):
        optimizer.zero_grad()
        adamw.zero_grad()
        backward(ours, update, scale)
        backward(theirs, update, scale)
        norm = optimizer.gradient_norm()
        assert norm.item() == pytest.approx(
            nn.utils.clip_grad_norm_(theirs.parameters(), bound).item(), rel=1e-6
        )
        assert (norm > 0.5) == (scale > 0.1)
        optimizer.step(norm)
        adamw.step()
    for mine, its in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offload", [False, True])
def test_an_update_is_adamw_written_out(offload):
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    keys = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, "clip_grad": 1.0}
    optimizer = Optimizer({"w": weight}, OptimizerConfig.model_validate({**keys, "offload": offload}), 10)
    expected, first, second = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step, gradient in enumerate([(3.0, 4.0), (0.3, -0.4), (0.0, 0.0)], start=1):
        weight.grad = torch.tensor([gradient])
        optimizer.step(optimizer.gradient_norm())
        norm = (gradient[0] ** 2 + gradient[1] ** 2) ** 0.5
        for i, g in enumerate(gradient):
            g = g * min(1.0, 1.0 / (norm + 1e-6))
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.99 * second[i] + 0.01 * g * g
            direction = (first[i] / (1 - 0.9**step)) / ((second[i] / (1 - 0.99**step)) ** 0.5 + 1e-8)
            expected[i] = expected[i] * (1 - 0.1 * 0.01) - 0.1 * direction
        assert weight[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert optimizer.updates == 3


def test_offload_gives_the_same_bits_as_plain_adamw():
    plain, offloaded, bare = network(), network(), network()
    train(plain, 4, weight_decay=0.1)
    held = train(offloaded, 4, weight_decay=0.1, offload=True)
    groups = [[w for w in bare.parameters() if (w.ndim > 1) == decayed] for decayed in (True, False)]
    adamw = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=1e-2,
        fused=True,
    )
    for update in range(4):
        adamw.zero_grad()
        backward(bare, seed=update)
        adamw.step()
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, offloaded.get_parameter(name))
        assert torch.equal(weight, bare.get_parameter(name))
        assert held.master_tensors[name].data_ptr() != offloaded.get_parameter(name).data_ptr()
    assert not optimizer_of(plain).master_tensors


def test_offload_clips_as_without_it():
    plain, offloaded = network(), network()
    train(plain, 3, clip_grad=0.1)
    train(offloaded, 3, clip_grad=0.1, offload=True)
    for weight, other in zip(plain.parameters(), offloaded.parameters()):
        assert torch.equal(weight, other)


def test_bf16_masters_follow_a_run_in_fp32():
    full = network()
    start = [w.detach().clone() for w in full.parameters()]
    half = copy.deepcopy(full).to(torch.bfloat16)
    train(full, 20, lr=1e-3)
    optimizer = train(half, 20, lr=1e-3)
    moved = off = 0.0
    for (name, weight), other, before in zip(half.named_parameters(), full.parameters(), start, strict=True):
        master = optimizer.master_tensors[name]
        assert master.dtype == torch.float32
        assert torch.equal(weight, master.to(torch.bfloat16))
        moved += (other - before).square().sum().item()
        off += (master - other).square().sum().item()
    assert off**0.5 < 0.05 * moved**0.5


def test_bf16_masters_do_not_lose_updates_that_bf16_cannot_hold():
    """Next to 1, bfloat16 numbers lie 2^-8 apart: steps of 1e-4 vanish one by one, and add up to 0.01."""
    ours, theirs = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = Optimizer({"w": ours}, OptimizerConfig(lr=1e-4, clip_grad=None), 100)
    plain = torch.optim.AdamW([theirs], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        for weight in (ours, theirs):
            weight.grad = torch.ones_like(weight)
        optimizer.step(optimizer.gradient_norm())
        plain.step()
    assert theirs.tolist() == [1.0] * 4
    torch.testing.assert_close(optimizer.master_tensors["w"], torch.full((4,), 0.99), rtol=1e-5, atol=0)
    assert ours.tolist() == torch.full((4,), 0.99).bfloat16().tolist()


def test_masters_are_restored_to_the_bit():
    first, second = network(torch.bfloat16), network(torch.bfloat16)
    optimizer = train(first, 3)
    other = optimizer_of(second)
    other.restore_masters({name: t.clone() for name, t in optimizer.master_tensors.items()})
    for name, master in optimizer.master_tensors.items():
        assert torch.equal(other.master_tensors[name], master)


def test_the_norm_is_that_of_all_gradients_and_zero_without_any():
    module = network(torch.bfloat16)
    optimizer = optimizer_of(module)
    assert optimizer.gradient_norm().item() == 0.0
    backward(module, seed=0)
    squares = sum(w.grad.double().square().sum().item() for w in module.parameters() if w.grad is not None)
    assert optimizer.gradient_norm().item() == pytest.approx(squares**0.5, rel=1e-4)


def test_each_update_takes_the_rate_of_its_turn():
    """Under a constant gradient each of Adam's steps is as long as the rate."""
    weight = nn.Parameter(torch.zeros(2))
    config = OptimizerConfig(lr=1.0, schedule="linear", warmup_updates=1, clip_grad=None)
    optimizer = Optimizer({"w": weight}, config, 5)
    places = []
    for _ in range(5):
        weight.grad = torch.ones(2)
        optimizer.step(optimizer.gradient_norm())
        places.append(-weight[0].item())
    assert places == pytest.approx([1.0, 2.0, 2 + 2 / 3, 3.0, 3.0], rel=1e-5)
    assert optimizer.updates == 5
