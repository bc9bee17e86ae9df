"""A refactor leaves the numbers alone: twenty steps of a two-layer model, committed.

After an intended change of the numbers: TANDEM_GOLDEN=write pytest tests/test_golden.py, and say why in the commit.
"""

import json
import os
from pathlib import Path

import pytest

from tandem.journal import read_metrics
from tandem.train.run import train

GOLDEN = Path(__file__).parent / "data" / "golden.json"
NAMES = ("reward/mean", "response_length/mean", "actor/loss", "grad_norm", "actor/entropy", "kl/reference")
REWARD = f"{Path(__file__).parent / 'data' / 'digit_share.py'}:digit_share"


def test_the_golden_trajectory_is_unchanged(random_folder, make_run, quiet):
    run = make_run(
        random_folder,
        steps=20,
        seed=7,
        reward={"functions": [{"name": REWARD}]},
        sampling={"max_answer_tokens": 16},
        algorithm={"kl": {"coef": 0.05}},
        learner={"updates_per_step": 2, "optimizer": {"lr": 1e-3}},
    )
    train(run, quiet)
    rows = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    ours = [{name: row[name] for name in NAMES} for row in rows]
    if os.environ.get("TANDEM_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
    theirs = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(ours) == len(theirs) == 20
    for step, (row, golden) in enumerate(zip(ours, theirs)):
        assert row == pytest.approx(golden, rel=1e-3, abs=1e-5), f"step {step}"
    assert theirs[-1]["reward/mean"] > theirs[0]["reward/mean"] + 0.05, (
        "the trajectory must be one that learns"
    )
