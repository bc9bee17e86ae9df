"""Console, TensorBoard and W&B: what they show, what they must not show, and how they fail."""

import errno
import importlib.util
import io
import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from journal_run import groups, run_of
from tandem.config import redact
from tandem.errors import ConfigError
from tandem.journal import Journal, read_metrics, sinks
from tandem.types import Group, Rollout, Score

ROOT = Path(__file__).parents[1]
HAS_WANDB = importlib.util.find_spec("wandb") is not None
CANARY = "CANARY-6f1d0b57a2"


def scalars(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_holds_every_value_and_hides_what_a_resume_repeats(tmp_path):
    run = run_of(tmp_path, "journal.sinks=[tensorboard]")
    with Journal(run, tmp_path) as journal:
        journal.log(0, {"warmup/update": 400, "warmup/loss": 0.25})
        for step in range(1, 7):
            journal.log(step, {"reward/mean": step * 0.5, "grad_norm": math.nan})
    time.sleep(1.1)  # event files are named and ordered by the second
    with Journal(run, tmp_path) as journal:
        journal.rewind(4)
        journal.log(5, {"reward/mean": 50.0})
    events = scalars(tmp_path / "tensorboard")
    points = [(e.step, e.value) for e in events.Scalars("reward/mean")]
    assert points == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 50.0)]
    assert "grad_norm" not in events.Tags()["scalars"]
    assert [
        (e.step, e.value) for e in scalars(tmp_path / "tensorboard" / "warmup").Scalars("warmup/loss")
    ] == [(400, 0.25)]


def test_a_sink_that_breaks_is_dropped_with_one_warning_and_the_others_go_on(tmp_path, caplog):
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "the terminal is gone")

    console = Console(file=Broken(), force_terminal=False)
    run = run_of(tmp_path, "journal.sinks=[console, tensorboard]")
    with caplog.at_level(logging.WARNING), Journal(run, tmp_path, console) as journal:
        for step in range(1, 4):
            journal.log(step, {"reward/mean": 1.0})
    warnings = [r.message for r in caplog.records if "console sink failed" in r.message]
    assert len(warnings) == 1 and "training goes on" in warnings[0]
    assert len(scalars(tmp_path / "tensorboard").Scalars("reward/mean")) == 3
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_training_outlives_the_reader_of_its_pipe(tmp_path):
    run_of(tmp_path)
    code = (
        "import sys; from pathlib import Path; from tandem.config import load\n"
        "from tandem.journal import Journal\n"
        "sys.stdin.readline()\n"
        "run = load('run.yaml', ['journal.sinks=[console]'])\n"
        "with Journal(run, Path('r')) as journal:\n"
        "    for step in range(1, 4): journal.log(step, {'reward/mean': 1.0})\n"
    )
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT / "src")}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=pipe, stdout=pipe, stderr=pipe
    ) as child:
        child.stdout.close()
        child.stdin.write(b"go\n")
        child.stdin.close()
        told = child.stderr.read().decode()
    assert child.returncode == 0, told
    assert [row["step"] for row in read_metrics(tmp_path / "r" / "metrics.jsonl")] == [1, 2, 3]
    assert told.count("training goes on") == 1


