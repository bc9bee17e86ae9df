"""What the world does to a run: each fault has an outcome that was chosen, and a message that says it."""

import errno
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tandem.checkpoint import lock, newest
from tandem.config import preset_names
from tandem.engine import EmbeddedEngine
from tandem.errors import ConfigError, RunError
from tandem.journal import exported_step, read_metrics
from tandem.learner import Actor
from tandem.placement import inline
from tandem.train import snapshot
from tandem.train.agreement import check_agreement
from tandem.train.run import train
from tandem.types import Batch
from tiny_models import language_model
from tiny_step import batch

BAD = Path(__file__).parent / "data" / "bad_rewards.py"


def rewarded(name: str, **more: object) -> dict[str, object]:
    return {"functions": [{"name": f"{BAD}:{name}"}], **more}


def rows(run) -> list[dict[str, float]]:
    return read_metrics(Path(run.run_dir) / "metrics.jsonl")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def all_finite(run) -> bool:
    return all(math.isfinite(value) for row in rows(run) for value in row.values())


def test_rewards_that_mostly_fail_end_the_run_with_their_cause(random_folder, make_run, quiet, caplog):
    run = make_run(random_folder, steps=10, reward=rewarded("raises"))
    with (
        caplog.at_level(logging.WARNING, "tandem.rewards"),
        pytest.raises(RunError, match=r"3 steps in a row.*no such column"),
    ):
        train(run, quiet)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "tandem.rewards"]
    assert (
        said.startswith("16 of 16 rewards of a step failed (16 error). The first: ")
        and "no such column" in said
    )
    assert len(rows(run)) == 2, "the third step in a row is the last"
    checkpoint = newest(Path(run.run_dir) / "checkpoints", strict=True)
    assert checkpoint.name == "step_00000002", "what was learned before is kept"


def test_one_failed_reward_that_ends_the_run_leaves_what_was_learned(random_folder, make_run, quiet):
    run = make_run(
        random_folder,
        steps=10,
        data={"limit": 40},
        reward=rewarded("raises_sometimes", on_failure="raise"),
        checkpoint={"every": None},
    )
    with pytest.raises(RunError, match=r"a reward failed \(error\)"):
        train(run, quiet)
    done = len(rows(run))
    checkpoint = newest(Path(run.run_dir) / "checkpoints", strict=True)
    assert done > 0 and checkpoint.name == f"step_{done:08d}"


def test_failed_rewards_are_masked_and_counted(random_folder, make_run, quiet):
    for name, kind in (("raises_sometimes", "error"), ("hangs_sometimes", "timeout")):
        run = make_run(
            random_folder,
            run_dir=f"{make_run().run_dir}-{kind}",
            steps=2,
            data={"limit": 12},
            sampling={"prompts_per_step": 12, "answers_per_prompt": 2},
            reward=rewarded(name, timeout_s=0.3, max_failure_share=1.0),
        )
        train(run, quiet)
        assert rows(run)[0][f"reward/failures/{kind}"] > 0
        assert rows(run)[0]["reward/failures"] < 24, "the others were scored"
        assert all_finite(run)


def test_equal_rewards_change_nothing_at_all(random_folder, make_run, quiet):
    run = make_run(
        random_folder,
        steps=2,
        reward=rewarded("constant"),
        learner={"optimizer": {"weight_decay": 0.1}},
        algorithm={"kl": {"coef": 0.0}},
    )
    train(run, quiet)
    start, end = weights(random_folder), weights(Path(run.run_dir) / "model")
    assert all(torch.equal(start[name], end[name]) for name in start)
    assert rows(run)[0]["frac_zero_std"] == 1 and rows(run)[0]["actor/skipped_empty"] == 1


@pytest.mark.parametrize("preset", preset_names())
def test_a_group_of_one_is_finite_or_refused(preset, random_folder, make_run, quiet):
    """Refused where answers are compared with the others of their group."""
    settings = {
        "steps": 2,
        "sampling": {"answers_per_prompt": 1},
        "reward": rewarded("length"),
        "algorithm": {"preset": preset, "kl": {"coef": 0.05}},
    }
    if preset not in ("ppo", "reinforce_pp"):
        with pytest.raises(ConfigError, match="alone it teaches nothing"):
            make_run(random_folder, **settings)
        return
    run = make_run(random_folder, **settings)
    train(run, quiet)
    assert all_finite(run)


