"""The curve and the closing report."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from journal_run import run_of
from tandem.errors import RunError
from tandem.journal import Journal, Summary, draw, read_metrics, sample_answers, visible
from tandem.train.run import eval_figures
from tandem.types import Group, Prompt, Rollout, Score


def group(row: int, answer: str, score: Score) -> Group:
    prompt = Prompt(id=row, tokens=(1,), text="q", question=f"[b]{row}+1?[/b]", truth=str(row + 1), row={})
    rollout = Rollout(
        tokens=(1, 2),
        sampled=(False, True),
        logp=(0.0, -1.0),
        policy_logp=(0.0, -1.0),
        text=answer,
        finish="stop",
        versions=(-1, 0),
        score=score,
    )
    return Group(prompt=prompt, rollouts=(rollout,))


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    console.print(table)
    return console.file.getvalue()


def test_control_characters_of_model_text_are_shown_and_never_sent():
    hostile = "a\x1b]0;owned\x07\r\x00\u202egnp\u200b\ud800\x9b31m\nb"
    assert visible(hostile) == "a\\x1b]0;owned\\x07\\r\\x00\\u202egnp\\u200b\\ud800\\x9b31m\nb"
    assert visible("é 中 😀 [bold]") == "é 中 😀 [bold]"
    assert visible("x" * 700) == "x" * 600 + " [100 more]"


def test_answers_before_and_after_stand_side_by_side_by_question():
    before = [
        group(1, "no \x1b[31mred[/b]", Score(reward=0.0)),
        group(2, "?", Score(failure="timeout", detail="10 s")),
        group(3, "hidden by count", Score(reward=0.0)),
    ]
    after = [group(2, "three", Score(reward=1.0)), group(1, "two", Score(reward=0.5))]
    after += [group(3, "hidden by count", Score(reward=0.0))]
    text = shown(sample_answers(after, before, count=2))
    assert "no \\x1b[31mred[/b]" in text and "[b]1+1?[/b]" in text
    first = next(line for line in text.splitlines() if "[b]1+1?" in line)
    assert "two" in first and "three" not in first
    assert "reward 0.5" in text and "no reward (timeout)" in text and "hidden" not in text
    assert "after" not in shown(sample_answers(before, count=2))


@pytest.fixture
def metrics(tmp_path) -> Path:
    with Journal(run_of(tmp_path), tmp_path) as journal:
        for step in range(61):
            noise = 0.08 * math.sin(step * 12.9898) * math.cos(step * 4.1)
            level = 0.05 + 0.85 / (1 + math.exp(-(step - 25) / 7))
            if step:
                journal.log(step, {"reward/mean": level + noise})
            if step % 10 == 0:
                values = {"eval/accuracy": level - 0.02, "eval/greedy_accuracy": min(level + 0.06, 1)}
                journal.log(step, values)
    return tmp_path / "metrics.jsonl"


def ink(png: Path) -> tuple[int, int, set[tuple[int, int, int]]]:
    from matplotlib.image import imread

    pixels = (imread(png)[:, :, :3] * 255).round().astype(int)
    return pixels.shape[1], pixels.shape[0], {tuple(p) for p in pixels.reshape(-1, 3)}


def test_the_curve_shows_reward_and_both_accuracies(metrics, tmp_path):
    width, height, colors = ink(draw(metrics, tmp_path / "out" / "curve.png"))
    assert width >= 1200 and 2.5 < width / height < 3.5
    assert {(0x2F, 0x6F, 0x9F), (0xB3, 0x54, 0x1E), (0x4C, 0x8C, 0x4A)} <= colors


def test_a_run_without_evaluation_has_a_curve_of_one_panel(tmp_path):
    with Journal(run_of(tmp_path), tmp_path) as journal:
        for step in range(1, 5):
            journal.log(step, {"reward/mean": step / 5, "grad_norm": math.nan})
    width, height, colors = ink(draw(tmp_path / "metrics.jsonl", tmp_path / "curve.png"))
    assert width / height < 2 and (0x2F, 0x6F, 0x9F) in colors and (0xB3, 0x54, 0x1E) not in colors


def test_a_curve_of_nothing_is_refused(tmp_path):
    with Journal(run_of(tmp_path), tmp_path) as journal:
        journal.log(0, {"warmup/loss": 1.0})
    with pytest.raises(RunError, match="no reward and no accuracy"):
        draw(tmp_path / "metrics.jsonl", tmp_path / "curve.png")


def summary(**changes) -> Summary:
    values = {
        "recipe": "recipes/runs/quickstart.yaml",
        "steps": 60,
        "seconds": 150.0,
        "start": {"eval/accuracy": 0.125, "eval/truncated_share": 0.0},
        "end": {"eval/accuracy": 0.75, "eval/truncated_share": 0.0},
    }
    return Summary(**values | changes)


def test_the_summary_names_figures_versions_and_hardware(tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("PROBE_SECRET", "quickstart")
    summary().write(tmp_path / "summary.json", run_of(tmp_path, "seed=5"), "cpu, 2 threads")
    text = (tmp_path / "summary.json").read_text()
    record = json.loads(text)
    assert (record["start"]["eval/accuracy"], record["end"]["eval/accuracy"]) == (0.125, 0.75)
    assert (record["steps"], record["began"], record["seconds"], record["seed"]) == (60, 0, 150.0, 5)
    assert record["versions"]["torch"] == torch.__version__ and "tandem" in record["versions"]
    assert record["hardware"]["cpu"] and record["hardware"]["cores"] >= 1
    assert record["hardware"]["device"] == "cpu, 2 threads"
    assert "quickstart" not in text, "values of secret variables are redacted"


def test_a_share_that_could_not_be_taken_is_left_out(tmp_path):
    with Journal(run_of(tmp_path), tmp_path) as journal:
        journal.log(0, {"eval/accuracy": math.nan, "eval/response_length": 5.0})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    figures = eval_figures(row)
    assert figures == {"eval/response_length": 5.0}
    (tmp_path / "metrics.jsonl").write_text("")
    assert "accuracy, sampled" not in summary(start=figures, end=figures).closing(run_of(tmp_path), tmp_path)


def test_the_last_words_say_what_came_of_it_where_it_lies_and_what_is_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    said = summary().closing(run_of(tmp_path), tmp_path)
    assert said.startswith("60 steps in 2 min 30 s.")
    assert "accuracy, sampled: 0.125 -> 0.750" in said
    assert "metrics.jsonl" in said and "curve.png" not in said
    assert "steps=20   # accuracy has room to rise" in said
    cut = summary(end={"eval/accuracy": 0.75, "eval/truncated_share": 0.5})
    assert "sampling.max_answer_tokens=512" in cut.closing(run_of(tmp_path), tmp_path)
    done = summary(end={"eval/accuracy": 0.95})
    assert "algorithm.preset=dr_grpo" in done.closing(run_of(tmp_path), tmp_path)
    resumed = summary(began=50).closing(run_of(tmp_path), tmp_path)
    assert resumed.startswith("10 steps after the first 50 in 2 min 30 s.")
    assert summary(steps=0).closing(run_of(tmp_path), tmp_path).startswith("0 steps in 2 min 30 s.")
