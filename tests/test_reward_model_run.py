"""A whole run with a reward model: it learns what the model likes, is the same run on processes of Ray, and is
evaluated with the model afterwards."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from ray_runs import SMALL, trajectory
from small_recipe import recipe
from tandem.config import load
from tandem.data import tasks
from tandem.device import pick
from tandem.errors import ConfigError, DataError
from tandem.journal import read_metrics
from tandem.model import tokenizer_of
from tandem.model.new import new_tokenizer
from tandem.placement.cluster.learners import Learners
from tandem.talk.evaluate import measure, settings_of
from tandem.talk.place import locate
from tandem.talk.speaker import open_model
from tandem.train.check import check
from tandem.train.layouts import check_layouts
from tandem.train.run import Launch, train
from tiny_models import classifier, row_scores, spelled
from tiny_models import language_model as byte_model

RAY = {"cpus": 1, "start_timeout_s": 300, "engine_timeout_s": 180, "learner_timeout_s": 180}
KINDS = [1, 0, "model", "rule", "model"]
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    """Stored in bf16, so that a learner's fp32 weights are memory of its own and not mapped from the file."""
    folder = classifier(tmp_path_factory.mktemp("judge") / "judge")
    weights = load_file(folder / "model.safetensors")
    short = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fp32_bytes(file: Path) -> int:
    return sum(4 * weight.numel() for weight in load_file(file).values())


def recipe_in(folder: Path, judge: Path, **changes) -> Path:
    """Three steps with a function, a model, a reference and evaluation; a step has four units."""
    folder.mkdir(exist_ok=True)
    judged = {
        "steps": 3,
        "reward": {"model": {"path": str(judge), "weight": 0.5}, "overlong_buffer": 2},
        "eval": SMALL["eval"] | {"every": 2},
        "learner": {"optimizer": {"lr": 1e-3}, "tokens_per_forward": 48},
    }
    return recipe(folder, **SMALL | judged | changes)


def columned(folder: Path, judge: Path) -> dict:
    """The changes of a recipe whose data says which rows are for the functions, and which for the model."""
    for name in ("addition", "addition:test"):
        rows = [row | {"kind": KINDS[i % 5]} for i, row in enumerate(tasks.rows(name)[:40])]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": {"train": str(folder / "addition.jsonl"), "eval": str(folder / "addition:test.jsonl")},
        "reward": {
            "functions": [{"name": f"{folder / 'own.py'}:even", "weight": 2.0}],
            "model": {"path": str(judge), "weight": 0.5},
            "column": "kind",
            "overlong_buffer": 2,
        },
    }


def run_in(folder: Path, judge: Path, **changes) -> list[dict]:
    path = recipe_in(folder, judge, **changes)
    train(load(path), Launch(recipe=str(path)))
    return trajectory(folder / "run")


@pytest.fixture(scope="module")
def inline(tmp_path_factory, judge) -> dict[int, Path]:
    """The folders of two runs in one process, without lag and with; with lag the data says who scores a row."""
    folders = {lag: tmp_path_factory.mktemp(f"lag{lag}") for lag in (0, 1)}
    run_in(folders[0], judge)
    run_in(folders[1], judge, sampling={"max_lag": 1}, **columned(folders[1], judge))
    return folders


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(folder: Path) -> list[dict]:
    return [row for row in read_metrics(folder / "run" / "metrics.jsonl") if "reward/mean" in row]


def test_the_model_is_a_part_of_the_reward_with_its_own_times(inline):
    for row in steps(inline[0]):
        even, judged = (next(row[n] for n in row if n.startswith("reward/parts/") and n.endswith(e)) for e in (
            ":even", "reward_model"
        ))  # fmt: skip
        total = even + 0.5 * judged + row["reward/parts/overlong"]
        assert row["reward/mean"] == pytest.approx(total) and abs(judged) > 1e-3
        assert 0 < row["timing/reward_model"] <= row["timing/non_overlap_reward_model"]


