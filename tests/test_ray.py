"""Roles on processes that Ray placed: the same run as in one process, whatever dies on the way."""

import re
import signal
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ray_runs import (
    RECIPES,
    SMALL,
    alive,
    caller,
    end,
    family,
    hanging,
    pids,
    process,
    small,
    steps_done,
    trajectory,
    wait_until,
)
from small_recipe import environment, recipe, start, tandem
from tandem.checkpoint import newest
from tandem.checkpoint.extract import extract
from tandem.config import load
from tandem.engine.probe import Probe
from tandem.errors import ConfigError, RunError
from tandem.journal import read_metrics
from tandem.placement.cluster.engines import Engines
from tandem.placement.cluster.learners import InUnits, Learners
from tandem.placement.cluster.lost import EnginesLost
from tandem.placement.copied import weights_root
from tandem.train.interrupt import Interrupted
from tandem.train.run import Launch, train
from tandem.train.session import Session

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

RAY = {"cpus": 1}
GCS = re.compile(r"--gcs-address=(\S+)")
STEPS = 20
LEARNER = {"optimizer": {"lr": 1e-3}, "tokens_per_forward": 48}
"""Each group is a unit of the reference's work."""


@pytest.fixture(scope="module")
def inline(tmp_path_factory) -> list[dict]:
    """The trajectory in one process."""
    return run_in(tmp_path_factory.mktemp("inline"))


def run_in(folder: Path, **changes) -> list[dict]:
    folder.mkdir(exist_ok=True)
    path = recipe(folder, **SMALL | {"steps": STEPS, "learner": LEARNER} | changes)
    train(load(path), Launch(recipe=str(path)))
    return trajectory(folder / "run")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "model" / "model.safetensors")


