"""Work that changes nothing is left out, and nothing else; an update that went wrong changes nothing."""

import copy
from dataclasses import replace

import pytest
import torch

from tandem.errors import RunError
from tandem.learner import Actor, micro_batches
from tandem.types import take
from tiny_models import language_model
from tiny_step import NO_PULL, assert_same, experience, run, updated, weights_of


def test_rows_without_advantage_are_left_out_and_make_no_difference(monkeypatch):
    settings, rows_seen = run(NO_PULL, tokens_per_forward=100_000), []
    plain = micro_batches
    monkeypatch.setattr(
        "tandem.learner.micro_batches",
        lambda length_B, *given: (rows_seen.append(len(length_B)), plain(length_B, *given))[1],
    )
    skipped = updated(settings)
    with_advantage = rows_seen[-1]
    monkeypatch.setattr("tandem.learner.live_rows", lambda part, algorithm: torch.arange(part.size))
    whole = updated(settings)
    assert with_advantage == 9 and rows_seen[-1] == 12, "group 1 has equal rewards"
    losses = ("actor/pg_loss", "actor/loss", "grad_norm", "actor/updates")
    assert_same(
        (skipped[0], {n: skipped[1][n] for n in losses}), (whole[0], {n: whole[1][n] for n in losses})
    )


def test_rows_without_advantage_still_feel_the_pull_of_the_reference():
    settings = run({"entropy": 0.0})
    weights, figures = updated(
        settings, change=lambda part: take(part, (part.group_B == 1).nonzero().squeeze(1))
    )
    assert figures["actor/updates"] == 1 and figures["actor/pg_loss"] == 0 and figures["actor/kl_loss"] > 0
    before = weights_of(language_model())
    assert not torch.equal(weights["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_an_update_without_signal_leaves_weights_and_optimizer_untouched():
    settings = run(NO_PULL, {"lr": 0.1, "weight_decay": 0.1})
    actor = Actor(language_model(), settings)
    part = experience(actor)
    actor.update([part], 0.0)
    before, state = weights_of(actor.model), copy.deepcopy(actor.optimizer.adamw.state_dict())
    silent = replace(part, advantage_BT=torch.zeros_like(part.advantage_BT))
    figures = actor.update([silent], 0.0)
    assert (figures["actor/updates"], figures["actor/skipped_empty"]) == (0, 1)
    assert actor.optimizer.updates == 1
    assert_untouched(actor, before, state)


def assert_untouched(actor: Actor, weights, state) -> None:
    for name, weight in weights_of(actor.model).items():
        assert torch.equal(weight, weights[name]), name
    now = actor.optimizer.adamw.state_dict()
    assert now["param_groups"] == state["param_groups"]
    for index, slots in state["state"].items():
        for slot, value in slots.items():
            assert torch.equal(now["state"][index][slot], value)


BROKEN = {
    "advantage": lambda part: replace(part, advantage_BT=part.advantage_BT * torch.nan),
    "one advantage": lambda part: replace(
        part, advantage_BT=part.advantage_BT.masked_fill(part.mask_BT.cumsum(-1).cumsum(0) == 1, torch.nan)
    ),
    "infinite weight": lambda part: replace(part, weight_BT=part.weight_BT * torch.inf),
    "reference": lambda part: replace(part, ref_logp_BT=part.ref_logp_BT + torch.nan),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_update_that_is_not_finite_changes_nothing_at_all(what):
    """Not the weights, not the optimizer, not the schedule: the next update is what it would have been."""
    optimizer = {"lr": 1e-2, "schedule": "linear", "warmup_updates": 3}
    runs = {}
    for broken in (False, True):
        actor = Actor(language_model(), run(optimizer=optimizer))
        part = experience(actor)
        actor.update([part], 0.05)
        if broken:
            before, state = weights_of(actor.model), copy.deepcopy(actor.optimizer.adamw.state_dict())
            rate = actor.optimizer.lr
            figures = actor.update([BROKEN[what](part)], 0.05)
            assert (figures["actor/updates"], figures["actor/skipped_nonfinite"]) == (0, 1)
            assert_untouched(actor, before, state)
            assert (actor.optimizer.lr, actor.optimizer.updates) == (rate, 1)
        actor.update([part], 0.05)
        runs[broken] = weights_of(actor.model)
    for name, weight in runs[True].items():
        assert torch.equal(weight, runs[False][name]), name


def test_weights_that_are_not_finite_stop_the_run_after_a_few_updates_in_a_row():
    actor = Actor(language_model(), run(max_nonfinite=3))
    part = experience(actor)
    bad = BROKEN["advantage"](part)
    actor.update([bad, bad], 0.05)
    assert actor.update([part], 0.05)["actor/updates"] == 1, "a good update in between starts the count anew"
    actor.update([bad], 0.05)
    before = weights_of(actor.model)
    with pytest.raises(
        RunError, match=r"not finite.*3 updates in a row.*Groups of the last one: \[0, 1, 2, 3\].*lr"
    ):
        actor.update([bad, bad], 0.05)
    for name, weight in weights_of(actor.model).items():
        assert torch.equal(weight, before[name])
    broken = Actor(language_model(), run(max_nonfinite=1))
    with torch.no_grad():
        broken.model.network.model.norm.weight[3] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        broken.update([part], 0.05)
