"""A run that was stopped and went on is the run that was never stopped, bit for bit."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tandem.checkpoint import newest
from tandem.errors import ConfigError, RunError
from tandem.journal import read_metrics, repeatable
from tandem.journal.rollouts import read
from tandem.learner import Actor
from tandem.train.interrupt import Interrupted
from tandem.train.run import train
from tandem.train.session import Session

VARIANTS = {
    "plain": {},
    "several updates and epochs": {"learner": {"updates_per_step": 2, "epochs_per_step": 2}},
    "answers sampled ahead": {"sampling": {"max_lag": 2}},
    "a reference that is the first policy": {"algorithm": {"kl": {"coef": 0.1}}},
    "moving reference, adaptive KL": {
        "algorithm": {"kl": {"coef": 0.1, "target": 0.05}},
        "reference": {"refresh_every": 3},
    },
    "adapters with dropout off": {"model": {"lora": {"rank": 4}}},
    "dynamic sampling": {"algorithm": {"keep": "mixed", "max_refills": 2}},
    "dynamic sampling ahead": {
        "algorithm": {"keep": "mixed", "max_refills": 2},
        "sampling": {"max_lag": 2},
    },
    "bfloat16 with master weights": {"model": {"dtype": "bf16"}},
}


def trajectory(run) -> list[dict[str, object]]:
    """Everything the journal says that does not depend on the clock."""
    rows = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k == "step" or repeatable(k)} for row in rows]


def state(run) -> dict[str, torch.Tensor]:
    folder = newest(Path(run.run_dir) / "checkpoints", strict=True)
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{k}": v for file in files for k, v in load_file(file).items()}


def answers(run) -> list[object]:
    files = sorted((Path(run.run_dir) / "rollouts").iterdir())
    return [(r["step"], r["prompt_id"], r["answer"], r["reward"], r["logp"]) for f in files for r in read(f)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_and_three_more_equal_five_across_an_epoch_boundary(
    variant, adding_folder, make_run, quiet, tmp_path
):
    # 10 questions, 4 a step: the first epoch ends within step 3.
    common = {"data": {"limit": 10}, "reward": {"functions": [digits()]}, **VARIANTS[variant]}
    whole = make_run(adding_folder, run_dir=str(tmp_path / "whole"), steps=5, **common)
    train(whole, quiet)
    part = make_run(adding_folder, run_dir=str(tmp_path / "part"), steps=5, **common)
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 2)
        with pytest.raises(Interrupted):
            train(part, quiet)
    train(part, quiet)
    assert trajectory(part) == trajectory(whole)
    assert answers(part) == answers(whole)
    ours, theirs = state(part), state(whole)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, tensor in theirs.items():
        if not name.startswith("random."):
            assert torch.equal(ours[name], tensor), name


def test_an_interrupted_evaluation_is_repeated_on_resume(adding_folder, make_run, quiet, tmp_path):
    common = {
        "data": {"eval": "tandem:addition:test"},
        "eval": {"every": 2, "questions": 4, "answers": 2},
        "steps": 5,
    }
    whole = make_run(adding_folder, run_dir=str(tmp_path / "whole"), **common)
    train(whole, quiet)
    part = make_run(adding_folder, run_dir=str(tmp_path / "part"), **common)
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 2)
        with pytest.raises(Interrupted):
            train(part, quiet)
    train(part, quiet)
    assert trajectory(part) == trajectory(whole)
    assert [row["step"] for row in trajectory(part) if "eval/accuracy" in row] == [0, 2, 4, 5]


def test_resume_refuses_another_configuration_unless_told(adding_folder, make_run, quiet):
    run = make_run(adding_folder, steps=2)
    train(run, quiet)
    changed = make_run(adding_folder, steps=3, learner={"optimizer": {"lr": 0.5}})
    with pytest.raises(ConfigError, match=r"learner.optimizer.lr: 0.0001 -> 0.5"):
        train(changed, quiet)
    quiet.allow_config_change = True
    train(changed, quiet)
    assert [row["step"] for row in trajectory(run)] == [0, 1, 2]


def test_a_run_that_goes_on_with_another_reward_says_so(adding_folder, make_run, quiet, tmp_path, caplog):
    own = tmp_path / "own.py"
    own.write_text("def score(answer):\n    return len(answer)\n")
    reward = {"functions": [{"name": f"{own}:score"}, digits()]}
    for steps, warned in (1, False), (2, False), (3, True):
        if warned:
            own.write_text(own.read_text().replace("len(answer)", "-len(answer)"))
        caplog.clear()
        train(make_run(adding_folder, steps=steps, reward=reward), quiet)
        said = [record.getMessage() for record in caplog.records if "the file of" in record.getMessage()]
        assert len(said) == warned and all(
            f"the file of {own}:score is not as it was" in text for text in said
        )


def test_allowed_changes_are_what_the_run_goes_on_with(adding_folder, make_run, quiet, monkeypatch):
    """A fixed KL coefficient and the optimizer's settings are the configuration's, not the checkpoint's."""
    decay = lambda share: {"optimizer": {"weight_decay": share, "betas": (0.9, 1 - share)}}  # noqa: E731
    seen, update = [], Actor.update

    def watched(self, parts, kl_coef):
        (group,) = {
            (g["weight_decay"], g["betas"]) for g in self.optimizer.adamw.param_groups if g["weight_decay"]
        }
        seen.append((kl_coef, *group))
        return update(self, parts, kl_coef)

    monkeypatch.setattr(Actor, "update", watched)
    quiet.allow_config_change = True
    for steps, coef, share in (1, 0.1, 0.01), (2, 0.2, 0.02):
        kl = {"coef": coef}
        train(make_run(adding_folder, steps=steps, algorithm={"kl": kl}, learner=decay(share)), quiet)
    assert seen == [(0.1, 0.01, (0.9, 0.99)), (0.2, 0.02, (0.9, 0.98))]


