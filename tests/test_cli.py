"""The command line: what it says, where, with which exit code, and how quickly."""

import errno
import fcntl
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from ray_runs import wait_until
from small_recipe import environment, recipe, start, tandem
from tandem.checkpoint import newest, read_manifest
from tandem.cli import app
from tandem.commands import Commands
from tandem.config import load
from tandem.errors import DataError, RunError
from tandem.journal import read_metrics

COMMANDS = ("train", "show", "explain", "check", "plan", "generate", "chat", "eval", "convert")


def call(*arguments: object, **options: str):
    return CliRunner().invoke(app, list(map(str, arguments)), **options)


@pytest.mark.alone
def test_help_comes_within_half_a_second_and_names_every_command():
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        done = tandem("--help")
        seconds.append(time.perf_counter() - began)
    assert done.returncode == 0
    assert all(f" {name} " in done.stdout for name in COMMANDS)
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "algorithm.clip"], ["show", "RECIPE"]])
def test_commands_that_only_print_import_no_tensor_library(tmp_path, arguments):
    arguments = [str(recipe(tmp_path)) if a == "RECIPE" else a for a in arguments]
    code = (
        "import sys\nfrom tandem.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert done.stdout


def test_convert_there_and_back_gives_the_same_tensors_and_what_belongs_to_them(tmp_path, random_folder):
    there, back = tmp_path / "megatron", tmp_path / "back"
    said = call(
        "convert", random_folder, there, "--to", "megatron", "--tensor-parallel", 2, "--pipeline-parallel", 2
    )
    assert said.exit_code == 0 and f"written: {there}" in said.output, said.output
    assert len(list(there.glob("**/mp_rank_*"))) == 4
    assert call("convert", there, back, "--to", "hf").exit_code == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (back, random_folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {"config.json", "tokenizer.json"} <= {p.name for p in back.iterdir()}
    again = call("convert", random_folder, there, "--to", "megatron")
    assert again.exit_code == 2 and str(there) in again.output


def test_plan_ranks_layouts_for_devices_that_are_not_there(tmp_path, random_folder):
    path = recipe(tmp_path, model={"path": str(random_folder), "new": None}, data={"max_prompt_tokens": 100})
    said = call("plan", path, "--device", "h100", "--count", 1024, "--top", 3)
    assert said.exit_code == 0, said.output
    assert "1,024" in said.output and "learner" in said.output
    refused = call("plan", path, "--device", "h300")
    assert refused.exit_code == 2 and "h300" in refused.output


def test_version_is_the_packages_own():
    assert call("--version").output.split() == ["tandem", "0.1.0"]


def test_show_prints_yaml_that_loads_as_the_same_run_with_its_arithmetic(tmp_path):
    path = recipe(tmp_path)
    shown = call("show", path, "sampling.prompts_per_step=6", "algorithm.preset=dapo")
    again = tmp_path / "again.yaml"
    again.write_text(shown.output)
    assert load(again) == load(path, ["sampling.prompts_per_step=6", "algorithm.preset=dapo"])
    assert shown.output.startswith("# 6 prompts x 4 answers = 24 rollouts -> 1 update of 24")


def test_explain_lists_sections_and_says_what_a_key_takes():
    assert "sampling" in call("explain").output
    said = call("explain", "sampling.top_k").output
    assert "Sample among the k most probable tokens" in said and "at least 0" in said


def test_a_wrong_key_is_named_with_the_likely_one_on_stderr(tmp_path):
    done = tandem("train", recipe(tmp_path), "sampling.promts_per_step=3")
    assert done.returncode == 2 and not done.stdout
    assert "sampling.promts_per_step (override): unknown key. Did you mean" in done.stderr
    assert "prompts_per_step" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_recipe_names_what_is_near(tmp_path):
    recipe(tmp_path)
    done = tandem("show", tmp_path / "smal.yaml")
    assert done.returncode == 2
    assert "no such file" in done.stderr and "small.yaml" in done.stderr


def test_a_recipe_that_comes_along_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "run_dir: runs/quickstart\n" in call("show", "quickstart").output


def test_every_override_without_an_equals_sign_is_told(tmp_path):
    done = call("show", recipe(tmp_path), "steps", "seed=3", "seed")
    assert done.exit_code == 2
    assert "steps: an override is written section.key=value" in done.stderr
    assert "seed: an override is written section.key=value" in done.stderr


@pytest.mark.parametrize("arguments", [["fly"], ["show", "--steps", "3"], ["train"], ["generate", "model"]])
def test_wrong_usage_is_exit_code_two(arguments):
    assert call(*arguments).exit_code == 2


def failing(error: BaseException):
    """The outcome of a command that fails with an error."""
    broken = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @broken.callback()
    def top() -> None: ...

    @broken.command()
    def burst() -> None:
        raise error

    return CliRunner().invoke(broken, ["burst"])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("row 3 is empty"), 2, "error: row 3 is empty"),
        (RunError("a worker died"), 1, "error: a worker died"),
        (RunError("answer \x1b[2J"), 1, "error: answer \\x1b[2J"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            1,
            "error: a/b: No space left on device; free",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "c"), 1, "error: c: Permission denied"),
        (MemoryError(), 1, "error: MemoryError; out of memory: lower sampling.slots"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_failures_are_one_sentence_with_their_exit_code(error, code, said):
    done = failing(error)
    assert done.exit_code == code
    assert done.stderr.startswith(said) and "Traceback" not in done.stderr


def test_a_bug_is_not_taken_for_a_failure_of_the_run():
    done = failing(RuntimeError("shapes differ"))
    assert isinstance(done.exception, RuntimeError)


def test_debug_shows_where_it_came_from(tmp_path, monkeypatch):
    arguments = ["show", str(tmp_path / "none.yaml")]
    assert "Traceback" not in call(*arguments).stderr
    assert "Traceback" in call(*arguments, "--debug").stderr
    monkeypatch.setenv("TANDEM_DEBUG", "1")
    assert "Traceback" in call(*arguments).stderr


def test_commands_that_are_told_can_be_pasted(tmp_path):
    folder = tmp_path / "my runs"
    path = recipe(tmp_path, steps=1, run_dir=str(folder))
    for done in (call("train", path), call("train", path)):
        assert f"  tandem chat '{folder}'\n" in done.output, done.output


def test_a_finished_run_is_not_trained_again(tmp_path):
    path = recipe(tmp_path)
    assert call("train", path).exit_code == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = call("train", path)
    assert again.exit_code == 0
    assert "is finished: 4 of 4 steps are done" in again.output
    assert "steps=8" in again.output and "--fresh" in again.output
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics

    assert "not used" not in again.output
    changed = call("train", path, "eval.questions=3", "seed=1", "steps=3", "--allow-config-change")
    assert changed.exit_code == 0 and "is finished: 4 of 3 steps" in changed.output
    assert [line for line in changed.output.splitlines() if "not used" in line] == [
        "  not used, for no step is left: eval.questions: 8 -> 3",
        "  not used, for no step is left: seed: 0 -> 1",
    ]

    shorter = call("train", path, "steps=3")
    assert shorter.exit_code == 0 and "is finished: 4 of 3 steps" in shorter.output
    (tmp_path / "run" / "summary.json").unlink()
    assert "has 4 steps done, more than steps=3; set steps=4" in call("train", path, "steps=3").stderr
    assert "0 steps after the first 4 in" in call("train", path).output, (
        "what may be older than the last step is exported again"
    )

    longer = call("train", path, "steps=5")
    assert "going on from" in longer.output and "1 step after the first 4 in" in longer.output
    other = call("train", path, "steps=5", "seed=1")
    assert other.exit_code == 2 and "seed: 0 -> 1" in other.stderr
    fresh = call("train", path, "seed=1", "--fresh")
    assert fresh.exit_code == 0 and (tmp_path / "run.1" / "metrics.jsonl").is_file()


def until(process: subprocess.Popen[str], text: str) -> str:
    """Read output until a line holds a text."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line
    pytest.fail(f"ended without {text!r}: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_in_order_and_it_goes_on_as_if_nothing_had_been(tmp_path, number, code):
    (tmp_path / "whole").mkdir()
    path, whole = recipe(tmp_path, steps=40), recipe(tmp_path / "whole", steps=40)
    process = start("train", path)
    until(process, "step 2/40")
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{number.name}: the run stops after" in output and "a second signal ends it at once" in output
    assert "go on with: tandem train" in output
    # Nothing else on stderr: neither a traceback nor the progress bars and advice of libraries.
    assert errors.strip() == f"stopped by {number.name}"

    resumed = call("train", path, "steps=6")
    assert resumed.exit_code == 0, resumed.stderr
    assert "going on from" in resumed.output
    assert call("train", whole, "steps=6").exit_code == 0
    assert rewards(tmp_path / "run") == rewards(tmp_path / "whole" / "run")


def of_terminal(number: int) -> None:
    """In a new process: its standard input becomes its terminal, and SIGHUP is as given."""
    signal.signal(signal.SIGHUP, number)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize(("hangup", "code"), [(signal.SIG_DFL, 129), (signal.SIG_IGN, 143)])
def test_a_terminal_that_goes_away_ends_a_run_in_order_and_not_at_all_under_nohup(tmp_path, hangup, code):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tandem", "train", str(recipe(tmp_path, steps=4000))]
    log = (tmp_path / "log").open("w") if hangup is signal.SIG_IGN else theirs
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=log,
        stderr=log,
        env=environment(),
        start_new_session=True,
        preexec_fn=lambda: of_terminal(hangup),
    )
    os.close(theirs)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_until("a step is done", lambda: metrics.is_file() and len(read_metrics(metrics)) > 1)
        os.close(ours)
        if hangup is signal.SIG_IGN:
            done = len(read_metrics(metrics))
            wait_until("it went on", lambda: len(read_metrics(metrics)) > done + 2)
            process.terminate()
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
    saved = newest(tmp_path / "run" / "checkpoints", strict=True)
    assert saved is not None and read_manifest(saved).step == read_metrics(metrics)[-1]["step"] + 1


def test_a_session_that_ends_may_send_several_signals(tmp_path):
    process = start("train", recipe(tmp_path, steps=4000))
    until(process, "step 2/4000")
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    assert process.wait(timeout=60) in (129, 143)
    assert newest(tmp_path / "run" / "checkpoints", strict=True) is not None


def rewards(folder: Path) -> list[tuple[int, float, float]]:
    """Steps with figures that would show any other sample or update."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "reward/mean" in line]
    return [(line["step"], line["reward/mean"], line["grad_norm"]) for line in lines]


def test_a_disk_that_refuses_the_checkpoint_is_told_without_a_traceback(tmp_path):
    path = recipe(tmp_path, model={"new": {"hidden_size": 64, "layers": 2}}, journal={"rollouts": "none"})
    done = tandem(
        "train", path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
    )
    assert done.returncode == 1
    assert "error: checkpoint step_00000004 could not be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_warnings_of_the_run_are_plain_lines_on_stderr(tmp_path):
    path = recipe(tmp_path)
    assert call("train", path, "steps=2", "checkpoint.every=1").exit_code == 0
    broken = tmp_path / "run" / "checkpoints" / "step_00000002" / "state.json"
    broken.write_text("{}")
    done = call("train", path, "steps=3", "checkpoint.every=1")
    assert done.exit_code == 0
    assert done.stderr.startswith("warning: checkpoint ") and "looking for an older one" in done.stderr


def test_generate_writes_one_json_object_per_answer(tmp_path, random_folder):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("3+4\n\n5+6\n")
    done = call("generate", random_folder, "1+2", "--file", prompts, "--n", 2, "--max-tokens", 5, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (prompt, sample) for prompt in ("1+2", "3+4", "5+6") for sample in (0, 1)
    ]
    assert all(1 <= row["tokens"] <= 5 and row["finish"] in ("stop", "length") for row in rows)
    again = call("generate", random_folder, "1+2", "--file", prompts, "--n", 2, "--max-tokens", 5, "--json")
    other = call("generate", random_folder, "1+2", "--n", 2, "--max-tokens", 5, "--json", "--seed", 1)
    assert again.stdout == done.stdout and other.stdout.splitlines()[0] != done.stdout.splitlines()[0]
