"""Actor, reference and engines on processes that Ray placed, and the roles of the loop in front of them."""

import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.algorithms import KlController
from tandem.config.run import Run
from tandem.data.cursor import Cursor
from tandem.data.prompts import PromptSet
from tandem.engine.roads import check_own
from tandem.errors import ConfigError
from tandem.model import LanguageModel, tokenizer_of
from tandem.placement.cluster.ahead import AheadStream, Line, SamplerInLine
from tandem.placement.cluster.guard import Guard
from tandem.placement.copied import weights_root
from tandem.placement.inline import sampling_params
from tandem.rewards.scorer import Scorer
from tandem.rewards.watch import FailureWatch
from tandem.rollout import Sampler, Stream

if TYPE_CHECKING:
    from tandem.placement.cluster.engines import Engines
    from tandem.placement.cluster.learners import (
        Learners,
        RemoteActor,
        RemoteCritic,
        RemoteReference,
    )
    from tandem.placement.cluster.port import Cluster

LOGS = "logs"
"""Below the run folder: one file per worker."""
START = "start"
"""Below the run folder: the weights that the learners begin with, where they are made by the driver."""


@dataclass(slots=True, kw_only=True)
class RemoteRoles:
    """What the loop sees, as `inline.Roles`."""

    actor: "RemoteActor"
    reference: "RemoteReference | None"
    critic: "RemoteCritic | None"
    sampler: SamplerInLine
    stream: AheadStream
    kl: KlController
    learners: "Learners"
    engines: "Engines"
    line: Line
    open: ExitStack = field(default_factory=ExitStack)
    """Closes everything, the last opened first."""
    sent: int = 0
    sending_s: float = 0.0

    def publish(self, version: int) -> None:
        """The engines take the actor's weights when they are done with what they were asked before, or at once where
        weights reach answers in flight."""
        self.serve(version)
        if self.reference is not None and self.actor.run.refreshes_reference(version):
            self.reference.refresh(self.actor)

    def serve(self, version: int) -> None:
        """Answers that are asked for from now on come from the actor's present weights, which are of this version."""
        self.sent += 1
        verify = self.actor.run.engine.verifies(self.sent)
        began = time.monotonic()
        parcel = self.learners.call("offer", version, verify)
        self.sending_s += time.monotonic() - began

        in_flight = self.actor.run.sampling.in_flight
        if in_flight:
            self.engines.offer(parcel)

        def take() -> None:
            began = time.monotonic()
            if in_flight:
                self.engines.settle()
            else:
                self.engines.update(parcel)
            self.sending_s += time.monotonic() - began

        self.line.submit(take)
        self.sampler.version = version

    def on_learners(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(actor, reference, *arguments)` in every learner; the value is that of the first."""
        return self.learners.apply("apply", work, *arguments)

    def take_seconds(self) -> dict[str, float]:
        """As `inline.Roles.take_seconds`, on the clocks of those who work."""
        seconds = self.sampler.take_seconds()
        if self.reference is not None:
            seconds["timing/reference_model"] = self.reference.work.take_seconds()
        if self.critic is not None:
            seconds["timing/critic_model"] = self.critic.work.take_seconds()
        seconds["timing/resharding_to_infer"], self.sending_s = self.sending_s, 0.0
        return seconds | {"timing/resharding_to_train": self.learners.take_turn_s()}

    def on_critic(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """As `on_learners`, with `work(critic, *arguments)`, for a run that has one."""
        return self.learners.apply("apply_critic", work, *arguments)

    def close(self) -> None:
        self.open.close()


def build(
    run: Run,
    start: LanguageModel | None,
    prompts: PromptSet,
    scorer: Scorer,
    reference_folder: Path | None = None,
) -> RemoteRoles:
    """The roles of a run. `start` is what the learners begin with where it is made in this process; else each loads
    `model`."""
    port = ray_port(run.placement.address is None)
    # Both name the port, which only a run with Ray can import.
    places = importlib.import_module("tandem.placement.cluster.places")
    with ExitStack() as stack:
        folder = Path(run.run_dir).absolute()
        run, root = with_absolute_paths(run), weights_root(run, folder)
        check_own(root)
        guard = Guard()
        stack.callback(guard.close)
        cluster: Cluster = port.Cluster(run.placement, places.cpus(run), folder / LOGS)
        stack.callback(cluster.close)
        guard.watch()
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        guard.remove(root)
        line = Line(threads(run))
        stack.callback(line.close)
        placed = places.Placed(run, cluster, root, line, guard)
        stack.callback(placed.engines.close)
        facts = placed.build_learners(start_folder(start, folder), reference_folder)
        stack.callback(placed.close_learners)
        tokenizer = tokenizer_of(run.model)
        params = sampling_params(run, prompts.template, tokenizer)
        stop_tokens = facts.stop_tokens | params.stop_tokens
        judge = placed.reward_model() if run.reward.model is not None else None
        inner = Sampler(placed.engines, scorer, tokenizer, run, params, stop_tokens, judge)
        kl = run.algorithm.kl
        cursor = Cursor(len(prompts.prompts), run.seed, run.data.shuffle)
        watch = FailureWatch(run.reward.max_failure_share)
        stream = Stream(sampler=inner, prompts=prompts, cursor=cursor, watch=watch)
        reference = placed.reference() if run.needs_reference else None
        critic = placed.critic() if run.needs_critic else None
        placed.beside_sampling(inner, [role.work for role in (reference, critic) if role is not None])
        roles = RemoteRoles(
            actor=placed.actor(facts),
            reference=reference,
            critic=critic,
            sampler=SamplerInLine(inner, line),
            stream=AheadStream(stream, line),
            kl=KlController(kl.coef, kl.target, kl.horizon),
            learners=placed.learners,
            engines=placed.engines,
            line=line,
        )
        roles.serve(0)
        guard.watch()
        roles.open = stack.pop_all()
        return roles


def with_absolute_paths(run: Run) -> Run:
    """The run as workers get it, whose working folder is another: models that are folders here, by whole paths."""
    model, judge = run.model, run.reward.model
    if judge is not None:
        judge = judge.model_copy(update={"path": absolute(judge.path)})
    changed = {
        "model": model.model_copy(update={"path": absolute(model.path)}),
        "reference": run.reference.model_copy(update={"path": absolute(run.reference.path)}),
        "critic": run.critic.model_copy(update={"path": absolute(run.critic.path)}),
        "reward": run.reward.model_copy(update={"model": judge}),
    }
    return run.model_copy(update=changed)


def absolute(path: str | None) -> str | None:
    """A path that is there, from the root on; whatever else is the name of a model on the hub."""
    folder = None if path is None else Path(path).expanduser()
    return str(folder.absolute()) if folder is not None and folder.exists() else path


def threads(run: Run) -> int:
    """Of the line. With weights in flight no answer is bound to the weights that others come from: every step that was
    asked for is sampled, beside it an evaluation, and weights are waited for. Groups that are refused are made up for
    before the next step's prompts are known."""
    sampling = run.sampling
    return sampling.max_lag + 3 if sampling.in_flight and run.algorithm.keep == "all" else 1


def ray_port(alone: bool) -> Any:
    """The module that names Ray, imported when a run is placed with it and not before; `alone` where Ray is started for
    this machine."""
    # Ray reads it when it is first imported. Whoever reaches a port of Ray without the token must get nothing.
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # One idle process per core, none of which a worker with an environment of its own can use.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Each takes most of a minute where `auto` is a cluster that is gone; by default there are 20.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    needed, instead = "placement.kind needs Ray 2.52 or newer", "or set placement.kind=inline"
    try:
        with loopback() if alone else nullcontext():
            port = importlib.import_module("tandem.placement.cluster.port")
    except ImportError as cause:
        raise ConfigError(
            f"{needed}, which cannot be imported ({cause}); install tandem-rl[ray], {instead}"
        ) from cause
    # An older one asks for no token, whatever RAY_AUTH_MODE says.
    if tuple(map(int, port.RAY_VERSION.split(".")[:2])) < (2, 52):
        raise ConfigError(
            f"{needed}, not the installed {port.RAY_VERSION}; install tandem-rl[ray], {instead}"
        )
    return port


@contextmanager
def loopback() -> Iterator[None]:
    """A Ray that is imported inside has all its ports on this machine's own address, as it does on systems for which it
    knows no clusters; else they are open to whoever reaches the machine."""
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before = os.environ.get(name)
    os.environ[name] = before or "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def start_folder(start: LanguageModel | None, folder: Path) -> Path | None:
    if start is None:
        return None
    start.save(folder / START)
    return folder / START