def test_colocated_is_the_run_of_one_process_though_learners_sleep_an_engine_dies_and_a_signal_comes(
    inline, tmp_path, monkeypatch
):
    """Weights, moments and reference leave the device for each sampling, and come back as they were: to the run, and
    into the checkpoint of the signal. The engine dies when it is about to give its memory to the learner."""
    left, call, poll, asleep, sleep = [], Learners.call, Session._poll, [], Engines.sleep

    def watched(self, method, *rest, **more):
        value = call(self, method, *rest, **more)
        if method == "sleep":
            left.append(value)
        return value

    def stopped(self, *progress):
        poll(self, *progress)
        if self.boundary.step == 2:
            raise Interrupted(15)

    def struck(self):
        if self._awake:
            asleep.append(process(self.seats[0].worker))
            if len(asleep) == 6:
                end(asleep[-1])
        sleep(self)

    keys = {"placement": {"kind": "colocated", **RAY, "backoff_s": 0.1}}
    keys["learner"] = LEARNER | {"sleep": True}
    monkeypatch.setattr(Learners, "call", watched)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_poll", stopped)
        with pytest.raises(Interrupted):
            run_in(tmp_path, **keys)
    assert newest(tmp_path / "run" / "checkpoints", strict=True).name == "step_00000002"
    assert len(left) == 3, "at the start, and after each update"
    with monkeypatch.context() as patch:
        patch.setattr(Engines, "sleep", struck)
        assert run_in(tmp_path, **keys) == inline
    assert len(set(asleep[:6])) == len(set(asleep[6:])) == 1 and asleep[5] != asleep[6], (
        "another took its place"
    )
    # Before the first update there are weights and reference; from then on moments of the same size too. Weights of a
    # checkpoint are mapped from its file.
    size = sum(tensor.nbytes for tensor in weights(tmp_path).values())
    assert [nbytes // size for nbytes in left] == [2, 4, 4] + [3] * (STEPS - 1)


def test_a_run_whose_engine_cannot_be_replaced_saves_what_it_has_and_goes_on(inline, tmp_path, monkeypatch):
    after, lost = Session.after, []

    def strike(self, step, *rest):
        after(self, step, *rest)
        if step == 2 and not lost:
            lost.append(pids(tmp_path / "run", "engine")[-1])
            end(lost[0])

    monkeypatch.setattr(Session, "after", strike)
    placed = {"placement": {"kind": "apart", **RAY, "restarts": 0}}
    with pytest.raises(EnginesLost, match=r"lost 1 times in a row \(placement.restarts=0\)"):
        run_in(tmp_path, **placed)
    assert newest(tmp_path / "run" / "checkpoints") is not None
    assert run_in(tmp_path, **placed) == inline


def test_apart_is_the_run_of_one_process_though_an_engine_dies_and_another_hangs(
    inline, tmp_path, monkeypatch
):
    """Whoever takes over answers the same, from the same weights; and reference work beside sampling changes nothing:
    four units a step, each begun when the answers to its question are there."""
    hang, hit, begun = hanging(monkeypatch), [], []
    after, begin = Session.after, InUnits.begin

    def strike(self, step, *rest):
        after(self, step, *rest)
        if step in (2, 6):
            victim = pids(tmp_path / "run", "engine")[-1]
            hit.append(victim)
            (end if step == 2 else hang)(victim)

    def watched(self, unit):
        begun.append(unit.size)
        begin(self, unit)

    monkeypatch.setattr(Session, "after", strike)
    monkeypatch.setattr(InUnits, "begin", watched)
    assert run_in(tmp_path, placement={"kind": "apart", **RAY, "backoff_s": 0.1}) == inline
    seen = pids(tmp_path / "run", "engine")
    assert len(set(seen)) == 3 and hit == seen[:2], "two engines were replaced"
    wait_until("its processes are gone", lambda: not any(psutil.pid_exists(pid) for pid in seen))
    assert begun == [4] * 4 * STEPS
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[1]
    assert row["timing/reference_model"] > 0 and row["timing/resharding_to_infer"] > 0
    assert "timing/non_overlap_reference_model" in row and row["timing/non_overlap_adv"] == row["timing/adv"]


def test_several_engines_and_learners_go_on_from_one_process_and_it_from_them(inline, tmp_path, monkeypatch):
    """In one process, with two engines and two learners that split the tokens and the reference's weights, with two
    pairs that share their memory, and in one process again. Every engine is held to the log-probabilities that the
    learners compute together. Each run has a namespace of its own."""
    checked, check, namespaces = [], Probe.check, set()

    def watched(self, engine, version, scores):
        from ray import get_runtime_context

        namespaces.add(get_runtime_context().namespace)
        checked.append((version, len(self.logp), len(scores)))
        return check(self, engine, version, scores)

    monkeypatch.setattr(Probe, "check", watched)
    several = {"placement": {"kind": "apart", **RAY, "engines": 2, "learners": 2}}
    several["learner"] = LEARNER | {"layout": {"context": 2}}
    several["reference"] = {"layout": {"shard": 2}}
    pairs = several | {
        "placement": {"kind": "colocated", **RAY, "engines": 2, "learners": 2},
        "engine": {"transfer": "ipc"},
    }
    for steps, changes in (2, {}), (3, several), (5, pairs), (6, {}):
        ours = run_in(tmp_path, steps=steps, **changes)
    assert [row["step"] for row in ours[:6]] == list(range(6))
    for row, other in zip(ours[:6], inline[:6], strict=True):
        assert row["reward/mean"] == other["reward/mean"] and row["version"] == other["version"]
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["kl/reference"] == pytest.approx(other["kl/reference"], abs=1e-6)
    assert checked[:2] == [(0, 31, 31)] * 2, "both engines, before the first answer"
    assert len(namespaces) == 2 and all(re.fullmatch("tandem-[0-9a-f]{12}", name) for name in namespaces)


def test_an_engine_of_another_type_agrees_as_far_as_that_allows(tmp_path, monkeypatch):
    """It computes in bfloat16, the learner in float32: more than float32 alone would allow. Every second version is
    verified. In between an error in the learner comes with its place and traceback."""
    after, told = Session.after, []
    sent, update, proved, check = [], Engines.update, [], Probe.check

    def divided(actor, reference):
        return actor.run.steps / 0

    def asked(self, step, *rest):
        after(self, step, *rest)
        if step == 0:
            with pytest.raises(RunError) as error:
                self.roles.on_learners(divided)
            told.append(str(error.value))

    def counted(self, parcel):
        offer = parcel.offer
        sent.append((offer.version, offer.verify, offer.checksums is not None, parcel.probe is not None))
        update(self, parcel)

    def watched(self, engine, version, scores):
        proved.append(version)
        return check(self, engine, version, scores)

    monkeypatch.setattr(Session, "after", asked)
    monkeypatch.setattr(Engines, "update", counted)
    monkeypatch.setattr(Probe, "check", watched)
    engine = {"dtype": "bf16", "verify_every": 2}
    rows = run_in(tmp_path, steps=3, placement={"kind": "apart", **RAY}, engine=engine)
    gaps = [row["rollout/logp_gap_max"] for row in rows if "grad_norm" in row]
    assert len(gaps) == 3 and 1e-4 < min(gaps) <= max(gaps) < 0.1
    assert sent[:3] == [(version, *[version % 2 == 0] * 3) for version in range(3)]
    assert proved == [0, 2]
    (message,) = told
    assert re.match(
        r"learner 0 \(node \w+ at [\d.]+, pid \d+\) failed in `apply`; its log: \S+learner-0.log\n", message
    )
    assert (
        "in divided" in message and "\x1b" not in message and "ZeroDivisionError: division by zero" in message
    )


@pytest.mark.gpu
def test_a_pair_on_a_gpu_shares_its_memory(tmp_path):
    """The engine uses the GPU that its learner has; every version is proved by checksums and log-probabilities."""
    pair = {"placement": {"kind": "colocated", **RAY}, "engine": {"transfer": "ipc"}}
    rows = [row for row in run_in(tmp_path, steps=4, **pair) if "grad_norm" in row]
    assert [row["version"] for row in rows] == [1, 2, 3, 4]
    assert all(row["rollout/logp_gap_max"] < 1e-3 for row in rows)


def test_a_killed_driver_leaves_nothing_and_a_killed_learner_a_checkpoint(tmp_path):
    """Both times the same command goes on from before the first step, for no other checkpoint is there yet, and the end
    is that of a run that was never touched."""
    changes = SMALL | {"steps": 20, "learner": LEARNER, "checkpoint": {"every": 20}, "eval": {"every": None}}
    whole, part = tmp_path / "whole", tmp_path / "part"
    run_in(whole, **changes)
    part.mkdir()
    path = recipe(part, **changes, placement={"kind": "apart", **RAY})
    done = lambda steps: lambda: steps_done(part / "run") >= steps  # noqa: E731

    driver = start("train", path)
    wait_until("two steps are done", done(2))
    processes = family(driver.pid)
    left = weights_root(load(path), part / "run")
    assert list(left.glob("v*"))
    assert len(processes) > 5
    heard = {
        c.laddr.ip for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN
    }
    assert heard and heard <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, (
        "nobody else reaches a port of the run"
    )
    assert not [p for p in processes if "dashboard" in p.name()]
    driver.send_signal(signal.SIGSTOP)
    (address,) = {found for p in processes for found in GCS.findall(" ".join(p.cmdline()))}
    here = environment() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    assert caller(address, here | {"RAY_AUTH_MODE": "disabled"}) == "refused"
    assert caller(address, here | {"RAY_AUTH_MODE": "token"}) == "in"
    end(driver.pid)
    driver.wait()
    wait_until("all processes are gone", lambda: not alive(processes[1:]), 30)
    wait_until("and the weights in shared memory", lambda: not left.exists(), 30)

    before = pids(part / "run", "learner")
    driver = start("train", path)
    again = lambda: len(pids(part / "run", "learner")) > len(before) and done(4)()  # noqa: E731
    wait_until("four steps are done again", again)
    end(pids(part / "run", "learner")[-1])
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode not in (0, None)
    assert re.search(r"learner 0 \(node \w+ at [\d.]+, pid \d+\) died during", errors), errors
    assert "goes on from its last checkpoint" in " ".join(errors.split())
    assert newest(part / "run" / "checkpoints", strict=True).name == "step_00000000"

    assert run_in(part, **changes, placement={"kind": "apart", **RAY}) == trajectory(whole / "run")
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(part)[name], tensor), name


