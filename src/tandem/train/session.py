"""What stands around the loop: evaluation, journal, checkpoints, and the answer to a signal."""

import logging
from pathlib import Path
from statistics import fmean, stdev

import psutil

from tandem.checkpoint import save
from tandem.config.run import Run
from tandem.data.prompts import PromptSet
from tandem.device import allocated_bytes
from tandem.errors import RunError
from tandem.journal import Journal, Timer, throughput
from tandem.learner import Actor, Reference
from tandem.placement import inline
from tandem.placement.inline import Roles
from tandem.rewards.scorer import Scorer
from tandem.train import snapshot
from tandem.train.evaluation import Evaluation, evaluate
from tandem.train.interrupt import Interruption
from tandem.train.profile import StepProfile
from tandem.train.snapshot import Boundary
from tandem.types import Experience, Group, Prompt

logger = logging.getLogger("tandem.train")


class Session:
    """The observer of `reinforce`."""

    def __init__(
        self,
        run: Run,
        roles: Roles,
        prompts: PromptSet,
        scorer: Scorer,
        held_out: list[Prompt],
        journal: Journal,
        timer: Timer,
        interruption: Interruption,
        start: int,
        warmup_seconds: float,
    ) -> None:
        self.run, self.roles, self.held_out = run, roles, held_out
        self.prompts, self.scorer = prompts, scorer
        self.journal, self.timer, self.interruption = journal, timer, interruption
        self.warmup_seconds = warmup_seconds
        self.checkpoints = Path(run.run_dir) / "checkpoints"
        self.start = start
        """Steps done before this session."""
        self.boundary = self._boundary(start)
        self.first: Evaluation | None = None
        """Of the untrained policy, where this session has it."""
        self.last: Evaluation | None = None
        self._figures: dict[str, float] = {}
        self._profiled = start + 1 if run.profile else None
        if run.profile and run.steps < start + 2:
            logger.warning(
                "profile=true traces the second step from where a run begins or goes on, and steps=%d leaves none: "
                "nothing is traced; set steps=%d or more",
                run.steps,
                start + 2,
            )
        self._profile: StepProfile | None = None
        self._saved: int | None = start or None
        roles.sampler.poll = self._poll

    def before(self, step: int) -> None:
        self.boundary = self._boundary(step)
        self.interruption.check()
        if step == 0 and self.run.placement.kind != "inline" and self.run.checkpoint.every is not None:
            # Processes that may be lost have a checkpoint behind them from the start, the warm-up in it.
            self.save()
        self._figures = self._evaluate(step)
        if step == self.run.steps and self._figures:
            self.journal.log(step, self._figures)
        if step == self._profiled and step < self.run.steps:
            folder = Path(self.run.run_dir) / "profile"
            critic = None if self.roles.critic is None else self.roles.critic.model
            self._profile = StepProfile(folder, self.roles.actor, critic, self.journal.say)
            self._profile.start()

    def after(
        self, step: int, groups: list[Group], experience: Experience, figures: dict[str, float]
    ) -> None:
        clock = self._clock(groups)
        if self._profile is not None:
            self._profile.finish(step, groups, clock, self.run.sampling.slots)
            self._profile = None
        figures = figures | self._figures | self.roles.stream.last | step_figures(groups) | clock
        done = step + 1
        figures["version"] = self.roles.sampler.version
        advantages = (experience.advantage_BT.sum(-1) / experience.mask_BT.sum(-1).clamp(min=1)).tolist()
        self.journal.record(step, groups, advantages)
        self.journal.log(step, figures)
        every = self.run.checkpoint.every
        if every is not None and done % every == 0 and done < self.run.steps:
            self.boundary = self._boundary(done)
            try:
                self.save()
            except RunError as error:
                logger.warning("%s; training goes on and saves again after %d steps", error, every)

    def _poll(self, answers: int, tokens: int, total: int) -> None:
        """While answers are sampled: stop if asked to, and show how far it is."""
        self.interruption.check()
        self.journal.progress(f"{answers:,} of {total:,} answers, {tokens:,} tokens")

    def save(self) -> None:
        """A checkpoint of the last boundary."""
        if self._saved == self.boundary.step:
            return
        with self.timer("save"):
            save(
                self.checkpoints,
                self.boundary.step,
                lambda folder: snapshot.write(folder, self.run, self.roles, self.boundary),
                config_hash=snapshot.config_hash(self.run),
                keep=self.run.checkpoint.keep,
            )
        self._saved = self.boundary.step

    def _boundary(self, step: int) -> Boundary:
        return Boundary(
            step=step,
            roles=inline.state(self.roles),
            data=self.prompts.fingerprint,
            rewards=self.scorer.digests,
        )

    def _evaluate(self, step: int) -> dict[str, float]:
        every = self.run.eval.every
        if every is None or not self.held_out or (step % every and step != self.run.steps):
            return {}
        with self.timer("eval"):
            self.last = evaluate(self.run, self.roles.sampler, self.held_out)
        if step == 0:
            self.first = self.last
        return self.last.figures

    def _clock(self, groups: list[Group]) -> dict[str, float]:
        seconds = waited(self.timer.take()) | self.roles.take_seconds()
        rollouts = [r for g in groups for r in g.rollouts]
        prompt_tokens = sum(r.prompt_length for r in rollouts)
        rates = throughput(prompt_tokens, sum(r.answer_length for r in rollouts), seconds)
        memory = {
            "memory/rss_mb": psutil.Process().memory_info().rss / 2**20,
            "memory/device_mb": self.roles.on_learners(device_bytes) / 2**20,
        }
        return seconds | rates | memory


def waited(seconds: dict[str, float]) -> dict[str, float]:
    """The loop's own seconds, and among them those of stages that may have been worked on before it came there."""
    stages = [stage for stage in ("reference_model", "critic_model", "adv") if f"timing/{stage}" in seconds]
    return seconds | {f"timing/non_overlap_{stage}": seconds[f"timing/{stage}"] for stage in stages}


def device_bytes(actor: Actor, reference: Reference | None) -> int:
    return allocated_bytes(actor.model.device)


def step_figures(groups: list[Group]) -> dict[str, float]:
    """Rewards and lengths of a step's answers."""
    rollouts = [r for g in groups for r in g.rollouts]
    scores = [r.score for r in rollouts if r.score is not None]
    rewards = [s.reward for s in scores if s.reward is not None]
    failed = [s.failure for s in scores if s.failure is not None]
    figures: dict[str, float] = {"reward/failures": len(failed)}
    figures |= {f"reward/failures/{kind}": failed.count(kind) for kind in sorted(set(failed))}
    if rewards:
        figures |= {"reward/mean": fmean(rewards), "reward/max": max(rewards), "reward/min": min(rewards)}
        figures["reward/std"] = stdev(rewards) if len(rewards) > 1 else 0.0
    names = sorted({name for s in scores for name in s.parts})
    for name in names:
        figures[f"reward/parts/{name}"] = fmean(s.parts[name] for s in scores if name in s.parts)
    lengths = {
        "response_length": [r.answer_length for r in rollouts],
        "prompt_length": [r.prompt_length for r in rollouts],
    }
    for name, values in lengths.items():
        figures |= {f"{name}/mean": fmean(values), f"{name}/max": max(values), f"{name}/min": min(values)}
    figures["truncated_share"] = fmean(r.finish == "length" for r in rollouts)
    return figures