def rollouts(folder: Path) -> list[dict]:
    """What was answered and how it was scored; a function has its folder in its name."""
    files = sorted((folder / "run" / "rollouts").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    names = ("step", "question", "answer", "tokens", "reward")
    return [
        {name: row[name] for name in names}
        | {"parts": {name.rpartition(":")[2]: value for name, value in row["parts"].items()}}
        for row in rows
    ]


def test_each_row_is_scored_by_the_side_that_its_column_names(inline, judge):
    """And a metric is the mean over the answers that have the part."""
    made = rollouts(inline[1])
    kinds = {row["question"]: row["kind"] for row in rows_in(inline[1] / "addition.jsonl")}
    sides = {
        kind: [row for row in made if (kinds[row["question"]] in (1, "rule")) is (kind == "rule")]
        for kind in ("rule", "model")
    }
    assert len(made) == 48 and min(map(len, sides.values())) >= 12
    for row in sides["rule"]:
        parts = row["parts"]
        assert parts.keys() == {"even", "overlong"} and parts["even"] == (len(row["answer"]) % 2 == 0)
        assert row["reward"] == 2 * parts["even"] + parts["overlong"]
    for row in sides["model"]:
        parts = row["parts"]
        assert parts.keys() == {"reward_model", "overlong"}
        assert row["reward"] == 0.5 * parts["reward_model"] + parts["overlong"]
    scores = row_scores(judge, [row["tokens"] for row in sides["model"]])
    assert [row["parts"]["reward_model"] for row in sides["model"]] == pytest.approx(scores, abs=1e-5)
    for row in steps(inline[1]):
        mine = [other["parts"]["reward_model"] for other in sides["model"] if other["step"] == row["step"]]
        assert row.get("reward/parts/reward_model") == (pytest.approx(fmean(mine)) if mine else None)


@needs_ray
@pytest.mark.parametrize("lag", [0, 1])
def test_apart_it_is_the_run_of_one_process(inline, judge, tmp_path, lag):
    """Units are scored beside sampling, and with lag between the calls of updates, of rows for the model alone."""
    apart = {"placement": {"kind": "apart", **RAY}, "sampling": {"max_lag": lag}}
    if lag:
        apart |= columned(tmp_path, judge)
    assert run_in(tmp_path, judge, **apart) == trajectory(inline[lag] / "run")
    assert rollouts(tmp_path) == rollouts(inline[lag])
    # With lag all answers are there, and scored, before the last step begins.
    assert [row["timing/reward_model"] > 0 for row in steps(tmp_path)] == [True, True, not lag]


@needs_ray
def test_colocated_it_takes_turns_with_engines_and_sleeps_with_the_learners(
    inline, judge, tmp_path, monkeypatch
):
    """An evaluation asks the engines twice for answers of one version, with the reward model in between."""
    left, call = [], Learners.call

    def watched(self, method, *rest, **more):
        value = call(self, method, *rest, **more)
        if method == "sleep":
            left.append(value)
        return value

    monkeypatch.setattr(Learners, "call", watched)
    learner = {"optimizer": {"lr": 1e-3}, "tokens_per_forward": 48, "sleep": True}
    colocated = {"placement": {"kind": "colocated", **RAY}, "learner": learner}
    assert run_in(tmp_path, judge, **colocated) == trajectory(inline[0] / "run")
    policy = fp32_bytes(tmp_path / "run" / "model" / "model.safetensors")
    scoring = fp32_bytes(judge / "model.safetensors")
    assert 2 * policy + scoring <= left[0] < 3 * policy + scoring


@needs_ray
def test_two_learners_with_a_layout_of_its_own_do_what_one_does(inline, judge, tmp_path):
    spread = {
        "placement": {"kind": "apart", **RAY, "learners": 2},
        "reward": {
            "model": {"path": str(judge), "weight": 0.5, "layout": {"tensor": 2}},
            "overlong_buffer": 2,
        },
    }
    run_in(tmp_path, judge, **spread)
    for row, other in zip(steps(tmp_path), steps(inline[0]), strict=True):
        for name in ("reward/mean", "reward/parts/reward_model", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_the_finished_run_is_evaluated_with_it(inline):
    place = locate(str(inline[0] / "run"))
    run = settings_of(place, None, [])
    found = measure(run, open_model(place, pick("cpu")), place.given).evaluation.figures
    last = read_metrics(inline[0] / "run" / "metrics.jsonl")[-1]
    assert found == pytest.approx({name: last[name] for name in found}, abs=1e-6)
    alone = settings_of(place, None, ["reward.model=null"])
    without = measure(alone, open_model(place, pick("cpu")), place.given).evaluation.figures
    assert abs(without["eval/reward"] - found["eval/reward"]) > 1e-3


def test_accuracy_is_that_of_the_questions_which_the_term_scores(inline):
    place = locate(str(inline[1] / "run"))
    run = settings_of(place, None, [])
    result = measure(run, open_model(place, pick("cpu")), place.given)
    found = result.evaluation
    assert f"at temperature 1, 3 questions judged by {run.correct})" in result.sentence()
    last = read_metrics(inline[1] / "run" / "metrics.jsonl")[-1]
    assert found.figures == pytest.approx({name: last[name] for name in found.figures}, abs=1e-6)
    marks = [len(g.rollouts[0].text) % 2 == 0 for g in found.greedy if g.prompt.row["kind"] in (1, "rule")]
    assert len(found.greedy) == 8 and len(marks) == 3
    assert found.figures["eval/greedy_accuracy"] == fmean(marks)


def test_what_the_column_cannot_say_is_told_before_the_run(judge, tmp_path):
    """By the check, and by the run before its first step."""
    path = recipe_in(tmp_path, judge, **columned(tmp_path, judge))
    sound = findings(path)
    assert ("ok", "reward.column=kind: 16 questions for the functions, 24 for the model") in sound["reward"]
    assert not [text for lines in sound.values() for status, text in lines if status == "problem"]
    rows = rows_in(tmp_path / "addition.jsonl")
    wrong, alone = tmp_path / "wrong.jsonl", tmp_path / "alone.jsonl"
    wrong.write_text(
        "".join(json.dumps(row | {"kind": 3 if i == 7 else 0}) + "\n" for i, row in enumerate(rows))
    )
    alone.write_text("".join(json.dumps(row | {"kind": 0}) + "\n" for row in rows))
    for key in ("data.train", "data.eval"):
        said = f"{wrong}:8: column 'kind' (reward.column): expected 1 or rule, 0 or model, got 3"
        assert said in findings(path, f"{key}={wrong}")[key][0][1]
        with pytest.raises(DataError, match=re.escape(said)):
            train(load(path, [f"{key}={wrong}"]), Launch(recipe=str(path)))
    said = rf"even scores none of the 8 questions of data\.eval={alone}.*set eval\.correct to one of \['reward_model'\]"
    with pytest.raises(ConfigError, match=said):
        train(load(path, [f"data.eval={alone}"]), Launch(recipe=str(path)))
    idle = findings(path, f"data.train={alone}", f"data.eval={alone}", "eval.correct=reward_model")["reward"]
    assert [status for status, _ in idle] == ["ok", "warning"] and "one of the two has nothing" in idle[1][1]


def findings(path: Path, *overrides: str) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for line in check(load(path, overrides)):
        found.setdefault(line.name, []).append((line.status, line.text))
    return found


def test_check_counts_it_and_tells_what_is_wrong_with_it(judge, tmp_path):
    path = recipe_in(tmp_path, judge)
    sound = findings(path)
    assert sound["reward"][0][0] == "ok" and "its head is there" in sound["reward"][0][1]
    assert not [text for lines in sound.values() for status, text in lines if status == "problem"]
    size = fp32_bytes(judge / "model.safetensors")
    assert f"reward model {size / 1000:.0f} kB" in sound["memory"][0][1]
    missing = findings(path, "reward.model.path=/nowhere", "reward.functions=[]")
    assert [text for status, text in missing["reward"] if status == "problem"] == [
        "reward.model.path=/nowhere does not exist; give the folder of a Hugging Face model"
    ]
    short = findings(path, "sampling.max_answer_tokens=127")
    assert "128 positions, fewer than the" in short["reward"][0][1]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"tensor": 4}, r"reward\.model\.layout\.tensor=4 does not"),
        ({"shard": 3}, r"reward\.model\.layout: .*shard=3"),
    ],
    ids=str,
)
def test_a_layout_that_it_cannot_have_is_refused_before_anything_starts(judge, tmp_path, layout, said):
    spread = {"placement": {"kind": "apart", "learners": 4}}
    made = load(recipe_in(tmp_path, judge, **spread), [f"reward.model.layout={layout}"])
    with pytest.raises(ConfigError, match=said):
        check_layouts(made, tokenizer_of(made.model))


