"""Actor and reference: the update is the textbook one, however the batch is cut, packed, ordered or recomputed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax

from tandem.algorithms import assess, split
from tandem.config import Run
from tandem.config.sections import Lora
from tandem.errors import ConfigError, RunError
from tandem.learner import Actor, Reference, micro_batches
from tandem.model import LanguageModel
from tandem.model.load import with_adapter
from tandem.model.new import new_tokenizer
from tandem.placement.inline import check_vocabulary, reference_of
from tandem.types import Batch, Experience, take
from tiny_models import FAMILIES, SHAPE, language_model, network, twin

TEMPERATURE = 0.8
NEARLY_LINEAR = {"lr": 0.5, "eps": 1.0, "clip_grad": None}
"""AdamW moves a weight by lr g / (|g| + eps): with a large eps the weights show the gradient itself."""


def run(algorithm=None, optimizer=None, **learner) -> Run:
    return Run.model_validate(
        {
            "run_dir": "unused",
            "model": {"new": {}},
            "data": {"train": "tandem:addition"},
            "reward": {"functions": [{"name": "answer_number"}]},
            "sampling": {"temperature": TEMPERATURE, "max_answer_tokens": 16},
            "algorithm": {"kl": {"coef": 0.05}, "entropy": 0.01, **(algorithm or {})},
            "learner": {"optimizer": NEARLY_LINEAR if optimizer is None else optimizer, **learner},
        }
    )


def batch(seed: int = 0, groups: int = 4, answers: int = 3) -> Batch:
    """Prompts of different lengths, answers of different lengths, rewards of 0 and 1; group 1 is all equal."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * answers
    group_B = torch.arange(groups).repeat_interleave(answers)
    prompt_B = torch.randint(1, 9, (groups,), generator=generator)[group_B]
    length_B = prompt_B + torch.randint(1, 17, (rows,), generator=generator)
    column_T = torch.arange(int(length_B.max()))
    mask_BT = (column_T >= prompt_B[:, None]) & (column_T < length_B[:, None])
    tokens_BT = torch.randint(250, mask_BT.shape, generator=generator)
    tokens_BT[column_T >= length_B[:, None]] = 0
    reward_B = torch.randint(2, (rows,), generator=generator).double()
    reward_B[0], reward_B[1], reward_B[group_B == 1] = 0.0, 1.0, 1.0
    nothing_BT = torch.zeros(mask_BT.shape)
    return Batch(
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        rollout_logp_BT=nothing_BT,
        policy_logp_BT=nothing_BT,
        reward_B=reward_B,
        group_B=group_B,
        length_B=length_B,
        truncated_B=torch.zeros(rows, dtype=torch.bool),
        version_B=torch.zeros(rows, dtype=torch.long),
    )


def experience(actor: Actor, *, off_policy: float = 0.0, seed: int = 0) -> Experience:
    """A step's experience as the loop makes it. `off_policy` moves the old log-probabilities away from the policy's,
    so that ratios differ from 1 and the clip binds."""
    raw = batch(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    policy_BT = actor.logprobs(raw)
    shift_BT = off_policy * torch.randn(policy_BT.shape, generator=generator) * raw.mask_BT
    raw = replace(raw, policy_logp_BT=policy_BT + shift_BT, rollout_logp_BT=policy_BT + shift_BT)
    algorithm = actor.run.algorithm
    ref_BT = (policy_BT + 0.3 * torch.randn(policy_BT.shape, generator=generator)) * raw.mask_BT
    made, _ = assess(
        raw,
        algorithm,
        max_answer_tokens=16,
        kl_coef=algorithm.kl.coef,
        old_logp_BT=raw.policy_logp_BT if off_policy else None,
        ref_logp_BT=ref_BT if algorithm.kl.coef else None,
    )
    return made


def weights_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.module.named_parameters()}


def updated(settings: Run, *, off_policy: float = 0.4, family: str = "qwen2_grouped", change=None):
    """Weights and metrics after one update of a fresh actor; `change` alters the experience first."""
    actor = Actor(language_model(family), settings)
    part = experience(actor, off_policy=off_policy)
    part = change(part) if change else part
    figures = actor.update([part], settings.algorithm.kl.coef)
    return weights_of(actor.model), figures


def assert_same(result, expected, atol=2e-5):
    (weights, figures), (other_weights, other_figures) = result, expected
    start = weights_of(language_model())
    moved = max(float((weight - start[name]).abs().max()) for name, weight in weights.items())
    assert moved > 1e-2, "the update must be large against the tolerance"
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], atol=atol, rtol=1e-4, msg=name)
    for name in other_figures:
        assert figures[name] == pytest.approx(other_figures[name], rel=1e-4, abs=1e-5), name


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
    counts = {}
    for on in (False, True):
        actor = Actor(language_model(), run(checkpointing=on))
        part = experience(actor)
        calls = []
        actor.model.network.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
        actor.update([part], 0.05)
        counts[on] = len(calls)
    assert counts[True] == 2 * counts[False] == 2


