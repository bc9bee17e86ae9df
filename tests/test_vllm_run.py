"""A whole run with vLLM as the engine: its answers are the policy's, step after step."""

from pathlib import Path

import pytest

from conftest import random_model, saved
from tandem.config.sections import NewModel
from tandem.errors import ConfigError
from tandem.journal import read_metrics
from tandem.train.run import train

# On a CPU vLLM has no attention for heads narrower than these.
WIDE_HEADS = NewModel(hidden_size=64, layers=2, heads=2, kv_heads=1, max_positions=256)
REWARD = Path(__file__).parents[1] / "benchmarks" / "reward.py"
VLLM = {"kind": "vllm", "kv_cache_mb": 64, "eager": True, "max_model_len": 128, "max_num_seqs": 16}


@pytest.mark.parametrize("lora", [None, {"rank": 4, "targets": ["q_proj", "v_proj"]}])
def test_every_step_samples_from_the_weights_of_the_step_before(make_run, quiet, tmp_path, lora):
    pytest.importorskip("vllm")
    folder = saved(tmp_path / "policy", random_model(shape=WIDE_HEADS))
    run = make_run(
        folder,
        steps=3,
        engine=VLLM,
        model={"path": str(folder), "lora": lora},
        reward={"functions": [{"name": f"{REWARD}:scrambled"}]},
        learner={"optimizer": {"lr": 3e-3}},
    )
    train(run, quiet)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3
    # The rate is high: answers of an older version would be off by far more.
    assert all(row["rollout/logp_gap_max"] < 1e-4 for row in rows)
    assert [row["version"] for row in rows] == [1, 2, 3]
    assert all(row["actor/updates"] == 1 for row in rows)


def test_settings_that_vllm_cannot_sample_are_refused_before_it_starts(make_run, random_folder, quiet):
    run = make_run(random_folder, engine=VLLM, sampling={"temperature": 0.7, "top_p": 0.9})
    with pytest.raises(ConfigError, match=r"temperature=0.7.*top_p=0.9"):
        train(run, quiet)