def fond_of(text: str, folder: Path) -> Path:
    """A reward model whose score rises with the share of these characters among all tokens of a row: its one layer
    takes the mean of what it reads, in which these characters alone point to the second axis."""
    config = Qwen2Config(
        vocab_size=264,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=256,
    )
    network = Qwen2ForSequenceClassification(config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        network.model.embed_tokens.weight[:, 0] = 1.0
        network.model.embed_tokens.weight[spelled(byte_model(), text)] = torch.eye(8)[1]
        attention = network.model.layers[0].self_attn
        attention.v_proj.weight.copy_(torch.eye(8))
        attention.o_proj.weight.copy_(torch.eye(8))
        network.score.weight[0, 1] = 1.0
    network.save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("permute", [False, True])
def test_the_policy_learns_what_the_model_likes(permute, random_folder, make_run, quiet, tmp_path):
    """With scores dealt out at random it does not."""
    run = make_run(
        random_folder,
        steps=15,
        sampling={"prompts_per_step": 16, "answers_per_prompt": 8, "max_answer_tokens": 12},
        reward={
            "functions": [],
            "model": {"path": str(fond_of("0123456789", tmp_path / "fond"))},
            "permute": permute,
        },
        learner={"optimizer": {"lr": 5e-3}},
    )
    train(run, quiet)
    rows = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    gain = fmean(rewards[-3:]) - fmean(rewards[:3])
    assert (abs(gain) < 0.15) if permute else (gain > 0.4), gain