def test_micro_batches_hold_every_row_once_within_the_budget():
    length_B = torch.tensor([5, 40, 7, 7, 1, 12, 3])
    packs = micro_batches(length_B, 15)
    assert sorted(torch.cat(packs).tolist()) == list(range(7))
    sizes = [int(length_B[p].sum()) for p in packs]
    assert sizes[0] == 40 and len(packs[0]) == 1, "a row above the budget stands alone"
    assert all(size <= 15 for size in sizes[1:])
    assert len(micro_batches(length_B, 1)) == 7
    assert len(micro_batches(length_B, 1000)) == 1


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


# Work that changes nothing is left out, and nothing else.

NO_PULL = {"kl": {"coef": 0.0}, "entropy": 0.0}


def test_rows_without_advantage_are_left_out_and_make_no_difference(monkeypatch):
    settings, rows_seen = run(NO_PULL, tokens_per_forward=100_000), []
    plain = micro_batches
    monkeypatch.setattr(
        "tandem.learner.micro_batches",
        lambda length_B, budget: (rows_seen.append(len(length_B)), plain(length_B, budget))[1],
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


# References.


def saved_reference(folder, **shape) -> str:
    config = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, **shape}
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(9)
    Qwen2ForCausalLM(Qwen2Config(**config, tie_word_embeddings=True)).save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    return str(folder)


def with_path(settings: Run, path: str) -> Run:
    return settings.model_copy(update={"reference": settings.reference.model_copy(update={"path": path})})


def test_reference_of_another_size_scores_with_its_own_weights(tmp_path):
    path = saved_reference(tmp_path, hidden_size=64, num_hidden_layers=3)
    model, raw = language_model(), batch()
    reference = reference_of(with_path(run(), path), model, None)
    assert reference.model.layers == 3 != model.layers
    logp_BT = reference.logprobs(raw)
    hf = twin(reference.model)
    for row in range(raw.size):
        length = int(raw.length_B[row])
        logits = hf(input_ids=raw.tokens_BT[row : row + 1, :length], use_cache=False).logits[0].detach()
        expected = log_softmax(logits[:-1] / TEMPERATURE, -1).gather(-1, raw.tokens_BT[row, 1:length, None])
        mask_T = raw.mask_BT[row, 1:length]
        torch.testing.assert_close(
            logp_BT[row, 1:length][mask_T], expected.squeeze(-1)[mask_T], atol=1e-5, rtol=0
        )
    assert (logp_BT[~raw.mask_BT] == 0).all()


def test_reference_with_another_vocabulary_is_refused(tmp_path):
    model = language_model()
    wide = saved_reference(tmp_path / "wide", vocab_size=272)
    with pytest.raises(ConfigError, match=r"has 272 output rows and the policy has 264"):
        reference_of(with_path(run(), wide), model, None)
    other = new_tokenizer()
    other.add_tokens(["<extra>"])
    with pytest.raises(ConfigError, match=r"has 264 entries and the policy's has 263.*'<extra>'"):
        check_vocabulary(model.tokenizer, other, "there")
    path = saved_reference(tmp_path / "same_size")
    other.save_pretrained(path)
    with pytest.raises(ConfigError, match=r"reference\.path=.*same_size.*<extra>"):
        reference_of(with_path(run(), path), model, None)
    check_vocabulary(model.tokenizer, new_tokenizer(), "there")


def test_reference_is_the_policy_at_the_start_until_it_is_refreshed():
    settings, raw = run(), batch()
    actor = Actor(language_model(), settings)
    reference = reference_of(settings, actor.model, None)
    start_BT = actor.logprobs(raw)
    assert torch.equal(reference.logprobs(raw), start_BT)
    actor.update([experience(actor)], 0.05)
    moved_BT = actor.logprobs(raw)
    assert (moved_BT - start_BT).abs().max() > 0.01
    assert torch.equal(reference.logprobs(raw), start_BT)
    reference.refresh(actor)
    assert torch.equal(reference.logprobs(raw), moved_BT)
    actor.update([experience(actor)], 0.05)
    assert torch.equal(reference.logprobs(raw), moved_BT), "a copy, not the same tensors"
    assert reference.model.trainable() == {}


def test_reference_of_a_model_with_adapter_is_its_base():
    settings = run(optimizer={"lr": 0.02})
    settings = settings.model_copy(
        update={"model": settings.model.model_copy(update={"lora": Lora(rank=4, alpha=16.0)})}
    )
    base, raw = network("qwen2_grouped"), batch()
    module = with_adapter(base, settings.model.lora, 0, None)
    actor = Actor(LanguageModel(module, new_tokenizer(), "adapted"), settings)
    reference = reference_of(settings, actor.model, None)
    assert reference.model is actor.model, "no second copy of the weights"
    plain = Reference(language_model(), run(), adapter_off=False).logprobs(raw)
    for _ in range(3):
        figures = actor.update([experience(actor)], 0.05)
    assert figures["actor/updates"] == 1
    assert (actor.logprobs(raw) - plain).abs().max() > 0.05
    torch.testing.assert_close(reference.logprobs(raw), plain, atol=1e-5, rtol=0)


def test_logprobs_do_not_depend_on_the_token_budget():
    raw = batch()
    whole, single = (Actor(language_model(), run(tokens_per_forward=n)).logprobs(raw) for n in (100_000, 1))
    torch.testing.assert_close(single, whole, atol=1e-5, rtol=0)
    assert (whole[~raw.mask_BT] == 0).all() and (whole[raw.mask_BT] < 0).all()
