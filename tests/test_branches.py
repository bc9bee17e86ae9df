"""Prompts computed once for all their answers give the numbers of rows computed one by one."""

import pytest
import torch

from conftest import random_model
from tandem.config.sections import Learner
from tandem.learner import micro_batches
from tandem.model import attention, token_logprobs
from tandem.model.attention import Branches, Rows, lay
from tandem.types import pad


def batch(prompts: list[int], answers: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens; group g has a prompt of prompts[g] tokens and answers of answers[g] tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 250, (count,), generator=generator).tolist()

    rows, masks, groups, heads = [], [], [], []
    for group, (prompt_length, lengths) in enumerate(zip(prompts, answers)):
        prompt = tokens(prompt_length)
        for length in lengths:
            rows.append(prompt + tokens(length))
            masks.append([False] * prompt_length + [True] * length)
            groups.append(group)
            heads.append(prompt_length)
    return {
        "tokens_BT": pad(rows, torch.long),
        "mask_BT": pad(masks, torch.bool, False),
        "length_B": torch.tensor([len(row) for row in rows]),
        "prompt_length_B": torch.tensor(heads),
        "group_B": torch.tensor(groups),
    }


SHAPES = {
    "even": ([7, 7], [[5, 5, 5], [5, 5, 5]]),
    "uneven": ([3, 11, 1], [[4, 9, 1], [2, 2], [8, 1, 3, 5]]),
    "one group": ([20], [[1, 2, 3, 4]]),
    "a group of one among others": ([30, 4], [[6], [3, 3, 12]]),
}


def both(model, given):
    """Log-probabilities, entropy and gradients: plain, and with shared prompts."""
    shared = ("prompt_length_B", "group_B")
    plain = {k: v for k, v in given.items() if k not in shared}
    weight_BT = torch.rand(given["tokens_BT"].shape, generator=torch.Generator().manual_seed(1))
    out = []
    for arguments in (plain, given):
        model.network.zero_grad()
        logp_BT, entropy_BT = token_logprobs(
            model, **arguments, temperature=0.7, logits_bytes=2**30, entropy_gradient=True
        )
        ((logp_BT + 0.1 * entropy_BT) * weight_BT).sum().backward()
        gradient = {name: p.grad.clone() for name, p in model.network.named_parameters()}
        out.append((logp_BT.detach(), entropy_BT.detach(), gradient))
    return out


@pytest.mark.parametrize("written_out", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_shared_prompts_leave_logprobs_entropy_and_gradients_unchanged(shape, written_out, monkeypatch):
    """Whether attention of the answers is written out or left to PyTorch's kernel."""
    seen, choose = [], attention.written_out
    monkeypatch.setattr(attention, "SCORES", attention.SCORES if written_out else 0)
    monkeypatch.setattr(attention, "written_out", lambda *a: seen.append(choose(*a)) or seen[-1])
    given = batch(*SHAPES[shape])
    assert isinstance(lay(given["length_B"], given["prompt_length_B"], given["group_B"]), Branches)
    model = random_model()
    plain, shared = both(model, given)
    torch.testing.assert_close(shared[0], plain[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared[1], plain[1], atol=1e-5, rtol=1e-5)
    for name, gradient in plain[2].items():
        torch.testing.assert_close(shared[2][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert set(seen) == {written_out}


def test_rows_of_groups_may_stand_in_any_order():
    given = batch(*SHAPES["uneven"])
    order = torch.randperm(len(given["length_B"]), generator=torch.Generator().manual_seed(3))
    mixed = {name: values[order] for name, values in given.items()}
    model = random_model()
    straight = token_logprobs(model, **given, temperature=1.0, logits_bytes=2**30)[0]
    torch.testing.assert_close(
        token_logprobs(model, **mixed, temperature=1.0, logits_bytes=2**30)[0],
        straight[order],
        atol=1e-5,
        rtol=1e-5,
    )


def test_an_answer_does_not_see_its_neighbours():
    given = batch(*SHAPES["uneven"])
    model = random_model()
    before = token_logprobs(model, **given, temperature=1.0, logits_bytes=2**30)[0]
    given["tokens_BT"][1, 3:12] += 1
    after = token_logprobs(model, **given, temperature=1.0, logits_bytes=2**30)[0]
    others = [i for i in range(len(before)) if i != 1]
    torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(after[1], before[1], atol=1e-3)


def test_prompts_are_shared_only_where_it_saves_work():
    alone = batch([9, 9], [[4], [5]])
    assert isinstance(lay(alone["length_B"], alone["prompt_length_B"], alone["group_B"]), Rows)
    long_answers = batch([2], [[60, 60]])
    assert isinstance(
        lay(long_answers["length_B"], long_answers["prompt_length_B"], long_answers["group_B"]), Rows
    )
    given = batch([40], [[5] * 8])
    layout = lay(given["length_B"], given["prompt_length_B"], given["group_B"])
    assert len(layout.position_N) == 40 + 8 * 5


def test_packs_keep_groups_together_within_the_budget():
    given = batch([10, 6, 30], [[5, 4, 3], [9, 2], [1, 1, 1, 1]])
    length_B, prompt_B, group_B = (given[k] for k in ("length_B", "prompt_length_B", "group_B"))
    for budget in (1, 20, 36, 1000):
        packs = micro_batches(length_B, Learner(tokens_per_forward=budget), prompt_B, group_B)
        assert sorted(torch.cat(packs).tolist()) == list(range(len(length_B)))
        for pack in packs:
            heads = {int(group_B[i]): int(prompt_B[i]) for i in pack}
            tokens = sum(heads.values()) + int((length_B - prompt_B)[pack].sum())
            assert tokens <= budget or len(pack) == 1
    packs = micro_batches(length_B, Learner(tokens_per_forward=34), prompt_B, group_B)
    assert len(packs[0]) == 4, "30 + 4 x 1 fit exactly"


def test_a_long_prompt_gets_as_many_answer_tokens_beside_it_as_it_has():
    given = batch([900, 700, 300], [[150] * 8, [100] * 8, [100] * 8])
    rows = [given[k] for k in ("length_B", "prompt_length_B", "group_B")]
    sizes = [len(pack) for pack in micro_batches(rows[0], Learner(), *rows[1:])]
    assert sizes == [6, 2, 7, 1 + 3, 5], "room for 1,800, 1,800, 1,400, 1,400 and 1,280 tokens"
    strict = micro_batches(rows[0], Learner(tokens_per_forward=1280), *rows[1:])
    assert max(int(rows[0][pack].max()) + 150 * (len(pack) - 1) for pack in strict[:4]) <= 1280


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_document_masks_give_the_numbers_of_padded_rows(shape):
    given = batch(*SHAPES[shape])
    model = random_model()
    for names in (("tokens_BT", "mask_BT", "length_B"), tuple(given)):
        arguments = {name: given[name] for name in names}
        padded, documents = (
            token_logprobs(model, **arguments, temperature=0.7, logits_bytes=2**30, attention=attention)
            for attention in ("padded", "documents")
        )
        torch.testing.assert_close(documents, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_document_masks_give_the_gradient_of_padded_rows(shape):
    given = {name: tensor.cuda() for name, tensor in batch(*SHAPES[shape]).items()}
    gradients = []
    for kind in ("padded", "documents"):
        model = random_model()
        model.network.cuda()
        logp_BT, _ = token_logprobs(model, **given, temperature=0.7, logits_bytes=2**30, attention=kind)
        logp_BT.sum().backward()
        gradients.append([p.grad for p in model.network.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-2)
