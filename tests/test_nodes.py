"""A cluster of several nodes, all on this machine, which loses one of them in the middle of a run."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from ray_runs import SMALL, JoinedNodes, end, steps_done, trajectory, wait_until
from small_recipe import recipe
from tandem.checkpoint import newest
from tandem.config import load
from tandem.train.run import Launch, train

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

LOG = re.compile(r"node (\w+) at .* pid (\d+)")
CHANGES = SMALL | {
    "eval": {"every": None},
    # Most of a step is sampling.
    "sampling": {"prompts_per_step": 4, "answers_per_prompt": 4, "max_answer_tokens": 64},
    "model": {"new": {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 128}},
}
PLACED = {"kind": "apart", "engines": 2, "spread": True, "backoff_s": 0.1, "engine_timeout_s": 60}
COMPARED = 12
"""Steps of which the first few are sampled by all engines."""


def places(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Node and process of each worker's lives."""
    logs = (folder / "run" / "logs").glob("*.log")
    return {log.stem: [(n, int(pid)) for n, pid in LOG.findall(log.read_text())] for log in logs}


def kill_node(pid: int) -> None:
    """End the Ray node that a process belongs to, all at once, as when a machine fails."""
    raylet = psutil.Process(pid).parent()
    assert raylet is not None and raylet.name() == "raylet"
    for process in [raylet, *raylet.children(recursive=True)]:
        end(process.pid)


def lose_a_node(folder: Path, sizes: list[str], until: Callable[[str, str], bool]) -> None:
    """A run of one learner and two engines, until the node without the learner is lost and `until(lost engine, what
    the driver has said)` holds, and some steps more. Its first steps must be those of one process."""
    run, said = folder / "run", folder / "said"
    with JoinedNodes(folder, "--num-cpus=0", *sizes) as nodes, said.open("w") as output:
        path = recipe(folder, **CHANGES | {"steps": 5000}, placement=PLACED | {"address": nodes.address})
        command = [sys.executable, "-m", "tandem", "train", str(path)]
        driver = subprocess.Popen(command, env=nodes.environ, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until("some steps are done", lambda: steps_done(run) >= 3)
            ((stays, _),) = places(folder)["learner-0"]
            lost, pid = next(
                (name, lives[0][1]) for name, lives in places(folder).items() if lives[0][0] != stays
            )
            kill_node(pid)
            wait_until("the loss is dealt with", lambda: until(lost, " ".join(said.read_text().split())))
            then = max(steps_done(run), COMPARED)
            wait_until("the run has gone on", lambda: steps_done(run) >= then + 3)
            driver.send_signal(signal.SIGTERM)
            driver.wait(timeout=60)
        finally:
            driver.kill()
            driver.wait()
    assert driver.returncode == 128 + signal.SIGTERM, said.read_text()
    assert newest(run / "checkpoints", strict=True) is not None
    whole = folder / "whole"
    whole.mkdir()
    path = recipe(whole, **CHANGES | {"steps": COMPARED})
    train(load(path), Launch(recipe=str(path)))
    for ours, other in zip(trajectory(run)[:COMPARED], trajectory(whole / "run")[:COMPARED], strict=True):
        assert ours["reward/mean"] == other["reward/mean"] and ours["version"] == other["version"]
        # Rows that are computed together with others are rounded otherwise.
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_the_engine_of_a_lost_node_goes_on_where_there_is_room(tmp_path):
    lose_a_node(
        tmp_path, ["--num-cpus=3", "--num-cpus=3"], lambda lost, said: len(places(tmp_path)[lost]) == 2
    )
    nodes = {lives[-1][0] for lives in places(tmp_path).values()}
    assert len(nodes) == 1, "all roles are on the node that is left"
    assert "its answers go elsewhere" in (tmp_path / "said").read_text()


def test_without_room_the_run_goes_on_with_the_other_engine_and_says_so(tmp_path):
    words = "waits for a node with room for it; the run goes on with 1 of 2 engines"
    lose_a_node(tmp_path, ["--num-cpus=2", "--num-cpus=2"], lambda lost, said: words in said)
