"""What goes wrong in a process that Ray placed ends the run by its name, or is refused before anything starts."""

import os
import re
import signal
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from copies import policy
from ray_runs import SMALL, alive, family, pids, steps_done, wait_until
from small_recipe import recipe
from tandem.checkpoint import newest
from tandem.config import load
from tandem.engine import Request, SamplingParams
from tandem.engine.receiver import ReceivingEngine
from tandem.engine.roads import FilesRoad
from tandem.errors import ConfigError, RunError
from tandem.model import LanguageModel
from tandem.model.new import new_tokenizer
from tandem.placement.cluster.build import ray_port
from tandem.train.run import Launch, train
from tandem.train.session import Session
from tiny_models import network

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

RAY = {"kind": "apart", "cpus": 1}
QUERY = "model.layers.0.self_attn.q_proj.weight"


def run_in(folder, **changes) -> None:
    path = recipe(folder, **SMALL | {"placement": RAY} | changes)
    train(load(path), Launch(recipe=str(path)))


@pytest.mark.parametrize("version", ["1.13.0", "2.51.2", "2.52.0", "3.0.0.dev0"])
def test_a_ray_that_is_too_old_is_refused_with_its_version(version, monkeypatch):
    """Before any of it is started."""
    from tandem.placement.cluster import port

    monkeypatch.setattr(port, "RAY_VERSION", version)
    if version > "2.52":
        assert ray_port(alone=True) is port
        return
    with pytest.raises(ConfigError, match=rf"2\.52 or newer, not the installed {version}; install tandem-rl"):
        ray_port(alone=True)


def test_a_tensor_that_is_missing_on_the_way_stops_the_run_with_its_name(tmp_path, monkeypatch):
    from tandem.placement.cluster.engines import Engines

    update = Engines.update

    def robbed(self, parcel):
        if parcel.offer.version == 1:
            for path in Path(parcel.offer.place).glob("*.safetensors"):
                save_file({k: v for k, v in load_file(path).items() if k != QUERY}, path)
        update(self, parcel)

    monkeypatch.setattr(Engines, "update", robbed)
    with pytest.raises(
        RunError,
        match=rf"engine 0 \(node .*\): weights of version 1 by road files: tensor {QUERY} never came",
    ):
        run_in(tmp_path)
    assert steps_done(tmp_path / "run") == 1, "the weights before came whole"


def deaf(worker: type) -> type:
    """An engine that takes the weights as they are sent, and computes with others."""

    class Deaf(worker):
        def update(self, offer, probe):
            super().update(offer, None)
            self.engine.model.network.get_input_embeddings().weight.data.mul_(1.5)
            return self.engine.score([probe])[0]

    return Deaf


def boastful(worker: type) -> type:
    """An engine that passes its probe, and is surer of its answers than its weights are."""

    class Boastful(worker):
        def generate(self, *arguments):
            done = super().generate(*arguments)
            return [replace(c, policy_logp=tuple(logp / 2 for logp in c.policy_logp)) for c in done]

        def progress(self, number, heard):
            return replace(super().progress(number, heard), answers=[])

    return Boastful


@pytest.mark.parametrize(("other", "said"), [
    (deaf, r"engine 0 \(node \w+ at .*, pid \d+\) and the trainer disagree on weights of version 0: .* Cause: the w"),
    (boastful, r"sampler and trainer disagree: .* Cause: .* the engine from the first token on"),
], ids=["probe", "answers"])  # fmt: skip
def test_an_engine_that_does_not_mean_what_the_learner_means_stops_the_run(
    other, said, tmp_path, monkeypatch
):
    """Before anything is learned from it."""
    from tandem.placement.cluster import places

    monkeypatch.setattr(places, "EngineWorker", other(places.EngineWorker))
    with pytest.raises(RunError, match=said):
        run_in(tmp_path, eval={"every": None})
    assert steps_done(tmp_path / "run") == 0
    assert len(pids(tmp_path / "run", "engine")) == 1, "another one would say the same"


def test_a_learner_that_hangs_ends_the_run_behind_a_checkpoint_and_leaves_nothing(tmp_path, monkeypatch):
    """Its time is up at once: no clock decides what is seen."""
    from tandem.placement.cluster.learners import Learners

    after, first_done, there = Session.after, Learners._first_done, []

    def hang(self, step, *rest):
        after(self, step, *rest)
        if step == 2:
            there.extend(ray_processes())
            os.kill(pids(tmp_path / "run", "learner")[-1], signal.SIGSTOP)

    def hurried(self, waiting, timeout_s, deadline):
        return first_done(self, waiting, timeout_s, time.monotonic() if there else deadline)

    monkeypatch.setattr(Session, "after", hang)
    monkeypatch.setattr(Learners, "_first_done", hurried)
    with pytest.raises(
        RunError, match=r"^learner 0 \(node \w+ at .*, pid \d+\) did not finish `\w+`"
    ) as error:
        run_in(tmp_path, checkpoint={"every": 1})
    told = str(error.value)
    assert "the end of" in told and "learner-0.log" in told and "goes on from its last checkpoint" in told
    assert newest(tmp_path / "run" / "checkpoints", strict=True).name == "step_00000003"
    assert len(there) > 4
    wait_until("all processes of the run are gone", lambda: not alive(there), 20)