@pytest.mark.parametrize(("keys", "said"), [
    ({"kind": "inline", "engines": 2}, "placement.engines is for placement.kind=colocated or apart"),
    ({"kind": "colocated", "engines": 2}, "tensor_parallel=1 learner; set placement.engines=1"),
])  # fmt: skip
def test_keys_that_cannot_be_meant_are_refused(tmp_path, keys, said):
    with pytest.raises(ConfigError, match=said):
        load(recipe(tmp_path, placement=keys))


def test_learners_sleep_only_beside_engines(tmp_path):
    with pytest.raises(ConfigError, match="no engine of another process waits"):
        load(recipe(tmp_path, placement={"kind": "apart"}, learner={"sleep": True}))


def test_colocated_refuses_lag_and_apart_other_roads(tmp_path):
    with pytest.raises(ConfigError, match="engines and learners take turns"):
        load(recipe(tmp_path, placement={"kind": "colocated"}, sampling={"max_lag": 1}))
    with pytest.raises(
        ConfigError, match=r"transfer=broadcast: with placement.kind=colocated .* by auto, files, ipc"
    ):
        load(recipe(tmp_path, placement={"kind": "colocated"}, engine={"transfer": "broadcast"}))
    with pytest.raises(ConfigError, match=r"ipc points into the memory that learner\.sleep=true gives away"):
        load(
            recipe(
                tmp_path,
                placement={"kind": "colocated"},
                engine={"transfer": "ipc"},
                learner={"sleep": True},
            )
        )


