"""Learners on a node that sees nothing of where the driver runs."""

import subprocess
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from ray_runs import ENDS_S, SMALL, JoinedNodes, driver, trajectory
from small_recipe import recipe
from tandem.checkpoint import newest
from tandem.config import load
from tandem.train.run import Launch, train

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def test_learners_need_not_see_the_run_folder(tmp_path):
    """Two of them go on with a run that one process began, on a node with nothing where the driver has it: checkpoint
    and moved reference go there, checkpoint and model come back, and the run is that of one process."""
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user cannot hide a folder from a process")
    changes = SMALL | {
        "steps": 6,
        "eval": {"every": None},
        "algorithm": {"advantage": "gae", "scale": "none", "kl": {"coef": 0.05}},
        "reference": {"refresh_every": 2},
    }
    one, here, said = tmp_path / "one", tmp_path / "here", tmp_path / "said"
    paths = {}
    for folder in one, here:
        folder.mkdir()
        paths[folder] = recipe(folder, **changes)
    train(load(paths[one]), Launch(recipe="whole"))
    train(load(paths[here], ["steps=3"]), Launch(recipe="begun"))
    with JoinedNodes(tmp_path, "--num-cpus=0", port=6398) as nodes:
        hidden = f'mount -t tmpfs -o ro none {here} && exec "$@"'
        words = [f"--address={nodes.address}", "--num-cpus=3"]
        nodes.start(*words, within=["unshare", "--mount", "sh", "-c", hidden, "sh"])
        placed = f"placement={{kind: apart, address: '{nodes.address}', learners: 2}}"
        command = ["-m", "tandem", "train", paths[here], placed, "run_dir=run"]
        with driver(nodes, said, *command, folder=here) as process:
            assert process.wait(timeout=ENDS_S) == 0, said.read_text()
    assert newest(here / "run" / "checkpoints", strict=True).name == "step_00000006"
    rows = ([row for row in trajectory(folder / "run") if "grad_norm" in row] for folder in (here, one))
    for ours, other in zip(*rows, strict=True):
        assert ours["step"] == other["step"] and ours["reward/mean"] == other["reward/mean"]
        for name in ("grad_norm", "critic/value_loss", "kl/reference"):
            assert ours[name] == pytest.approx(other[name], rel=1e-3, abs=1e-7), name
    for name, weight in load_file(here / "run" / "model" / "model.safetensors").items():
        theirs = load_file(one / "run" / "model" / "model.safetensors")[name]
        torch.testing.assert_close(weight, theirs, atol=1e-3, rtol=1e-3)
