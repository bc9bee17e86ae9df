"""A whole run with a critic: it learns, goes on where it stopped, and is the same run on processes of Ray."""

import signal
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from ray_runs import trajectory
from small_recipe import recipe
from tandem.config import load
from tandem.errors import ConfigError, RunError
from tandem.journal import read_metrics
from tandem.model import load as load_model
from tandem.model import tokenizer_of
from tandem.placement.inline import critic_of
from tandem.train import footprint
from tandem.train.critic_bytes import critic_shape, saved_bytes, with_critic
from tandem.train.interrupt import Interrupted
from tandem.train.layouts import check_layouts
from tandem.train.run import Launch, train
from tandem.train.session import Session
from tandem.train.snapshot import write_pupil

RAY = {"cpus": 1, "start_timeout_s": 300, "engine_timeout_s": 180, "learner_timeout_s": 180}
PPO = {
    "model": {"new": {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 128}},
    "algorithm": {"preset": "ppo"},
    "critic": {"optimizer": {"lr": 1e-3}},
    "learner": {"optimizer": {"lr": 1e-3}, "updates_per_step": 2},
    "eval": {"every": None},
    "journal": {"samples": 0, "sinks": ["jsonl"]},
}
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def run_in(folder: Path, **changes) -> list[dict]:
    folder.mkdir(exist_ok=True)
    path = recipe(folder, **PPO | {"steps": 5} | changes)
    train(load(path), Launch(recipe=str(path)))
    return trajectory(folder / "run")