SCRAMBLED = Path(__file__).parents[1] / "benchmarks" / "reward.py"
"""Rewards that differ between all answers, so that every one of a random model's teaches something."""
TINY = {
    "model.new": "{hidden_size: 32, layers: 1, heads: 2, kv_heads: 1, max_positions: 128}",
    "reward.functions": f"[{{name: '{SCRAMBLED}:scrambled'}}]",
}


def whole_recipe(name: str, folder: Path, **keys) -> list[dict]:
    """The trajectory of a recipe that ran through, held to what every run with lag shows."""
    run = load(RECIPES / f"{name}.yaml", small(folder, **TINY | keys))
    train(run, Launch(recipe=name))
    rows = [row for row in read_metrics(folder / "run" / "metrics.jsonl") if "reward/mean" in row]
    assert [row["version"] for row in rows] == list(range(1, run.steps + 1))
    assert max(row["rollout/lag_max"] for row in rows) == run.sampling.max_lag > 0
    assert all("timing/non_overlap_rollout" in row for row in rows)
    assert all(row["actor/updates"] == run.learner.updates_per_step and row["grad_norm"] > 0 for row in rows)
    assert (folder / "run" / "model" / "config.json").exists()
    return trajectory(folder / "run")


def test_the_recipe_of_one_machine_is_the_run_of_one_process(tmp_path):
    """Through the warm-up, which is made in the driver and taken over by the learner; with lag, too."""
    warm = {"warmup.steps": 20, "warmup.batch": 8}
    ours = whole_recipe("node", tmp_path, **warm)
    assert whole_recipe("node", tmp_path / "whole", **warm, **{"placement.kind": "inline"}) == ours


def test_sampler_and_trainer_of_the_decoupled_recipe_are_killed_without_loss(tmp_path):
    """The run goes on with another sampler, and by the same command with other trainers. Whether weights go through
    files or by broadcast is the same to it."""
    keys = TINY | {"warmup": "null", "steps": 10, "sampling.max_answer_tokens": 48}
    whole = whole_recipe("decoupled", tmp_path, **keys, **{"engine.transfer": "broadcast"})
    assert max(row.get("actor/ratio_max", 1) for row in whole) > 1.001, (
        "four updates on the same weights' answers"
    )
    part = tmp_path / "part" / "run"
    command = ("train", RECIPES / "decoupled.yaml", *small(tmp_path / "part", **keys))
    driver = start(*command)
    wait_until("two steps are done", lambda: steps_done(part) >= 2)
    end(pids(part, "engine")[-1])
    wait_until("another takes the sampler's place", lambda: len(set(pids(part, "engine"))) == 2)
    wait_until("four steps are done", lambda: steps_done(part) >= 4)
    victim = pids(part, "learner")[-1]
    end(victim)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 1 and "Traceback" not in errors.partition("its log")[0], errors
    said = " ".join(errors.split())
    assert re.search(rf"learner 1 \(node \w+ at [\d.]+, pid {victim}\) died during `\w+`", said), errors
    assert "goes on from its last checkpoint" in said, errors
    again = tandem(*command)
    assert again.returncode == 0, again.stderr
    assert trajectory(part) == whole
    taken = load_file(extract(part, tmp_path / "taken") / "model.safetensors")
    for name, tensor in load_file(part / "model" / "model.safetensors").items():
        assert torch.equal(taken[name], tensor), name
