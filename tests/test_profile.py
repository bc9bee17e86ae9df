"""The profile of a step: its trace, and its phases against what the device can do."""

import json
from pathlib import Path

import pytest
from transformers import Qwen2Config

from conftest import random_model
from tandem.train.profile import attention_flops, matmul_weights
from tandem.train.run import train


@pytest.mark.parametrize(("keep_mb", "updates", "passes"), [(0, 1, 3), (512, 1, 2), (512, 2, 2.5)])
def test_profile_traces_the_second_step_and_accounts_for_its_time(
    random_folder, make_run, quiet, keep_mb, updates, passes
):
    learner = {"keep_mb": keep_mb, "updates_per_step": updates}
    run = make_run(
        random_folder, steps=3, profile=True, reward={"functions": [{"name": REWARD}]}, learner=learner
    )
    train(run, quiet)
    record = json.loads((Path(run.run_dir) / "profile" / "phases.json").read_text())
    rows = [json.loads(line) for line in (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()]
    phases = {phase["name"]: phase for phase in record["phases"]}
    assert record["step"] == 1 and {"rollout", "update"} <= phases.keys()
    assert sum(p["seconds"] for p in phases.values()) == pytest.approx(rows[1]["timing/all"], rel=0.25)
    assert all(0 < phases[name]["share"] < 1 for name in ("rollout", "update"))
    assert phases["update"]["flops"] == pytest.approx(passes * phases["rollout"]["flops"], rel=0.05)
    trace = json.loads((Path(run.run_dir) / "profile" / "trace.json").read_text())
    assert any(
        event.get("name") == "aten::mm" or "linear" in event.get("name", "") for event in trace["traceEvents"]
    )


def test_a_run_without_a_second_step_says_that_nothing_is_traced(random_folder, make_run, quiet, caplog):
    run = make_run(random_folder, steps=1, profile=True, reward={"functions": [{"name": REWARD}]})
    train(run, quiet)
    assert "steps=1 leaves none: nothing is traced; set steps=2 or more" in caplog.text
    assert not (Path(run.run_dir) / "profile").exists()


def test_a_critic_has_its_rows(random_folder, make_run, quiet):
    algorithm = {"preset": "ppo", "kl": {"coef": 0.1}}
    run = make_run(
        random_folder, steps=2, profile=True, reward={"functions": [{"name": REWARD}]}, algorithm=algorithm
    )
    train(run, quiet)
    record = json.loads((Path(run.run_dir) / "profile" / "phases.json").read_text())
    phases = {phase["name"]: phase for phase in record["phases"]}
    assert phases["update_critic"]["flops"] == 3 * phases["critic_model"]["flops"]
    assert 0 < phases["critic_model"]["flops"] < phases["reference_model"]["flops"], (
        "it has no output head to speak of"
    )
    assert all(0 < phases[name]["share"] < 1 for name in ("critic_model", "update_critic"))


def test_work_is_counted_by_hand():
    model = random_model()  # hidden 64, 2 layers, 4 heads of 16, 2 key heads, mlp 192
    per_layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 192
    vocabulary = model.vocab_size
    assert matmul_weights(model) == 2 * per_layer + vocabulary * 64
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    assert attention_flops(config, 10) == 4 * 10 * 64 * 2


REWARD = f"{Path(__file__).parent / 'data' / 'digit_share.py'}:digit_share"