def test_a_sink_that_cannot_open_is_dropped(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with (
        caplog.at_level(logging.WARNING),
        Journal(run_of(tmp_path, "journal.sinks=[tensorboard]"), tmp_path) as j,
    ):
        j.log(1, {"reward/mean": 1.0})
    assert "tensorboard sink failed" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_away_from_a_terminal_the_console_gets_one_plain_line_per_step(tmp_path):
    out = io.StringIO()
    run = run_of(tmp_path, "journal.sinks=[console]")
    with Journal(run, tmp_path, Console(file=out, force_terminal=False, width=60)) as journal:
        journal.log(0, {"warmup/update": 40, "warmup/loss": 1.5})
        journal.log(0, {"eval/accuracy": 0.25, "eval/greedy_accuracy": 0.5})
        journal.log(1, {"reward/mean": 0.125, "response_length/mean": 33.6, "e2e_tps": 12345.6})
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 0/10  warm-up 40  loss 1.500"
    assert lines[1] == "step 0/10  accuracy 0.250  greedy 0.500"
    assert lines[2] == "step 1/10  accuracy 0.250  greedy 0.500  reward 0.125  length 34  12,346 tokens/s"
    assert len(lines) == 3


def test_the_time_left_is_that_of_steps_and_not_of_the_first_nor_the_warm_up(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(sinks.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=120)
    sink = sinks.ConsoleSink(run_of(tmp_path, "steps=10"), tmp_path, 0, console)
    for seconds, step, metrics in [
        (90.0, 0, {"warmup/update": 1, "warmup/loss": 1.0}),
        (100.0, 0, {"reward/mean": 0.5, "timing/all": 9.0}),
        (102.0, 1, {"reward/mean": 0.5, "timing/all": 2.0}),
        (104.0, 2, {"reward/mean": 0.5, "timing/all": 2.0}),
    ]:
        clock[0] = seconds
        sink.write(step, metrics)
    *_, first, second, third = console.file.getvalue().splitlines()
    assert "left" not in first
    assert second.endswith("  0:16 left") and third.endswith("  0:14 left")


def test_on_a_terminal_the_console_shows_a_bar(tmp_path):
    out = io.StringIO()
    run = run_of(tmp_path, "journal.sinks=[console]")
    with Journal(run, tmp_path, Console(file=out, force_terminal=True, width=100)) as journal:
        journal.log(4, {"reward/mean": 0.125})
    assert "4/10" in out.getvalue() and "reward 0.125" in out.getvalue()


def test_the_bar_of_a_resumed_run_begins_with_the_steps_done(tmp_path):
    out = io.StringIO()
    run = run_of(tmp_path, "journal.sinks=[console]")
    with Journal(run, tmp_path, Console(file=out, force_terminal=True, width=100)) as journal:
        journal.rewind(6, keep_warmup=True)
        journal.progress("sampling")
        journal._shown_at = float("-inf")
        journal.progress("sampling")
    assert "7/10" in out.getvalue()


@pytest.mark.skipif(HAS_WANDB, reason="wandb is installed")
def test_a_sink_whose_package_is_missing_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # what an earlier run leaves looks like a package to Python
    with pytest.raises(ConfigError, match=r"journal\.sinks: wandb is not installed"):
        Journal(run_of(tmp_path, "journal.sinks=[wandb]"), tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed")
def test_wandb_records_offline_without_an_account_and_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_of(tmp_path, "journal.sinks=[wandb]")
    for step in (1, 2):
        with Journal(run, tmp_path / "r") as journal:
            journal.rewind(step - 1)
            journal.log(step, {"reward/mean": 0.5})
    kept = (tmp_path / "r" / "wandb_id").read_text().strip()
    # Folders carry the second they were made in, so the two may be one.
    assert list((tmp_path / "r" / "wandb").glob(f"offline-run-*-{kept}"))
    assert not [p for p in (tmp_path / "r" / "wandb").glob("offline-run-*") if not p.name.endswith(kept)]


def test_a_secret_reaches_no_file_of_the_journal(tmp_path, monkeypatch):
    run = run_of(
        tmp_path,
        "journal.sinks=[console, tensorboard]",
        f"reward.functions=[{{name: a, args: {{api_key: {CANARY}-1, url: 'https://me:{CANARY}-2@host/x'}}}}]",
    )
    monkeypatch.setenv("PROBE_TOKEN", f"{CANARY}-3")
    out = io.StringIO()
    group = groups()[0]
    failure = Score(failure="error", detail=f"401 for Authorization: Bearer {CANARY}-4 and {CANARY}-3")
    rollout = Rollout(**{f: getattr(group.rollouts[0], f) for f in Rollout.__slots__} | {"score": failure})
    with Journal(run, tmp_path / "r", Console(file=out)) as journal:
        journal.log(1, {"reward/mean": 1.0})
        journal.record(1, [Group(prompt=group.prompt, rollouts=(rollout,))])
    files = [path for path in (tmp_path / "r").rglob("*") if path.is_file()]
    assert len(files) == 3 and all(CANARY.encode() not in path.read_bytes() for path in files)
    assert CANARY not in out.getvalue()


def test_redaction_hides_credentials_and_nothing_else(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "tr0ub4dor&3")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-but-long")
    given = {
        "max_prompt_tokens": 512,
        "stop_tokens": [1, 2],
        "access_token": "abc",
        "url": "http://u:p@h/?api_key=0123456789&x=1",
        "text": "tr0ub4dor&3 and false-but-long, hf_" + "a" * 30,
        "nested": [{"Client-Secret": "s3cret", "name": "accuracy"}],
        "keyboard": "qwerty",
    }
    assert redact(given) == {
        "max_prompt_tokens": 512,
        "stop_tokens": [1, 2],
        "access_token": "[redacted]",
        "url": "http://[redacted]@h/?api_key=[redacted]&x=1",
        "text": "[redacted] and false-but-long, [redacted]",
        "nested": [{"Client-Secret": "[redacted]", "name": "accuracy"}],
        "keyboard": "qwerty",
    }
    assert json.dumps(redact("plain")) == '"plain"' and os.environ["MY_SERVICE_PASSWORD"]


def test_a_long_step_says_how_far_it_is(tmp_path, monkeypatch):
    run = run_of(tmp_path, "journal.sinks=[console]")
    terminal, plain = io.StringIO(), io.StringIO()
    with Journal(run, tmp_path / "a", Console(file=terminal, force_terminal=True, width=120)) as journal:
        journal._shown_at -= 2
        journal.progress("3 of 8 answers")
        journal.progress("4 of 8 answers")
    assert "3 of 8 answers" in terminal.getvalue()
    assert "4 of 8" not in terminal.getvalue(), "not more than once a second"
    with Journal(run, tmp_path / "b", Console(file=plain, width=120)) as journal:
        for doing in ("1 of 8 answers", "2 of 8 answers", "3 of 8 answers"):
            journal._shown_at -= 2
            journal.progress(doing)
            monkeypatch.setattr(sinks, "QUIET_S", 0.0 if doing.startswith("1") else 30.0)
        journal.log(1, {"reward/mean": 0.5})
    assert (
        "1 of 8" not in plain.getvalue() and "2 of 8" in plain.getvalue() and "3 of 8" not in plain.getvalue()
    )
