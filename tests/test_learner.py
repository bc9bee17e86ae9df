"""The actor's update is the textbook one, however the batch is cut, packed, ordered or recomputed."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax

from tandem.algorithms import split
from tandem.config.sections import Learner
from tandem.learner import Actor, micro_batches
from tandem.types import Experience, take
from tiny_models import FAMILIES, language_model, twin
from tiny_step import (
    NEARLY_LINEAR,
    NO_PULL,
    TEMPERATURE,
    assert_same,
    batch,
    experience,
    run,
    updated,
    weights_of,
)

# The independent reference: Transformers' eager attention over a padded batch, the formulas written out.


def textbook_loss(hf, part: Experience, clip: float, kl: float, entropy: float) -> torch.Tensor:
    """GRPO (arXiv 2402.03300, eq. 3) with k3 and an entropy bonus, token means then sequence means."""
    real_BT = (torch.arange(part.tokens_BT.shape[1]) < part.length_B[:, None]).long()
    logits = hf(input_ids=part.tokens_BT, attention_mask=real_BT, use_cache=False).logits[:, :-1]
    all_logp = log_softmax(logits.float() / TEMPERATURE, -1)
    logp = all_logp.gather(-1, part.tokens_BT[:, 1:, None]).squeeze(-1)
    uncertainty = -(all_logp.exp() * all_logp).sum(-1)
    mask = part.mask_BT[:, 1:]
    old = part.old_logp_BT[:, 1:] if part.old_logp_BT is not None else logp.detach()
    ratio, advantage = (logp - old).exp(), part.advantage_BT[:, 1:]
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    token_loss = -objective - entropy * uncertainty
    if kl:
        behind = part.ref_logp_BT[:, 1:] - logp
        token_loss = token_loss + kl * (behind.exp() - behind - 1)
    return ((token_loss * mask).sum(1) / mask.sum(1)).mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("off_policy", [0.0, 0.4])
def test_update_is_the_textbook_one_on_a_padded_batch(family, off_policy):
    settings = run()
    actor = Actor(language_model(family), settings)
    part = experience(actor, off_policy=off_policy)
    hf = twin(actor.model)
    loss = textbook_loss(hf, part, clip=0.2, kl=0.05, entropy=0.01)
    loss.backward()
    norm = torch.stack([w.grad.norm() for w in hf.parameters()]).norm()
    torch.optim.AdamW(hf.parameters(), lr=0.5, eps=1.0, betas=(0.9, 0.999), weight_decay=0.0).step()
    figures = actor.update([part], 0.05)
    assert figures["actor/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert figures["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert (figures["actor/pg_clipfrac"] > 0.05) == (off_policy > 0)
    for name, weight in hf.named_parameters():
        ours = actor.model.network.get_parameter(name)
        torch.testing.assert_close(ours, weight, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("bound", [0.01, 1e6])
def test_gradient_is_scaled_down_to_the_bound_only_where_it_is_above(bound):
    actor = Actor(language_model(), run(optimizer={**NEARLY_LINEAR, "clip_grad": bound}))
    part = experience(actor)
    hf = twin(actor.model)
    textbook_loss(hf, part, clip=0.2, kl=0.05, entropy=0.01).backward()
    norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), bound)
    torch.optim.AdamW(hf.parameters(), lr=0.5, eps=1.0, weight_decay=0.0).step()
    before = weights_of(actor.model)
    figures = actor.update([part], 0.05)
    assert 0.01 < norm < 1e6 and figures["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, weight in hf.named_parameters():
        theirs, ours = weight.detach() - before[name], actor.model.network.get_parameter(name) - before[name]
        torch.testing.assert_close(
            ours, theirs, atol=1e-6 + 1e-4 * theirs.abs().max().item(), rtol=0, msg=name
        )


def test_weight_decay_spares_norms_and_biases():
    """Decoupled: after an update without a gradient to speak of, matrices shrink by lr times decay."""
    settings = run(
        algorithm={"kl": {"coef": 0.0}, "entropy": 0.0},
        optimizer={"lr": 0.1, "eps": 1e12, "weight_decay": 0.5},
    )
    actor = Actor(language_model(), settings)
    before = weights_of(actor.model)
    actor.update([experience(actor)], 0.0)
    for name, weight in weights_of(actor.model).items():
        factor = 1 - 0.1 * 0.5 if weight.ndim > 1 else 1.0
        torch.testing.assert_close(weight, before[name] * factor, atol=1e-6, rtol=1e-5, msg=name)


# How the work is cut changes nothing.

CUTS = {
    "one_row_at_a_time": {"tokens_per_forward": 1},
    "a_few_rows": {"tokens_per_forward": 40},
    "chunked_head": {"logits_mb": 1, "tokens_per_forward": 40},
    "checkpointing": {"checkpointing": True},
}


@pytest.mark.parametrize("name", CUTS)
def test_update_does_not_depend_on_how_it_is_computed(name, monkeypatch):
    if name == "chunked_head":
        monkeypatch.setattr("tandem.learner.MIB", 264 * 4 * 3)  # three tokens per chunk
    for algorithm in ({}, {"weight": "token_mean", "ratio": "sequence", "clip": {"low": 0.05, "high": 0.05}}):
        cut = updated(run(algorithm, **CUTS[name]))
        assert_same(cut, updated(run(algorithm, tokens_per_forward=100_000)))


def test_activation_checkpointing_really_recomputes():
    assert forwards_of_one_update(checkpointing=True) == 2 * forwards_of_one_update(checkpointing=False) == 2


def forwards_of_one_update(checkpointing: bool) -> int:
    actor = Actor(language_model(), run(checkpointing=checkpointing))
    part, calls = experience(actor), []
    first = actor.model.network.model.layers[0].self_attn.q_proj
    first.register_forward_hook(lambda *_: calls.append(1))
    actor.update([part], 0.05)
    return len(calls)


def test_micro_batches_hold_every_row_once_within_the_budget():
    length_B = torch.tensor([5, 40, 7, 7, 1, 12, 3])
    packs = micro_batches(length_B, Learner(tokens_per_forward=15))
    assert sorted(torch.cat(packs).tolist()) == list(range(7))
    sizes = [int(length_B[p].sum()) for p in packs]
    assert sizes[0] == 40 and len(packs[0]) == 1, "a row above the budget stands alone"
    assert all(size <= 15 for size in sizes[1:])
    assert len(micro_batches(length_B, Learner(tokens_per_forward=1))) == 7
    assert len(micro_batches(length_B, Learner(tokens_per_forward=1000))) == 1


def test_update_does_not_depend_on_the_order_of_rows_or_groups():
    def shuffled(part):
        return take(part, torch.randperm(part.size, generator=torch.Generator().manual_seed(3)))

    assert_same(updated(run(), change=shuffled), updated(run()))

    def regrouped(order):
        return lambda part: split(part, 1, run().algorithm, 16, torch.tensor(order))[0]

    assert_same(
        updated(run(), change=regrouped([2, 0, 3, 1])), updated(run(), change=regrouped([0, 1, 2, 3]))
    )


def test_accumulated_gradient_is_that_of_the_whole_batch_also_off_the_default_weights():
    """Rows of very different length make a mean of micro-batch means differ from the mean of all tokens."""
    for weight in ("sequence_mean", "token_mean", "sequence_sum", "constant"):
        small = updated(run({"weight": weight}, {**NEARLY_LINEAR, "lr": 0.2}, tokens_per_forward=20))
        large = updated(run({"weight": weight}, {**NEARLY_LINEAR, "lr": 0.2}, tokens_per_forward=10_000))
        assert_same(small, large)


def test_several_updates_per_step_are_so_many_steps_of_the_optimizer():
    """Two updates on halves: each with weights of its own, the second from where the first led."""
    settings = run({"keep": "all"}, updates_per_step=2)
    actor = Actor(language_model(), settings)
    part = experience(actor, off_policy=0.2)
    halves = split(part, 2, settings.algorithm, 16, torch.tensor([3, 0, 1, 2]))
    assert [sorted(set(h.group_B.tolist())) for h in halves] == [[0, 3], [1, 2]]
    figures = actor.update(halves, 0.05)
    hf = twin(language_model())
    optimizer = torch.optim.AdamW(hf.parameters(), lr=0.5, eps=1.0, weight_decay=0.0)
    for groups in ([0, 3], [1, 2]):
        rows = torch.isin(part.group_B, torch.tensor(groups)).nonzero().squeeze(1)
        optimizer.zero_grad()
        textbook_loss(hf, take(part, rows), clip=0.2, kl=0.05, entropy=0.01).backward()
        optimizer.step()
    assert figures["actor/updates"] == actor.optimizer.updates == 2
    for name, weight in hf.named_parameters():
        torch.testing.assert_close(
            actor.model.network.get_parameter(name), weight, atol=5e-5, rtol=2e-4, msg=name
        )


@pytest.mark.parametrize(("signs", "rate"), [("ll", 0.2), ("l", 0.1), ("le", 0.1), ("el", 0.1), ("e", 0.1)])
def test_the_learning_rate_is_that_of_the_last_update(signs, rate):
    """While it rises by 0.1 with each; e is a part with nothing in it to learn."""
    actor = Actor(language_model(), run(NO_PULL, {**NEARLY_LINEAR, "lr": 0.4, "warmup_updates": 4}))
    live = experience(actor)
    empty = replace(live, advantage_BT=torch.zeros_like(live.advantage_BT))
    figures = actor.update([live if sign == "l" else empty for sign in signs], 0.0)
    assert figures["actor/updates"] == signs.count("l")
    assert figures["actor/lr"] == pytest.approx(rate)


def test_offloaded_optimizer_makes_the_same_update():
    whole = updated(run())
    assert_same(updated(run(optimizer={**NEARLY_LINEAR, "offload": True})), whole, atol=1e-7)


def test_bf16_masters_gather_updates_too_small_for_bf16():
    """Steps of 1e-4: added to bfloat16 weights near 1, each would be rounded away."""
    model = language_model()
    model.network.to(torch.bfloat16)
    actor = Actor(model, run(NO_PULL, {"lr": 1e-4, "clip_grad": None}))
    assert actor.optimizer.master_tensors.keys() == model.trainable().keys()
    part, before = experience(actor), weights_of(model)
    for _ in range(32):
        actor.update([part], 0.0)
    name = "model.norm.weight"
    master, weight = actor.optimizer.master_tensors[name], model.network.get_parameter(name)
    assert master.dtype == torch.float32 and weight.dtype == torch.bfloat16
    assert torch.equal(weight, master.bfloat16())
    moved = (master - before[name].float()).abs()
    assert 2e-3 < moved.max() < 4e-3
    assert not torch.equal(weight, before[name])


def test_logprobs_do_not_depend_on_the_token_budget():
    raw = batch()
    whole, single = (Actor(language_model(), run(tokens_per_forward=n)).logprobs(raw) for n in (100_000, 1))
    torch.testing.assert_close(single, whole, atol=1e-5, rtol=0)
    assert (whole[~raw.mask_BT] == 0).all() and (whole[raw.mask_BT] < 0).all()
