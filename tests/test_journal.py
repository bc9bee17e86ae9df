"""Metrics, sinks, rollout records: what a run writes down, and what cannot stop it."""

import logging
import math
import time
from pathlib import Path

import pytest

from journal_run import groups, run_of
from tandem.errors import RunError
from tandem.journal import METRICS, Journal, Timer, document_metrics, read_metrics, repeatable, rollouts
from tandem.journal.metrics import metric, throughput

ROOT = Path(__file__).parents[1]


def test_every_line_is_a_json_object_that_is_on_disk_at_once(tmp_path):
    journal = Journal(run_of(tmp_path), tmp_path / "r")
    for step in range(3):
        journal.log(step, {"reward/mean": step / 3, "actor/updates": 1})
        assert read_metrics(tmp_path / "r" / "metrics.jsonl")[-1] == {
            "step": step,
            "reward/mean": step / 3,
            "actor/updates": 1,
        }
    journal.close()


def test_values_that_are_not_finite_become_null_and_are_named(tmp_path):
    with Journal(run_of(tmp_path), tmp_path) as journal:
        journal.log(1, {"grad_norm": math.nan, "actor/loss": -math.inf, "reward/mean": 0.5})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["grad_norm"] is None and row["actor/loss"] is None and row["reward/mean"] == 0.5
    assert row["nonfinite"] == ["grad_norm", "actor/loss"]


def test_a_name_outside_the_table_cannot_be_logged(tmp_path):
    journal = Journal(run_of(tmp_path), tmp_path)
    with pytest.raises(AssertionError, match="reward/avg"):
        journal.log(1, {"reward/avg": 1.0})
    journal.log(1, {"reward/parts/my_module:score": 1.0})
    assert metric("reward/parts/") is None
    assert metric("reward/parts/~/r(1)+x, y@2.py:score") is METRICS["reward/parts/<function>"]
    assert metric("reward/parts/acc") is METRICS["reward/parts/<function>"]


def test_the_metric_reference_is_the_table():
    written = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    fresh = (
        "python -c 'from tandem.journal import document_metrics as d; print(d(), end=\"\")' > docs/metrics.md"
    )
    assert written == document_metrics(), f"docs/metrics.md is out of date: {fresh}"
    assert all(f"| `{name}` |" in written for name in METRICS)


def test_only_clock_and_memory_differ_between_equal_runs():
    changing = {name for name in METRICS if not repeatable(name)}
    assert {"timing/all", "e2e_tps", "memory/rss_mb"} <= changing
    assert all(name.startswith(("timing/", "memory/")) or name.endswith("_tps") for name in changing)


def test_rates_count_generated_tokens_once_and_prompts_only_end_to_end():
    seconds = {"timing/all": 4.0, "timing/rollout": 2.0, "timing/update": 0.0}
    assert throughput(100, 60, seconds) == {"e2e_tps": 40.0, "rollout_tps": 30.0}


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    def steps(journal: Journal, first: int, last: int) -> None:
        for step in range(first, last):
            journal.log(step, {"reward/mean": math.sin(step)})
            journal.record(step, groups(step))

    run = run_of(tmp_path)
    with Journal(run, tmp_path / "whole") as whole:
        steps(whole, 0, 10)
    with Journal(run, tmp_path / "torn") as torn:
        steps(torn, 0, 7)
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "reward/me')
    (tmp_path / "torn" / "rollouts" / "step_00000007.jsonl.tmp").write_text("{")
    with Journal(run, tmp_path / "torn") as resumed:
        resumed.rewind(4)
        steps(resumed, 5, 10)
    for file in ("metrics.jsonl", *(f"rollouts/step_{step:08d}.jsonl" for step in range(10))):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "torn" / file).read_bytes()
    assert len(list((tmp_path / "torn" / "rollouts").iterdir())) == 10


def test_rewind_to_before_the_first_step_forgets_everything(tmp_path):
    run = run_of(tmp_path, "journal.sinks=[tensorboard]")
    with Journal(run, tmp_path / "r") as journal:
        journal.log(0, {"eval/accuracy": 0.1})
        journal.record(0, groups())
    with Journal(run, tmp_path / "r") as journal:
        journal.rewind(-1)
    assert read_metrics(tmp_path / "r" / "metrics.jsonl") == []
    assert not list((tmp_path / "r" / "rollouts").iterdir()) and not (tmp_path / "r" / "tensorboard").exists()


def test_a_run_that_goes_on_before_its_first_step_keeps_its_warmup(tmp_path):
    run = run_of(tmp_path, "journal.sinks=[tensorboard]")
    with Journal(run, tmp_path / "r") as journal:
        journal.log(0, {"warmup/update": 0, "warmup/loss": 2.0})
        journal.log(0, {"eval/accuracy": 0.1})
        journal.record(0, groups())
    with Journal(run, tmp_path / "r") as journal:
        journal.rewind(-1, keep_warmup=True)
    assert [row["warmup/loss"] for row in read_metrics(tmp_path / "r" / "metrics.jsonl")] == [2.0]
    assert not list((tmp_path / "r" / "rollouts").iterdir()) and (tmp_path / "r" / "tensorboard").exists()


