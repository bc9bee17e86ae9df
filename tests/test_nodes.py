"""A cluster of several nodes, all on this machine, which loses one of them in the middle of a run."""

import re
import signal
import subprocess
import sys
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


def test_engines_of_a_lost_node_are_made_up_for_and_go_on_where_there_is_room(tmp_path):
    """The node that is left has room for one engine; the other one's place is on a node that joins."""
    run, said = tmp_path / "run", tmp_path / "said"
    size = "--num-cpus=2"
    with JoinedNodes(tmp_path, "--num-cpus=0", size, size) as nodes, said.open("w") as output:
        path = recipe(tmp_path, **CHANGES | {"steps": 5000}, placement=PLACED | {"address": nodes.address})
        command = [sys.executable, "-m", "tandem", "train", str(path)]
        driver = subprocess.Popen(command, env=nodes.environ, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until("some steps are done", lambda: steps_done(run) >= 3)
            first = places(tmp_path)
            ((stays, _),) = first.pop("learner-0")
            lost = [name for name, ((node, _),) in first.items() if node != stays]
            kill_node(first[lost[0]][0][1])
            words = "waits for a node with room for it; the run goes on with 1 of 2 engines"
            wait_until("the driver says so", lambda: words in " ".join(said.read_text().split()))
            goes_on(run)
            nodes.start(f"--address={nodes.address}", size)
            wait_until("both have a place", lambda: all(len(places(tmp_path)[name]) == 2 for name in lost))
            goes_on(run)
            driver.send_signal(signal.SIGTERM)
            driver.wait(timeout=60)
        finally:
            driver.kill()
            driver.wait()
    assert driver.returncode == 128 + signal.SIGTERM, said.read_text()
    assert newest(run / "checkpoints", strict=True) is not None
    assert len({lives[-1][0] for lives in places(tmp_path).values()}) == 2
    (tmp_path / "whole").mkdir()
    path = recipe(tmp_path / "whole", **CHANGES | {"steps": COMPARED})
    train(load(path), Launch(recipe=str(path)))
    whole = trajectory(tmp_path / "whole" / "run")
    for ours, other in zip(trajectory(run)[:COMPARED], whole[:COMPARED], strict=True):
        assert ours["reward/mean"] == other["reward/mean"] and ours["version"] == other["version"]
        # Rows that are computed together with others are rounded otherwise.
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def goes_on(run: Path) -> None:
    then = max(steps_done(run), COMPARED)
    wait_until("the run has gone on", lambda: steps_done(run) >= then + 3)