def test_a_batch_of_truncated_answers_is_finite_and_teaches_nothing(random_folder, make_run, quiet):
    run = make_run(
        random_folder,
        steps=2,
        sampling={"max_answer_tokens": 1},
        reward=rewarded("length"),
        algorithm={"drop_truncated": True, "kl": {"coef": 0.0}},
    )
    train(run, quiet)
    assert rows(run)[0]["truncated_share"] > 0.9
    assert all_finite(run)


def test_dynamic_sampling_of_equal_groups_stops_at_its_bound(random_folder, make_run, quiet):
    run = make_run(
        random_folder, steps=1, reward=rewarded("constant"), algorithm={"keep": "mixed", "max_refills": 2}
    )
    train(run, quiet)
    assert rows(run)[0]["rollout/refills"] == 2 and rows(run)[0]["rollout/dropped_groups"] == 12


def test_two_runs_cannot_share_a_folder(random_folder, make_run, quiet):
    run = make_run(random_folder)
    with lock(Path(run.run_dir)), pytest.raises(RunError, match=r"in use by .*set another run_dir"):
        train(run, quiet)


def test_a_full_disk_does_not_stop_training_but_fails_the_run_if_it_stays_full(
    random_folder, make_run, quiet, monkeypatch
):
    write, calls = snapshot.write, []

    def full(folder, run, roles, boundary):
        calls.append(boundary.step)
        (folder / "half").write_text("half")
        if boundary.step in broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, run, roles, boundary)

    monkeypatch.setattr(snapshot, "write", full)
    broken = {2}
    run = make_run(random_folder, steps=4, checkpoint={"every": 2}, reward=rewarded("length"))
    train(run, quiet)
    assert calls == [2, 4] and newest(Path(run.run_dir) / "checkpoints", strict=True).name == "step_00000004"

    broken, later = {5, 6, 7, 8}, run.model_copy(update={"steps": 8})
    with pytest.raises(RunError, match="No space left"):
        train(later, quiet)
    assert newest(Path(run.run_dir) / "checkpoints", strict=True).name == "step_00000004"
    assert exported_step(Path(run.run_dir)) == 8, "the model is there"
    assert not list((Path(run.run_dir) / "checkpoints").glob("*tmp*"))


def test_a_sampler_that_means_something_else_by_a_logprob_is_found_before_the_first_update(
    random_folder, make_run, quiet, monkeypatch
):
    honest = inline.sampling_params

    def hotter(*given):
        return replace(honest(*given), temperature=1.1)

    monkeypatch.setattr(inline, "sampling_params", hotter)
    run = make_run(random_folder)
    with pytest.raises(RunError, match=r"sampler and trainer disagree.*its temperature"):
        train(run, quiet)
    assert not rows(run)


def of_the_draw(done):
    return replace(done, policy_logp=done.logp)


def wrong_later(done):
    return replace(done, policy_logp=done.policy_logp[:1] + tuple(p - 0.5 for p in done.policy_logp[1:]))


@pytest.mark.parametrize(
    ("sampling", "cut", "said", "cause"),
    [
        ({}, 1, lambda done: done, r"from the first token on: it saw another prompt \(a template"),
        ({"top_k": 5}, 0, of_the_draw, "it is truncation: .* sampling.top_k"),
        ({}, 0, wrong_later, "the first token is right, so its cache is not"),
    ],
)
def test_what_an_engine_does_otherwise_is_named(
    random_folder, make_run, quiet, monkeypatch, sampling, cut, said, cause
):
    """It drops the beginning of a prompt, or says other log-probabilities than those of the policy."""
    generate = EmbeddedEngine.generate

    def otherwise(self, requests, params, *, poll, on_done):
        asked = [replace(request, tokens=request.tokens[cut:]) for request in requests]
        done = generate(self, asked, params, poll=poll, on_done=lambda i, c: on_done(i, said(c)))
        return [said(completion) for completion in done]

    monkeypatch.setattr(EmbeddedEngine, "generate", otherwise)
    with pytest.raises(RunError, match=f"sampler and trainer disagree.*{cause}"):
        train(make_run(random_folder, sampling=sampling), quiet)


