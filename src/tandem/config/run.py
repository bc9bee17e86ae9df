"""A run: its sections, their agreement, and what follows from their sizes."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tandem.config.critic import Critic
from tandem.config.engine import Engine
from tandem.config.placement import Placement
from tandem.config.reward import Reward
from tandem.config.section import Section
from tandem.config.sections import (
    Algorithm,
    Checkpoint,
    Data,
    Eval,
    Journal,
    Learner,
    Model,
    Reference,
    Sampling,
    Warmup,
)

ROADS = {
    "inline": ("auto", "memory", "files"),
    "colocated": ("auto", "files", "ipc"),
    "apart": ("auto", "files", "broadcast"),
}
"""Values of engine.transfer that lead from trainer to engine, by placement.kind."""


class Run(Section):
    """Everything a run is. The resolved form is saved as `config.yaml` in the run folder."""

    run_dir: str
    """Folder of the run; `runs/<recipe>` unless given."""
    steps: int = Field(100, ge=0)
    """Passes of the loop: sample, score, update, publish."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Every random number of the run follows from it."""
    device: str = "auto"
    """`auto` for the accelerator if there is one, else `cpu`; or a device by name, such as `cuda:1`."""
    threads: int | None = Field(None, gt=0)
    """CPU threads for tensor work in this process; null for the cores it may use. Learners and engines under Ray have
    `placement.cpus`."""
    profile: bool = False
    """Trace the second step, and table where its time went against the device's limits (`<run_dir>/profile`), with
    placement.kind=inline."""
    model: Model
    data: Data
    warmup: Warmup | None = None
    """Supervised stage before the first step; only for `model.new` on a task of the project's own."""
    sampling: Sampling = Sampling()
    engine: Engine = Engine()
    placement: Placement = Placement()
    reward: Reward
    algorithm: Algorithm = Algorithm()
    learner: Learner = Learner()
    reference: Reference = Reference()
    critic: Critic = Critic()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    journal: Journal = Journal()

    @field_validator("run_dir")
    @classmethod
    def _of_the_user(cls, folder: str) -> str:
        return str(Path(folder).expanduser())

    @property
    def rollouts_per_step(self) -> int:
        return self.sampling.prompts_per_step * self.sampling.answers_per_prompt

    @property
    def engine_dtype(self) -> Literal["fp32", "bf16"]:
        """Type of the weights that answers are sampled with."""
        return self.engine.dtype or self.model.dtype

    @property
    def total_updates(self) -> int:
        return self.steps * self.learner.updates_per_step * self.learner.epochs_per_step

    @property
    def on_policy(self) -> bool:
        """One update per step with fresh answers: the importance ratio is 1."""
        return (
            self.learner.updates_per_step * self.learner.epochs_per_step == 1 and self.sampling.max_lag == 0
        )

    @property
    def keeps(self) -> bool:
        """The first update of a step may be given what sampling computed: both have the same weights, in one process,
        and no part of the forward pass is compiled or made twice."""
        one = self.placement.kind == "inline" and self.engine.kind == "embedded" and not self.sampling.max_lag
        learner = self.learner
        plain = self.model.lora is None and not (learner.compile or learner.checkpointing)
        return one and plain and self.model.dtype == "fp32" and learner.keep_mb > 0

    @property
    def needs_reference(self) -> bool:
        return self.algorithm.kl.coef > 0

    @property
    def step_unit(self) -> int:
        """Groups of a step whose reference log-probabilities, and values, are computed together."""
        return self.unit(self.sampling.prompts_per_step, self.sampling.answers_per_prompt)

    def unit(self, prompts: int, answers: int) -> int:
        """Groups that are computed together beside sampling, in the order of their prompts, when so many prompts get
        so many answers each: as many as fill a forward, and at least an eighth of all. Fixed, so that it changes
        nothing when a unit is computed."""
        longest = answers * self.sampling.max_answer_tokens
        full = self.placement.learners * self.learner.room() // longest
        return max(1, full, -(-prompts // 8))

    @property
    def needs_critic(self) -> bool:
        return self.algorithm.advantage == "gae"

    @property
    def correct(self) -> str:
        """The term of the reward that says whether an answer is correct."""
        return self.eval.correct or self.reward.terms[0].name

    @property
    def old_logp(self) -> Literal["none", "recompute", "rollout"]:
        """Where the ratio's denominator comes from; none where the ratio is 1."""
        if self.algorithm.old_logp == "auto":
            return "none" if self.on_policy else "recompute"
        return self.algorithm.old_logp

    def refreshes_reference(self, steps_done: int) -> bool:
        every = self.reference.refresh_every
        return every is not None and steps_done % every == 0

    def arithmetic(self) -> str:
        """The sizes of a step in one sentence."""
        s, learner = self.sampling, self.learner
        per_update = self.rollouts_per_step // learner.updates_per_step
        times = f" x {learner.epochs_per_step} epochs" if learner.epochs_per_step > 1 else ""
        policy = "on-policy" if self.on_policy else "only the first update of a step is on-policy"
        if s.max_lag:
            policy = f"{'tokens' if s.in_flight else 'answers'} at most {s.max_lag} step{'s' * (s.max_lag > 1)} old"
        bound = "about" if learner.tokens_per_forward is None else "at most"
        return (
            f"{s.prompts_per_step} prompts x {s.answers_per_prompt} answers = {self.rollouts_per_step} rollouts"
            f" -> {learner.updates_per_step} update{'s' * (learner.updates_per_step > 1)} of {per_update}{times},"
            f" in forwards of {bound} {learner.room():,} tokens ({policy})"
        )

    @model_validator(mode="after")
    def _road_leads_there(self) -> "Run":
        kind, road = self.placement.kind, self.engine.transfer
        if road not in ROADS[kind]:
            raise ValueError(
                f"engine.transfer={road}: with placement.kind={kind} weights travel by {', '.join(ROADS[kind])}"
                + " (a broadcast needs a device for each of its processes)" * (road == "broadcast")
            )
        if self.engine.dtype is not None and self.engine.kind == "embedded" and kind == "inline":
            raise ValueError(
                f"engine.dtype={self.engine.dtype}: with placement.kind=inline the embedded engine samples from the "
                "trainer's own weights, which are of model.dtype; leave it null"
            )
        if self.engine.kind == "vllm" and self.model.lora is not None:
            if road in ("broadcast", "ipc"):
                raise ValueError(
                    f"engine.transfer={road}: vLLM reads adapters (model.lora) from files; use auto or files"
                )
            if self.model.path is None:
                raise ValueError(
                    "engine.kind=vllm with model.lora reads the base model from its folder: set model.path instead of "
                    "model.new"
                )
        if road == "ipc" and self.learner.sleep:
            raise ValueError(
                "engine.transfer=ipc points into the memory that learner.sleep=true gives away; use auto or files"
            )
        return self

    @model_validator(mode="after")
    def _engines_lie_on_learners(self) -> "Run":
        place, wide = self.placement, self.engine.tensor_parallel
        if place.kind != "colocated":
            return self
        if place.learners != place.engines * wide:
            engines, rest = divmod(place.learners, wide)
            raise ValueError(
                f"placement.learners={place.learners} and placement.engines={place.engines}: with "
                f"placement.kind=colocated an engine lies on the devices of engine.tensor_parallel={wide} "
                f"learner{'s' * (wide > 1)}; set placement."
                + (f"learners={place.engines * wide}" if rest or not engines else f"engines={engines}")
            )
        if wide > 1 and place.gpus not in (None, 0, 1):
            raise ValueError(
                f"placement.gpus={place.gpus:g}: with placement.kind=colocated an engine of "
                f"engine.tensor_parallel={wide} needs learners with one GPU each; set it to 1, or leave it null"
            )
        return self

    @model_validator(mode="after")
    def _whole(self) -> "Run":
        learner, s = self.learner, self.sampling
        if s.prompts_per_step % learner.updates_per_step:
            raise ValueError(
                f"learner.updates_per_step={learner.updates_per_step} must divide "
                f"sampling.prompts_per_step={s.prompts_per_step}: whole groups go into an update"
            )
        if s.temperature == 0:
            raise ValueError("sampling.temperature=0 is greedy: every group would hold one answer many times")
        a = self.algorithm
        alone = a.advantage in ("group", "leave_one_out") or a.group_baseline or a.keep == "mixed"
        if alone and s.answers_per_prompt == 1:
            raise ValueError(
                "sampling.answers_per_prompt=1: algorithm.advantage, group_baseline or keep compares an answer to the "
                "others of its prompt, and alone it teaches nothing; ask for more, or use advantage=discounted or gae"
            )
        if s.min_answer_tokens > s.max_answer_tokens:
            raise ValueError("sampling.min_answer_tokens is above sampling.max_answer_tokens")
        if self.reward.overlong_buffer > s.max_answer_tokens:
            raise ValueError("reward.overlong_buffer is above sampling.max_answer_tokens")
        if self.warmup and not (self.model.new and self.data.train.startswith("tandem:")):
            raise ValueError(
                "warmup needs model.new and a task of the project's own (data.train=tandem:NAME)"
            )
        if self.placement.kind == "colocated" and s.max_lag:
            raise ValueError(
                f"sampling.max_lag={s.max_lag}: with placement.kind=colocated engines and learners take turns, so "
                "older answers save no time; set it to 0, or placement.kind=apart"
            )
        if s.in_flight and (self.placement.kind != "apart" or not s.max_lag):
            raise ValueError(
                f"sampling.in_flight=true with placement.kind={self.placement.kind} and sampling.max_lag={s.max_lag}: "
                "new weights can only reach answers in the making where training goes on beside them; it needs "
                "placement.kind=apart and sampling.max_lag of at least 1"
            )
        if self.learner.compile and self.placement.learners > 1:
            raise ValueError(
                f"learner.compile=true needs placement.learners=1, not {self.placement.learners}: the layers of a "
                "model that lies on several processes are not compiled; set it to false"
            )
        if learner.sleep and self.placement.kind != "colocated":
            raise ValueError(
                f"learner.sleep=true: with placement.kind={self.placement.kind} no engine of another process waits for "
                "the learner's memory; leave it false, or use colocated"
            )
        if self.placement.kind != "inline" and self.profile:
            raise ValueError("profile=true traces this process; it needs placement.kind=inline")
        names = [term.name for term in self.reward.terms]
        if self.eval.correct and self.eval.correct not in names:
            raise ValueError(
                f"eval.correct={self.eval.correct!r} is not one of reward.functions and reward.model: {names}"
            )
        if self.model.lora and self.reference.refresh_every:
            raise ValueError(
                "reference.refresh_every needs full weights: with model.lora the reference is the base"
            )
        return self
