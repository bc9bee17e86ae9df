"""The models beside the policy are looked at before anything slow: a warm-up that never ends must not begin."""

import json
import re
from pathlib import Path
from shutil import copytree

import pytest
import torch

from small_recipe import recipe
from tandem.config import load
from tandem.errors import ConfigError
from tandem.model import tokenizer_of
from tandem.train.beside import check_models
from tandem.train.check import check
from tandem.train.lengths import too_short
from tandem.train.run import Launch, train
from test_reference import saved_reference
from tiny_models import classifier, spoiled

NEEDED = {
    "reference": {"algorithm": {"kl": {"coef": 0.05}}},
    "critic": {"algorithm": {"preset": "ppo"}},
    "reward.model": {},
}
"""What makes a run load the model of a key."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Models that are sound, and such as have one thing wrong, by what that is."""
    made = tmp_path_factory.mktemp("beside")
    classifier(made / "judge")
    saved_reference(made / "policy_like", vocab_size=264)
    saved_reference(made / "wide", vocab_size=272)
    (made / "empty").mkdir()
    for change in ("labels", "words", "torn"):
        spoiled(made / "judge", made / change, change)
    copytree(made / "judge", made / "untied")
    # Of these the config does not say what they are.
    other_config(made / "untied", tie_word_embeddings=False, architectures=None)
    other_config(made / "torn", architectures=None)
    copytree(made / "policy_like", made / "speech")
    other_config(made / "speech", model_type="whisper_encoder")
    copytree(made / "policy_like", made / "segments")
    other_config(made / "segments", model_type="mask2former")
    for name in ("judge", "policy_like"):
        copytree(made / name, made / f"{name} of few")
        other_config(made / f"{name} of few", max_position_embeddings=35)
        copytree(made / name, made / f"{name} of a window")
        other_config(made / f"{name} of a window", sliding_window=35, use_sliding_window=True)
    return made


def other_config(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def given(tmp_path: Path, key: str, path: Path, **placement: object) -> Path:
    """A recipe whose warm-up would take for ever."""
    reward = {"functions": [{"name": "answer_number"}]}
    changes = dict(NEEDED[key])
    if key == "reward.model":
        reward["model"] = {"path": str(path)}
    else:
        changes[key] = {"path": str(path)}
    return recipe(tmp_path, warmup={"steps": 10**9}, reward=reward, placement=placement, **changes)


WRONG = [
    ("reference", "nowhere", "nowhere does not exist"),
    ("reference", "empty", "empty has no config.json"),
    ("reference", "words", r"words: its tokenizer has \d+ entries"),
    ("reference", "wide", "wide has 272 output rows and the policy has 264"),
    ("reference", "untied", r"untied has no output head \(lm_head\.weight\)"),
    ("reference", "judge", "judge is a Qwen2ForSequenceClassification, which writes no text"),
    ("reference", "torn", r"torn: model\.safetensors is damaged"),
    ("reference", "speech", r"speech: its config\.json cannot be used"),
    ("critic", "nowhere", "nowhere does not exist"),
    ("critic", "empty", "empty has no config.json"),
    ("critic", "words", r"words: its tokenizer has \d+ entries"),
    ("critic", "labels", r"labels has a head \(score\.weight\) with 2 outputs"),
    ("critic", "segments", "no model of values can be made of this one"),
    ("reward.model", "nowhere", "nowhere does not exist"),
    ("reward.model", "policy_like", r"policy_like has no head \(score\.weight\)"),
]


@pytest.mark.parametrize("kind", ["inline", "apart"])
@pytest.mark.parametrize(("key", "name", "said"), WRONG)
def test_a_path_that_is_none_ends_the_run_before_its_warm_up(folders, tmp_path, kind, key, name, said):
    path = given(tmp_path, key, folders / name, kind=kind)
    with pytest.raises(ConfigError, match=rf"{key.replace('.', '[.]')}[.]path.*{said}"):
        train(load(path), Launch(recipe=str(path)))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_layout_that_cannot_be_ends_the_run_before_its_warm_up(folders, tmp_path):
    path = given(tmp_path, "critic", folders / "judge", kind="apart")
    run = load(path, ["placement.learners=2", "critic.layout.shard=3"])
    with pytest.raises(ConfigError, match=r"critic[.]layout"):
        train(run, Launch(recipe=str(path)))


SHORT = [
    ("reference", "policy_like of few"),
    ("reference", "policy_like of a window"),
    ("critic", "judge of few"),
    ("critic", "policy_like of a window"),
    ("reward.model", "judge of few"),
]
"""With positions for all but one of the tokens of prompt (24) and answer (12)."""


@pytest.mark.parametrize("kind", ["inline", "apart"])
@pytest.mark.parametrize(("key", "name"), SHORT)
def test_a_model_with_too_few_positions_ends_the_run_before_its_warm_up(folders, tmp_path, kind, key, name):
    path = given(tmp_path, key, folders / name, kind=kind)
    said = (
        rf"^{re.escape(key)}\.path=.*{name} has 35 positions, .*24 tokens\) and .*_tokens=12 make 36; lower"
    )
    with pytest.raises(ConfigError, match=said):
        train(load(path), Launch(recipe=str(path)))
    look = "reward" if key == "reward.model" else "lengths"
    lines = [line for line in check(load(path)) if line.status == "problem"]
    assert [line.name for line in lines] == [look] and "35 positions" in lines[0].text
    fits = load(path, ["sampling.max_answer_tokens=11"])
    assert not list(too_short(fits, 24, 24)) and not [
        line for line in check(fits) if line.status == "problem"
    ]


def test_only_the_reward_model_reads_answers_to_held_out_questions(folders, tmp_path):
    short = folders / "judge of few"
    path = given(tmp_path, "critic", short)
    run = load(path, ["reward.model.path=" + str(short)])
    assert [key for key, _ in too_short(run, 23, 24)] == ["reward.model.path"]
    assert [key for key, _ in too_short(run, 24, 24)] == ["critic.path", "reward.model.path"]


@pytest.mark.parametrize(("key", "name"), [("reference", "wide"), ("critic", "labels")])
def test_the_check_says_the_same_and_leaves_out_what_needs_it(folders, tmp_path, key, name):
    found = [
        (line.status, line.name, line.text) for line in check(load(given(tmp_path, key, folders / name)))
    ]
    problems = [(look, text) for status, look, text in found if status == "problem"]
    assert [look for look, _ in problems] == ["model"] and f"{key}.path={folders / name} has " in problems[0][
        1
    ]
    assert ("warning", "memory", "not checked: model has a problem") in found


@pytest.mark.parametrize(
    ("key", "name"), [("reference", "policy_like"), ("critic", "judge"), ("critic", "policy_like")]
)
def test_a_sound_one_passes_and_no_random_number_is_drawn(folders, tmp_path, key, name):
    run = load(given(tmp_path, key, folders / name))
    before = torch.random.get_rng_state()
    check_models(run, tokenizer_of(run.model))
    assert torch.equal(torch.random.get_rng_state(), before)
    lines = [line.text for line in check(run) if line.name == "model" and line.status == "ok"]
    assert any(text.startswith(f"{key}.path={folders / name}: fits the policy") for text in lines)


def test_a_path_that_is_not_needed_is_not_looked_at(tmp_path):
    path = recipe(tmp_path, reference={"path": "/nowhere"}, critic={"path": "/nowhere"})
    run = load(path, ["algorithm.kl.coef=0"])
    check_models(run, tokenizer_of(run.model))