@pytest.fixture(scope="module")
def inline(tmp_path_factory) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The trajectory in one process, and the critic at its end."""
    folder = tmp_path_factory.mktemp("inline")
    return run_in(folder), critic_in(folder)


def stop_before(patch: pytest.MonkeyPatch, stop: int) -> None:
    """As a signal that arrives between two steps."""
    before = Session.before

    def interrupted(self, step):
        if step == stop:
            self.interruption.number = signal.SIGINT
        before(self, step)

    patch.setattr(Session, "before", interrupted)


def critic_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(
        folder / "run" / "checkpoints" / "step_00000005" / "critic" / "model" / "model.safetensors"
    )


def test_two_updates_per_step_are_logged_and_the_second_can_be_clipped(inline):
    rows = [row for row in inline[0] if "reward/mean" in row]
    assert [row["critic/updates"] for row in rows] == [2] * 5
    assert rows[0]["critic/values/max"] == 0 and rows[1]["critic/values/max"] != 0
    assert all(row["critic/value_loss"] > 0 and row["critic/grad_norm"] > 0 for row in rows)
    assert any(row["kl/reference"] != 0 for row in rows)


def test_a_stopped_run_goes_on_with_the_critic_it_had(inline, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 3)
        with pytest.raises(Interrupted):
            run_in(tmp_path)
    assert run_in(tmp_path) == inline[0]
    for name, weight in critic_in(tmp_path).items():
        assert torch.equal(weight, inline[1][name]), name


def test_a_checkpoint_without_a_critic_is_refused(tmp_path):
    run_in(tmp_path, steps=1, algorithm={"preset": "reinforce_pp"})
    with pytest.raises(RunError, match=r"holds no critic, which algorithm\.advantage=gae needs"):
        path = recipe(tmp_path, **PPO | {"steps": 2})
        train(load(path), Launch(recipe=str(path), allow_config_change=True))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"tensor": 4}, r"critic\.layout\.tensor=4 does not divide"),
        ({"shard": 3}, r"critic\.layout: .*shard=3"),
        ({"pipeline": 4}, r"critic\.layout\.pipeline=4: 4 stages of \[1, 1, 0, 0\] layers"),
    ],
    ids=str,
)
def test_a_layout_that_a_critic_cannot_have_is_refused_before_anything_starts(layout, said, tmp_path):
    spread = {"placement": {"kind": "apart", "learners": 4}, "critic": {"layout": layout}}
    made = load(recipe(tmp_path, **PPO | spread))
    with pytest.raises(ConfigError, match=said):
        check_layouts(made, tokenizer_of(made.model))


@needs_ray
def test_with_ray_it_is_the_run_of_one_process(inline, tmp_path, monkeypatch):
    """Values are computed beside sampling, unit by unit."""
    from tandem.placement.cluster.learners import InUnits

    begun, begin = [], InUnits.begin

    def watched(self, unit):
        begun.append((self.method, unit.size))
        begin(self, unit)

    monkeypatch.setattr(InUnits, "begin", watched)
    assert run_in(tmp_path, placement={"kind": "apart", **RAY}) == inline[0]
    assert len([size for method, size in begun if method == "values"]) >= len(inline[0]) - 1
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    waits = [row["timing/non_overlap_critic_model"] for row in rows if "grad_norm" in row]
    assert len(waits) > 1 and min(waits) > 0
    for name, weight in critic_in(tmp_path).items():
        assert torch.equal(weight, inline[1][name]), name


@needs_ray
def test_two_learners_go_on_from_their_checkpoint_and_do_what_one_does(inline, tmp_path):
    """The critic lies in another layout than the policy."""
    spread = {
        "placement": {"kind": "apart", **RAY, "learners": 2},
        "critic": PPO["critic"] | {"layout": {"pipeline": 2}},
        "checkpoint": {"every": 3},
    }

    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 4)
        with pytest.raises(Interrupted):
            run_in(tmp_path, **spread)
    ours = run_in(tmp_path, **spread)
    for row, other in zip(ours[:5], inline[0][:5], strict=True):
        for name in (
            "reward/mean",
            "grad_norm",
            "critic/values/mean",
            "critic/value_loss",
            "critic/grad_norm",
        ):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


REWARD = f"{Path(__file__).parent / 'data' / 'digit_share.py'}:digit_share"


@pytest.mark.parametrize("permute", [False, True])
def test_the_reward_rises_where_there_is_something_to_learn(permute, random_folder, make_run, quiet):
    """With rewards dealt out at random neither policy nor critic learns anything."""
    run = make_run(
        random_folder,
        steps=30,
        sampling={"prompts_per_step": 64, "answers_per_prompt": 1, "max_answer_tokens": 12},
        reward={"functions": [{"name": REWARD}], "permute": permute},
        learner={"optimizer": {"lr": 3e-3}},
        algorithm={"preset": "ppo", "kl": {"coef": 0.0}},
        critic={"optimizer": {"lr": 1e-3}},
    )
    train(run, quiet)
    rows = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    gain = fmean(rewards[-5:]) - fmean(rewards[:5])
    expected = rows[29]["critic/values/mean"]
    assert (gain < 0.1 and expected < 0.2) if permute else (gain > 0.3 and expected > 0.7), (gain, expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_of_a_critics_memory_and_disk_is_what_it_takes(tmp_path, dtype):
    path = recipe(tmp_path, **PPO)
    made = load(path, [f"model.dtype={dtype}"])
    tokenizer = tokenizer_of(made.model)
    policy = load_model(made.model, tokenizer, torch.device("cpu"))
    critic = critic_of(made, policy)
    for weight in critic.model.trainable().values():
        weight.grad = torch.zeros_like(weight)
    critic.optimizer.step(critic.optimizer.gradient_norm())
    states = [t for s in critic.optimizer.adamw.state.values() for t in s.values() if t.ndim]
    shape = footprint.shape_of(made.model, tokenizer)
    ours = critic_shape(made, shape, tokenizer)
    need = with_critic(footprint.memory(made, shape, 24, None), made, ours, 24)
    assert need.lasting["critic"] == sum(p.nbytes for p in critic.model.module.parameters())
    assert need.lasting["critic's optimizer"] == sum(t.nbytes for t in states)
    masters = sum(t.nbytes for t in critic.optimizer.master_tensors.values())
    assert need.lasting.get("critic's master weights", 0) == masters
    write_pupil(critic, tmp_path / "critic")
    written = sum(f.stat().st_size for f in (tmp_path / "critic").rglob("*.safetensors"))
    assert saved_bytes(made, ours) == pytest.approx(written, rel=0.1)