def test_a_torn_last_line_is_replaced_by_the_next_whole_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    with Journal(run_of(tmp_path), tmp_path) as journal:
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
        journal.log(2, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_that_could_not_be_written_wait_and_the_failure_is_told_once(tmp_path, caplog):
    folder = tmp_path / "r"
    journal = Journal(run_of(tmp_path), folder)
    journal.log(1, {})
    folder.rename(tmp_path / "away")
    with caplog.at_level(logging.WARNING):
        journal.log(2, {})
        journal.log(3, {})
    assert len([r for r in caplog.records if "training goes on" in r.message]) == 1
    (tmp_path / "away").rename(folder)
    journal.log(4, {})
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, a device on which every write fails"
)
def test_a_full_disk_stops_neither_metrics_nor_training(tmp_path, caplog):
    journal = Journal(run_of(tmp_path), tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        journal.log(1, {"reward/mean": 0.5})
    assert "lines wait in memory" in caplog.text
    path.unlink()
    journal.close()
    assert read_metrics(path) == [{"step": 1, "reward/mean": 0.5}]


def test_rollouts_that_cannot_be_written_are_told_once_and_left_out(tmp_path, caplog):
    journal = Journal(run_of(tmp_path), tmp_path)
    (tmp_path / "rollouts").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert journal.record(1, groups()) is None
        assert journal.record(2, groups()) is None
    assert len([r for r in caplog.records if "no longer recorded" in r.message]) == 1


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        Journal(run_of(tmp_path), tmp_path / "file" / "r")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rollouts_read_back_as_they_were(form, tmp_path):
    written = groups()
    path = rollouts.write(tmp_path, 12, written, form, advantages=[0.5, 0.0, -0.5, math.nan])
    assert path.name == f"step_00000012.{form}" and [p.name for p in tmp_path.iterdir()] == [path.name]
    rows = rollouts.read(path)
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [(7, 0), (7, 1), (8, 0), (8, 1)]
    first, failed, unscored, wrong = rows
    rollout = written[0].rollouts[0]
    assert first["tokens"] == list(rollout.tokens) and first["sampled"] == list(rollout.sampled)
    assert first["logp"] == list(rollout.logp[2:]) and first["policy_logp"] == list(rollout.policy_logp[2:])
    assert first["parts"] == {"answer_number": 1.0, "overlong": -0.25} and first["reward"] == 1.0
    assert (first["question"], first["prompt"], first["truth"], first["answer"]) == (
        "1+1?",
        "<q>1+1?",
        "2",
        "2\n",
    )
    assert (failed["reward"], failed["failure"], failed["detail"]) == (None, "timeout", "10 s")
    assert (unscored["reward"], unscored["failure"], unscored["finish"]) == (None, None, "length")
    assert (unscored["truth"], unscored["question"]) == (None, "ü?")
    assert unscored["answer"].startswith("\x1b[2J")
    assert [r["advantage"] for r in rows] == [0.5, 0.0, -0.5, None]
    assert wrong["oldest_version"] == 3 and wrong["newest_version"] == 4 and wrong["step"] == 12
    assert wrong["versions"] == [3, 4]


def test_rollouts_are_recorded_only_as_often_as_asked(tmp_path):
    journal = Journal(run_of(tmp_path, "journal.rollouts_every=3", "journal.rollouts=parquet"), tmp_path)
    kept = [journal.record(step, groups()) for step in range(1, 7)]
    assert [p and p.name for p in kept] == [None, None, "step_00000003.parquet"] * 1 + [
        None,
        None,
        "step_00000006.parquet",
    ]
    assert Journal(run_of(tmp_path, "journal.rollouts=none"), tmp_path).record(3, groups()) is None


def test_a_timer_adds_up_each_stage_and_starts_again():
    waits = []
    timer = Timer(synchronize=lambda: waits.append(1))
    with timer("all"):
        for _ in range(2):
            with timer("rollout"):
                time.sleep(0.02)
    taken = timer.take()
    assert set(taken) == {"timing/all", "timing/rollout"}
    assert 0.04 <= taken["timing/rollout"] <= taken["timing/all"] < 1.0
    assert len(waits) == 6 and timer.take() == {}


def test_a_jump_of_the_wall_clock_moves_no_timer(monkeypatch):
    timer = Timer()
    with timer("all"):
        real = time.time()
        monkeypatch.setattr(time, "time", lambda: real - 3600)
    assert 0 <= timer.take()["timing/all"] < 1.0