def stopping(worker: type, folder: Path) -> type:
    """A learner of which rank 1 stops in the middle of its second update, when the other waits for its gradients."""

    class Stopping(worker):
        updates = 0

        def update(self, parts, kl_coef):
            self.updates += 1
            optimizer, limit = (
                self.actor.optimizer,
                dist.group.WORLD._get_backend(torch.device("cpu")).options,
            )
            if self.rank == 1 and self.updates == 2:
                norm = optimizer.gradient_norm

                def stopped():
                    (folder / "waits").write_text(f"{os.getpid()} {limit._timeout.total_seconds():g}")
                    os.kill(os.getpid(), signal.SIGSTOP)
                    return norm()

                optimizer.gradient_norm = stopped
            return super().update(parts, kl_coef)

    return Stopping


def test_of_learners_that_wait_for_one_that_hangs_that_one_is_blamed(tmp_path, monkeypatch):
    """Its time is up as soon as it has stopped."""
    from tandem.placement.cluster import places, port
    from tandem.placement.cluster.learners import Learners

    first_done, note = Learners._first_done, tmp_path / "waits"

    def hurried(self, waiting, limit, deadline):
        while not (done := port.first_done(waiting, 0.1)) and not note.exists():
            assert time.monotonic() < deadline
        if done:
            return done
        stopped = psutil.Process(int(note.read_text().split()[0]))
        wait_until("it has stopped", lambda: stopped.status() == psutil.STATUS_STOPPED)
        return first_done(self, waiting, limit, time.monotonic())

    monkeypatch.setattr(Learners, "_first_done", hurried)
    monkeypatch.setattr(places, "LearnerWorker", stopping(places.LearnerWorker, tmp_path))
    many = RAY | {"learners": 2, "learner_timeout_s": 2000}
    with pytest.raises(RunError) as error:
        run_in(tmp_path, placement=many, learner={"layout": {"shard": 2}}, algorithm={}, eval={"every": None})
    one, alive = (rf"learner {rank} \(node \w+ at [\d.]+, pid \d+\)" for rank in (1, 0))
    assert re.match(
        rf"{one} did not finish `update` within 2000 s \(placement\.learner_timeout_s; .*\), without a sign of life: "
        rf"stopped, or stuck; still at work: {alive}\nthe end of \S+learner-1\.log",
        str(error.value),
    )
    assert note.read_text().split()[1] == "2000", "the other learner waits as long"


def ray_processes() -> list[psutil.Process]:
    """Of this process's family those that Ray started, and what they are there for."""
    return [p for p in family(os.getpid()) if "ray" in " ".join(p.cmdline()[:2]) and p.pid != os.getpid()]


def test_an_error_inside_a_worker_says_role_node_and_cause(tmp_path):
    """The driver does not look for every weight of a folder."""
    folder = tmp_path / "reference"
    network("qwen3").save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    del held["model.layers.0.mlp.up_proj.weight"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    reference = {"path": str(folder)}
    path = recipe(tmp_path, **SMALL | {"steps": 1}, placement={"kind": "apart", **RAY}, reference=reference)
    with pytest.raises(
        ConfigError,
        match=r"learner 0 \(node \w+ at .*, pid \d+\): reference.path=\S+ lacks 1 weights: .*up_proj",
    ):
        train(load(path), Launch(recipe=str(path)))


def test_an_error_that_is_of_its_causes_class_too_is_told(tmp_path):
    """As of a learner whose connection to a killed one breaks."""
    from ray.exceptions import RayTaskError

    from tandem.placement.cluster import port

    error = RayTaskError("apply", "Traceback: in the collective", RuntimeError("Connection closed by peer"))
    lost = port.failure(
        port.Worker(None, "learner 0", tmp_path / "log"), "apply", error.as_instanceof_cause()
    )
    assert "learner 0" in str(lost) and "in the collective" in str(lost)


def test_an_engine_with_older_weights_refuses_to_sample():
    from tandem.placement.cluster.engine_worker import EngineWorker

    worker = object.__new__(EngineWorker)
    worker._engine = ReceivingEngine(
        LanguageModel(network("qwen3"), new_tokenizer(), "tiny"), FilesRoad(), slots=4
    )
    with pytest.raises(RunError, match="has version 0 of the weights, not 3"):
        worker.generate(1, [Request(tokens=(1, 2), key=0)], SamplingParams(max_tokens=2), 3)
    assert len(worker.engine.generate([Request(tokens=(1, 2), key=0)], SamplingParams(max_tokens=2))) == 1


def test_a_call_that_is_not_wanted_ends_whenever_that_is_said_and_the_next_goes_on(tmp_path, monkeypatch):
    """Both before it has begun and while the one after it is under way."""
    from tandem.placement.cluster.engine_worker import Abandoned, EngineWorker
    from tandem.placement.cluster.process import Process

    monkeypatch.setattr(Process, "__init__", lambda self, log, run: None)
    worker = EngineWorker(str(tmp_path / "log"), load(recipe(tmp_path)))
    worker._engine = ReceivingEngine(policy(), FilesRoad(), slots=4)
    asked = (
        [Request(tokens=(5, 6, 7), key=key) for key in range(3)],
        SamplingParams(max_tokens=4, min_tokens=4),
    )
    version = worker.engine.version
    worker.abandon(1)
    with pytest.raises(Abandoned):
        worker.generate(1, *asked, version)
    assert [len(done.tokens) for done in worker.generate(2, *asked, version)] == [4] * 3
    note = EngineWorker._note

    def late(self, done, tokens):
        self.abandon(2)
        note(self, done, tokens)

    monkeypatch.setattr(EngineWorker, "_note", late)
    assert [len(done.tokens) for done in worker.generate(3, *asked, version)] == [4] * 3