def test_an_engine_of_another_type_may_be_off_by_its_rounding_and_no_more(make_run):
    """At the tokens after the first, where the cause may be seen."""
    run = make_run(engine={"dtype": "bf16"}, placement={"kind": "apart"})
    actor, sampled = Actor(language_model(), run), batch()
    trainer_BT = actor.logprobs(sampled)
    later_BT = sampled.mask_BT & sampled.mask_BT.roll(1, dims=1)

    def said(share: float) -> Batch:
        return replace(sampled, policy_logp_BT=trainer_BT - share * later_BT * (1 + trainer_BT.abs()))

    check_agreement(actor, said(0.09))
    with pytest.raises(RunError, match=r"so it is the dtype: engine.dtype=bf16 and model.dtype=fp32, or the"):
        check_agreement(actor, said(0.11))


def test_prompts_and_answers_that_cannot_fit_are_refused_before_the_first_step(
    random_folder, make_run, quiet
):
    with pytest.raises(ConfigError, match=r"sampling.max_answer_tokens=300 make \d+, above the model's 256"):
        train(make_run(random_folder, sampling={"max_answer_tokens": 300}), quiet)


def test_an_update_that_breaks_the_weights_ends_the_run_before_anything_is_made_of_them(
    adding_folder, make_run, quiet
):
    """The rate rises from the first update to the last, and the second is one too many."""
    optimizer = {"schedule": "linear", "end_lr": 1e39}
    run = make_run(
        adding_folder, reward=rewarded("length"), checkpoint={"every": 1}, learner={"optimizer": optimizer}
    )
    with pytest.raises(
        RunError, match=r"learning rate 3.3\d+e\+38 left .*, model.\S+ the .*Lower learner.optim"
    ):
        train(run, quiet)
    assert len(rows(run)) == 1
    last = newest(Path(run.run_dir) / "checkpoints", strict=True)
    assert last.name == "step_00000001"
    assert all(tensor.isfinite().all() for tensor in weights(last / "model").values())
    quiet.allow_config_change = True
    lower = run.learner.model_copy(
        update={"optimizer": run.learner.optimizer.model_copy(update={"end_lr": 1e-4})}
    )
    train(run.model_copy(update={"learner": lower}), quiet)
    assert len(rows(run)) == run.steps and all_finite(run)


def test_a_warm_up_that_breaks_the_weights_ends_the_run(make_run, quiet):
    warmup = {"steps": 2, "batch": 2, "lr": 1e39}
    with pytest.raises(RunError, match=r"left weights that are not finite.* Lower warmup.lr"):
        train(make_run(warmup=warmup), quiet)


def test_gradients_that_are_not_finite_stop_the_run_and_leave_a_finite_checkpoint(
    random_folder, make_run, quiet, monkeypatch
):
    honest, seen = Actor._accumulate, []

    def poisoned(self, part, kl_coef):
        sums = honest(self, part, kl_coef)
        seen.append(1)
        if len(seen) > 2:
            next(iter(self.model.trainable().values())).grad.fill_(float("nan"))
        return sums

    monkeypatch.setattr(Actor, "_accumulate", poisoned)
    run = make_run(
        random_folder,
        steps=10,
        checkpoint={"every": 1},
        reward=rewarded("length"),
        learner={"max_nonfinite": 3},
    )
    with pytest.raises(RunError, match=r"not finite .* in 3 updates in a row"):
        train(run, quiet)
    assert [row["actor/skipped_nonfinite"] for row in rows(run)] == [0, 0, 1, 1]
    last = newest(Path(run.run_dir) / "checkpoints", strict=True)
    assert all(tensor.isfinite().all() for tensor in weights(last / "model").values())
