"""The critic as a role: what it may see, where it starts, what an update of it is, on one process and on several."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from critic_ranks import (
    CASES,
    RESUMED,
    SAVED,
    SCORED,
    STARTS,
    everything,
    make,
    prediction,
    settings,
    single,
    updates,
    weights_of,
)
from parallel_ranks import CPU, launch
from tandem.checkpoint.sharded import read_sharded
from tandem.config.sections import Lora
from tandem.errors import ConfigError
from tandem.model import LanguageModel, load, token_values
from tandem.model.new import new_tokenizer
from tandem.model.value import load_value
from tandem.placement.inline import critic_of
from tandem.train.snapshot import read_pupil, write_pupil
from tiny_models import row_scores, spoiled
from tiny_step import batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the models of all families."""
    made = tmp_path_factory.mktemp("critic")
    make(made)
    return made


@pytest.fixture
def place(folder) -> Path:
    """A policy, and a reward model of another shape."""
    return folder / "small"


@torch.no_grad()
def values(model: LanguageModel, part, **how) -> torch.Tensor:
    return token_values(model, part.tokens_BT, part.mask_BT, part.length_B, **how)


@pytest.mark.parametrize("family", ["small", "experts", "shared expert"])
def test_a_value_is_the_classifiers_at_the_token_before(folder, family):
    """Against Transformers' own head and attention, row by row."""
    model, part = single(folder / family, "given").model, batch()
    value_BT = values(model, part)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder / family / "critic", attn_implementation="eager"
    ).eval()
    for row, length in enumerate(part.length_B.tolist()):
        hidden_1TH = theirs.model(part.tokens_BT[row : row + 1, :length]).last_hidden_state
        said_T = theirs.score(hidden_1TH)[0, :, 0].detach()
        span_T = part.mask_BT[row, :length]
        torch.testing.assert_close(value_BT[row, :length][1:][span_T[1:]], said_T[:-1][span_T[1:]])
    assert not value_BT[~part.mask_BT].any() and value_BT.std() > 0.1


def test_a_value_knows_what_came_before_and_not_the_token_it_is_for(place):
    model, part = single(place, "given").model, batch()
    column = int(part.prompt_length_B[0])
    changed = part.tokens_BT.clone()
    changed[0, column] = (changed[0, column] + 1) % 250
    before_BT, after_BT = values(model, part), values(model, replace(part, tokens_BT=changed))
    assert torch.equal(before_BT[0, : column + 1], after_BT[0, : column + 1])
    later_T = part.mask_BT[0].clone()
    later_T[: column + 1] = False
    assert bool((before_BT[0] != after_BT[0])[later_T].all()) and later_T.any()


def test_shared_prompts_change_no_value(place):
    model, part = single(place, "given").model, batch()
    shared = {"prompt_length_B": part.prompt_length_B, "group_B": part.group_B}
    torch.testing.assert_close(values(model, part, **shared), values(model, part))
    documents = values(model, part, attention="documents", **shared)
    torch.testing.assert_close(documents, values(model, part))


@pytest.mark.parametrize("start", STARTS)
def test_an_update_does_not_depend_on_the_cut(place, start):
    ends = []
    for tokens in (100_000, 1):
        made = settings(place, start)
        learner = made.learner.model_copy(update={"tokens_per_forward": tokens})
        made = made.model_copy(update={"learner": learner})
        critic = critic_of(made, load(made.model, new_tokenizer(), CPU))
        _, part = prediction(critic)
        figures = critic.update([part, part])
        ends.append((weights_of(critic), figures))
    (weights, figures), (others, other_figures) = ends
    assert figures["critic/updates"] == 2 and figures["critic/grad_norm"] > 1e-2
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=1e-5, rtol=1e-5, msg=name)
    assert other_figures == pytest.approx(figures, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", ["small", "experts"])
def test_without_a_head_of_its_own_a_critic_says_nothing_yet_and_has_the_policys_layers(folder, family):
    place = folder / family
    ours = single(place, "policy")
    assert not ours.values(batch()).any()
    policy = load(ours.run.model, new_tokenizer(), CPU)
    theirs = dict(policy.weights())
    found = weights_of(ours)
    assert found.keys() - theirs.keys() == {"score.weight"}
    assert theirs.keys() - found.keys() <= {"lm_head.weight"}
    assert all(torch.equal(weight, theirs[name]) for name, weight in found.items() if name in theirs)
    from_folder = load_value(str(place / "policy"), "fp32", new_tokenizer(), CPU)
    for name, weight in from_folder.weights():
        assert torch.equal(weight, found[name]), name
    ours.update([prediction(ours)[1]])
    assert all(torch.equal(weight, theirs[name]) for name, weight in policy.weights()), "not shared"


def test_an_adapter_of_the_policy_is_in_its_critic_and_is_not_trained_there(place):
    made = settings(place, "policy")
    adapted = made.model.model_copy(update={"lora": Lora(rank=2, alpha=8.0)})
    made = made.model_copy(update={"model": adapted})
    policy = load(made.model, new_tokenizer(), CPU)
    for weight in policy.trainable().values():
        torch.nn.init.normal_(weight, std=0.1)
    critic = critic_of(made, policy)
    merged, found = dict(policy.weights()), weights_of(critic)
    assert all(torch.equal(found[name], merged[name]) for name in found if name != "score.weight")
    assert len(critic.model.trainable()) == len(found)


def test_a_critic_learns_what_can_be_known(place):
    """Half of the prompts end in a token that decides the reward."""
    made = settings(place, "policy", optimizer={"lr": 3e-3})
    critic = critic_of(made, load(made.model, new_tokenizer(), CPU))
    raw = batch()
    _, part = prediction(critic)
    known_B = (raw.group_B % 2).float()
    part = replace(part, return_BT=known_B[:, None] * part.mask_BT, value_BT=torch.zeros(part.mask_BT.shape))
    free = critic.run.algorithm.model_copy(update={"value_clip": None})
    critic.run = critic.run.model_copy(update={"algorithm": free})
    losses = [critic.update([part])["critic/value_loss"] for _ in range(40)]
    assert losses[-1] < losses[0] / 10, losses


def test_a_step_that_is_not_finite_changes_nothing_and_too_many_end_the_run(place):
    critic = single(place, "given")
    _, part = prediction(critic)
    broken = replace(part, return_BT=part.return_BT / 0)
    before = weights_of(critic)
    figures = critic.update([broken, broken])
    assert figures["critic/skipped_nonfinite"] == 2 and figures["critic/updates"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(critic).items())
    with pytest.raises(Exception, match=r"Lower critic\.optimizer\.lr"):
        critic.update([broken])
    nothing = replace(part, mask_BT=part.mask_BT & False)
    assert single(place, "given").update([nothing])["critic/skipped_empty"] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nowhere", r"critic\.path=.*nowhere does not exist"),
        ("labels", r"critic\.path=.*labels has a head \(score\.weight\) with 2 outputs"),
        ("bias", r"critic\.path=.*bias has a head with a bias"),
        ("half", r"critic\.path=.*half lacks \d+ weights: model\."),
        ("words", r"critic\.path=.*words: its tokenizer has \d+ entries and the policy's has \d+"),
    ],
)
def test_a_folder_that_cannot_be_a_critic_is_refused_by_name(place, tmp_path, change, said):
    folder = tmp_path / change
    if change != "nowhere":
        spoiled(place / "critic", folder, change)
    with pytest.raises(ConfigError, match=said):
        load_value(str(folder), "fp32", new_tokenizer(), CPU)


