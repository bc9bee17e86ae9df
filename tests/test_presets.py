"""The published algorithms as files: what they resolve to, where they are found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config_file import SMALL, refusal, write
from tandem.config import dump, load, preset_names, recipes

ROOT = Path(__file__).parents[1]

PRESETS = {
    "grpo": {"scale": "group_std", "weight": "sequence_mean", "clip": (0.2, 0.2), "kl": (0.04, "loss", "k3")},
    "dr_grpo": {"scale": "none", "weight": "constant", "clip": (0.2, 0.2), "kl": (0.0, "loss", "k3")},
    "dapo": {"weight": "token_mean", "clip": (0.2, 0.28), "keep": "mixed", "kl": (0.0, "loss", "k3")},
    "gspo": {"ratio": "sequence", "weight": "sequence_mean", "clip": (3e-4, 4e-4), "kl": (0.0, "loss", "k3")},
    "cispo": {"weight": "token_mean", "clip": (None, 4.0), "kind": "weight", "kl": (0.0, "loss", "k3")},
    "rloo": {
        "advantage": "leave_one_out",
        "scale": "none",
        "weight": "sequence_sum",
        "clip": (None, None),
        "kl": (0.03, "reward", "k1"),
    },
    "reinforce_pp": {
        "advantage": "discounted",
        "scale": "batch_std",
        "weight": "token_mean",
        "group_baseline": False,
        "kl": (0.01, "reward", "k1"),
    },
    "ppo": {
        "advantage": "gae",
        "discount": 1.0,
        "gae_lambda": 0.95,
        "value_clip": 0.2,
        "scale": "batch_std",
        "weight": "token_mean",
        "clip": (0.2, 0.2),
        "kl": (0.02, "reward", "k1"),
    },
    "reinforce_pp_baseline": {
        "advantage": "discounted",
        "scale": "batch_std",
        "weight": "token_mean",
        "group_baseline": True,
        "kl": (0.001, "loss", "k2"),
    },
}


def test_the_published_algorithms_are_all_there():
    assert preset_names() == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves_to_the_published_values(name, tmp_path):
    a = load(write(tmp_path, SMALL), [f"algorithm.preset={name}"]).algorithm
    resolved = {
        **a.model_dump(),
        "clip": (a.clip.low, a.clip.high),
        "kind": a.clip.kind,
        "kl": (a.kl.coef, a.kl.place, a.kl.estimator),
    }
    expected = {"advantage": "group", "ratio": "token", "keep": "all", "kind": "objective"} | PRESETS[name]
    assert {key: resolved[key] for key in expected} == expected
    assert a.preset == name


def test_an_override_of_the_preset_does_not_undo_the_keys_of_the_file(tmp_path):
    path = write(tmp_path, SMALL + "algorithm: {preset: grpo, weight: constant}\n")
    a = load(path, ["algorithm.preset=dapo"]).algorithm
    assert (a.preset, a.weight, a.keep) == ("dapo", "constant", "mixed")


def test_a_preset_of_ones_own_is_found_from_the_file_that_names_it(tmp_path, monkeypatch):
    write(tmp_path, "weight: constant\nkl: {coef: 0.25}\n", "mine/own.yaml")
    path = write(tmp_path, SMALL + "algorithm: {preset: own.yaml}\n", "mine/run.yaml")
    run = load(path)
    assert (run.algorithm.weight, run.algorithm.kl.coef) == ("constant", 0.25)
    monkeypatch.chdir(tmp_path)
    assert load(write(tmp_path, dump(run), "elsewhere/config.yaml")) == run
    write(tmp_path, "weigth: constant\n", "mine/own.yaml")
    assert "algorithm.weigth (mine/own.yaml:1): unknown key. Did you mean algorithm.weight?" in refusal(path)
    write(tmp_path, "preset: dapo\n", "mine/own.yaml")
    assert "a preset cannot name a preset" in refusal(path)


def test_presets_name_their_paper_and_stay_short():
    for name in preset_names():
        text = (recipes() / "algorithms" / f"{name}.yaml").read_text(encoding="utf-8")
        comments = [line for line in text.splitlines() if line.startswith("#")]
        assert "arXiv 2" in "\n".join(comments)
        assert "Departs from it" in "\n".join(comments)
        assert len(text.splitlines()) - len(comments) <= 8


def test_an_installed_package_finds_the_recipes_inside_itself(tmp_path):
    shutil.copytree(ROOT / "src" / "tandem" / "config", tmp_path / "tandem" / "config")
    for module in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "src" / "tandem" / module, tmp_path / "tandem" / module)
    write(tmp_path, "kl: {coef: 0.375}\n", "tandem/recipes/algorithms/grpo.yaml")
    code = "import sys; from tandem.config import load; print(load(sys.argv[1]).algorithm.kl.coef)"
    command = [sys.executable, "-c", code, str(write(tmp_path, SMALL))]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.375"