@pytest.mark.parametrize(("first", "then"), [(False, True), (True, False)])
def test_a_run_that_offloads_its_optimizer_from_now_on_is_the_one_that_never_did(
    adding_folder, make_run, quiet, tmp_path, first, then
):
    def run(name, offload, steps):
        optimizer = {"offload": offload, "weight_decay": 0.1}
        return make_run(
            adding_folder, run_dir=str(tmp_path / name), steps=steps, learner={"optimizer": optimizer}
        )

    whole = run("whole", False, 3)
    train(whole, quiet)
    train(run("part", first, 2), quiet)
    quiet.allow_config_change = True
    part = run("part", then, 3)
    train(part, quiet)
    assert trajectory(part) == trajectory(whole) and answers(part) == answers(whole)
    ours, theirs = state(part), state(whole)
    for name, tensor in theirs.items():
        if not name.startswith("random."):
            assert torch.equal(ours[name], tensor), name


def test_steps_sampled_ahead_must_be_allowed_by_the_lag(adding_folder, make_run, quiet):
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 2)
        with pytest.raises(Interrupted):
            train(make_run(adding_folder, steps=5, sampling={"max_lag": 2}), quiet)
    quiet.allow_config_change = True
    with pytest.raises(
        RunError, match=r"answers of 2 steps ahead, and sampling.max_lag=1 allows 1; go on with"
    ):
        train(make_run(adding_folder, steps=5, sampling={"max_lag": 1}), quiet)


def test_a_run_goes_on_though_all_that_is_left_was_sampled_before(adding_folder, make_run, quiet, tmp_path):
    """So there is nothing from the present weights that sampler and trainer could be compared by."""
    whole, part = (
        make_run(adding_folder, run_dir=str(tmp_path / name), steps=3, sampling={"max_lag": 2})
        for name in ("whole", "part")
    )
    train(whole, quiet)
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 2)
        with pytest.raises(Interrupted):
            train(part, quiet)
    train(part, quiet)
    assert trajectory(part) == trajectory(whole) and answers(part) == answers(whole)


def test_resume_refuses_changed_questions(adding_folder, make_run, quiet, tmp_path):
    file = tmp_path / "sums.jsonl"
    rows = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(15, 25)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(adding_folder, steps=1, data={"train": str(file)})
    train(run, quiet)
    file.write_text(file.read_text().replace("15+15", "15+16"))
    (Path(run.run_dir) / "metrics.jsonl").open("a").write('{"step": 1, "reward/mean": 0.5}\n')
    with pytest.raises(RuntimeError, match=r"questions of data.train changed"):
        train(run.model_copy(update={"steps": 2}), quiet)
    assert len(trajectory(run)) == 2, "nothing is forgotten by a run that does not go on"


def test_a_reference_that_the_checkpoint_has_not_is_refused_by_its_key(make_run, quiet):
    run = make_run(steps=1, algorithm={"kl": {"coef": 0.0}})
    train(run, quiet)
    quiet.allow_config_change = True
    later = make_run(steps=2, algorithm={"kl": {"coef": 0.1}})
    with pytest.raises(
        RunError, match=r"holds no reference, which algorithm.kl.coef=0.1 needs: give reference.path"
    ):
        train(later, quiet)


def test_a_finished_run_whose_checkpoints_are_gone_is_set_aside(adding_folder, make_run, quiet):
    run = make_run(adding_folder, steps=1)
    train(run, quiet)
    shutil.rmtree(Path(run.run_dir) / "checkpoints")
    train(run, quiet)
    assert (Path(f"{run.run_dir}.1") / "model" / "config.json").exists()


def test_a_resumed_run_has_no_answers_from_before_training(adding_folder, make_run, quiet):
    train(make_run(adding_folder, steps=1, eval={"every": 1, "questions": 2}), quiet)
    out = io.StringIO()
    later = make_run(adding_folder, steps=2, eval={"every": 1, "questions": 2})
    train(later, replace(quiet, console=Console(file=out, width=100)))
    said = out.getvalue()
    assert "1 step after the first 1 in" in said and "before" not in said.partition("Sample answers")[2]


def test_fresh_sets_the_earlier_run_aside(adding_folder, make_run, quiet):
    run = make_run(adding_folder, steps=1)
    train(run, quiet)
    quiet.fresh = True
    train(run, quiet)
    aside = Path(f"{run.run_dir}.1")
    assert (aside / "model" / "config.json").exists() and (aside / "metrics.jsonl").exists()
    assert [row["step"] for row in trajectory(run)] == [0]


def digits() -> dict[str, str]:
    """A reward that even a poor model varies in: the share of digits in the answer."""
    return {"name": f"{Path(__file__).parent / 'data' / 'digit_share.py'}:digit_share"}


def stop_before(patch: pytest.MonkeyPatch, step: int) -> None:
    """As a signal would: between two steps, after their boundary is noted."""
    inner = Session._evaluate

    def evaluate(self: Session, now: int) -> dict[str, float]:
        if now == step:
            raise Interrupted(15)
        return inner(self, now)

    patch.setattr(Session, "_evaluate", evaluate)