@pytest.fixture(scope="module")
def spread(folder) -> Path:
    """The folder in which 4 and then 2 processes have worked."""
    for world in CASES:
        launch(everything, world, folder)
    return folder


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in CASES for name in CASES[world]])
def test_many_processes_do_what_one_does(spread, world, name):
    case = CASES[world][name]
    critic = single(spread / case.family, case.start)
    value_BT, part = prediction(critic)
    begin = weights_of(critic)
    figures = critic.update(updates(part))
    weights = weights_of(critic)
    moved = {n: float((weights[n] - begin[n]).abs().max()) for n in weights}
    assert max(moved.values()) > 2e-3
    assert "expert" not in name or max(size for n, size in moved.items() if ".experts." in n) > 1e-4
    theirs = load_file(spread / f"{world} {name}.safetensors")
    torch.testing.assert_close(theirs.pop("value_BT"), value_BT, atol=1e-5, rtol=1e-5)
    same(theirs, weights)
    found = json.loads((spread / f"{world} {name}.json").read_text())
    assert found == pytest.approx(figures, rel=1e-5, abs=1e-5)
    assert found["critic/value_clipfrac"] > 0


@pytest.mark.parametrize("name", SCORED)
def test_a_reward_model_on_two_processes_says_what_transformers_does(spread, name):
    part = batch()
    rows = [tokens[:length] for tokens, length in zip(part.tokens_BT.tolist(), part.length_B.tolist())]
    score_B = load_file(spread / f"scores {name}.safetensors")["score_B"]
    expected_B = torch.tensor(row_scores(spread / SCORED[name].family / "critic", rows))
    torch.testing.assert_close(score_B, expected_B, atol=1e-5, rtol=1e-5)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-5, msg=name)


def test_a_checkpoint_of_stages_goes_on_in_other_layouts_and_on_one_process(spread):
    later = load_file(spread / "later.safetensors")
    for layout in RESUMED:
        same(load_file(spread / f"later {layout}.safetensors"), later)
    critic = single(spread / "deep", "given")
    _, part = prediction(critic)
    read_sharded(spread / "saved", critic.model, critic.optimizer)
    critic.update([part])
    same(weights_of(critic), later)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (SAVED, "Qwen2ForSequenceClassification"),
        ("stages x experts", "Qwen3MoeForSequenceClassification"),
    ],
)
def test_a_critic_on_many_processes_is_saved_as_one_of_transformers(spread, name, kind):
    exported = spread / f"{name} exported"
    theirs = load_file(spread / f"4 {name}.safetensors")
    read = load_value(str(exported), "fp32", new_tokenizer(), CPU)
    assert type(read.network).__name__ == kind
    for key, weight in read.weights():
        assert torch.equal(weight, theirs[key]), key


def test_a_checkpoint_of_a_mixture_in_one_process_is_the_critic(folder, tmp_path):
    critic, other = (single(folder / "experts", "given") for _ in range(2))
    _, part = prediction(critic)
    critic.update([part])
    figures = write_pupil(critic, tmp_path)
    read_pupil(other, tmp_path, figures)
    ends = [(c.update([part]), weights_of(c)) for c in (critic, other)]
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(weight, ends[1][1][name]) for name, weight in ends[0][1].items())
