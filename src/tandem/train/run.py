"""From a configuration to a trained model: set up, warm up, reinforce, export, report."""

import time
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from tandem.checkpoint import export, lock, newest
from tandem.config import difference, dump, load
from tandem.config.run import Run
from tandem.data import tasks
from tandem.data.prompts import PromptSet, load_prompts
from tandem.device import describe, pick, set_threads, synchronize
from tandem.errors import ConfigError, RunError, SamplingError
from tandem.journal import Journal, Summary, Timer, draw, read_metrics, sample_answers, visible
from tandem.learner import Actor, Reference
from tandem.model import LanguageModel, tokenizer_of
from tandem.model import describe as describe_model
from tandem.model import load as load_model
from tandem.model.language_model import longest_row
from tandem.placement import inline
from tandem.placement.cluster.build import build
from tandem.placement.cluster.reach import check_reachable
from tandem.placement.inline import sampling_params
from tandem.rewards.scorer import Scorer
from tandem.train import snapshot
from tandem.train.beside import check_models
from tandem.train.evaluation import held_out_prompts
from tandem.train.interrupt import Interrupted, Interruption
from tandem.train.layouts import check_layouts
from tandem.train.lengths import check_lengths
from tandem.train.reinforce import reinforce
from tandem.train.run_folder import CHECKPOINTS, EXPORTED, check_folder, set_aside, steps_done
from tandem.train.session import Session
from tandem.train.supervised import demonstrations, supervise, warmup_optimizer
from tandem.types import Prompt

ROLES = {"inline": inline.build, "colocated": build, "apart": build}
"""Who makes the roles, by `placement.kind`."""


@dataclass(slots=True, kw_only=True)
class Launch:
    """How a run is started; none of it changes what is learned."""

    recipe: str
    """The file the run was loaded from, for messages."""
    fresh: bool = False
    """Set an earlier run in the folder aside instead of going on from its last checkpoint."""
    allow_config_change: bool = False
    """Resume although the configuration differs from that of the checkpoint."""
    console: Console = field(default_factory=Console)


def train(run: Run, launch: Launch) -> Summary:
    """The whole run; returns its summary. A signal saves a checkpoint and then raises `Interrupted`, as does what keeps
    answers from being sampled or scored with `SamplingError`."""
    folder = Path(run.run_dir)
    with ExitStack() as stack:
        check_folder(run, launch.fresh)
        stack.enter_context(lock(folder))
        interruption = stack.enter_context(Interruption())
        began = time.monotonic()
        session = prepare(run, launch, stack, interruption)
        try:
            reinforce(run, session.roles, session, session.timer, session.boundary.step)
        except Interrupted as signal:
            session.save()
            launch.console.print(
                f"stopped by {signal}; go on with: tandem train {launch.recipe}",
                highlight=False,
                markup=False,
            )
            raise
        except SamplingError:
            session.save()
            raise
        try:
            session.save()
        except RunError:
            # The model needs less room on the disk than all that a checkpoint has; if it has none either, the
            # checkpoint's error is the one to read.
            with suppress(RunError, OSError):
                finish(run, launch, session, time.monotonic() - began)
            raise
        return finish(run, launch, session, time.monotonic() - began)


def prepare(run: Run, launch: Launch, stack: ExitStack, interruption: Interruption) -> Session:
    """Everything that can be wrong is found here, the cheap before the slow; then the policy is warmed up."""
    folder, console = Path(run.run_dir), launch.console
    resume = None if launch.fresh else newest(folder / CHECKPOINTS)
    step = 0
    if resume is not None:
        check_same(run, resume, launch)
        step = steps_done(run, resume)
    reference = snapshot.reference_in(resume, run)
    if run.placement.address is not None:
        check_reachable(run.placement.address)
    console.print(run.arithmetic(), highlight=False, markup=False)
    # Elsewhere the accelerators belong to the workers.
    device = pick(run.device if run.placement.kind == "inline" else "cpu")
    set_threads(run.threads)
    torch.manual_seed(run.seed)
    scorer = stack.enter_context(Scorer(run.reward, run.sampling.max_answer_tokens))
    if run.model.path is not None:
        describe_model(run.model.path, run.model.trust_remote_code)
    tokenizer = tokenizer_of(run.model)
    check_models(run, tokenizer)
    check_layouts(run, tokenizer)
    prompts = load_prompts(
        run.data, run.data.train, tokenizer, limit=run.data.limit, reward_column=run.reward.column
    )
    console.print("".join(map(visible, prompts.sentence())), highlight=False, markup=False)
    held_out = held_out_questions(run, tokenizer)
    params = sampling_params(run, prompts.template, tokenizer)
    longest_held_out = max((len(prompt.tokens) for prompt in held_out), default=0)
    check_lengths(run, params, max_positions(run), prompts.lengths.longest, longest_held_out)
    scorer.ready()
    if launch.fresh or (resume is None and (folder / EXPORTED).is_dir()):
        set_aside(folder, console)
    journal = stack.enter_context(Journal(run, folder, console))
    model = None
    if run.placement.kind == "inline" or (resume is None and run.warmup is not None):
        model = load_model(run.model, tokenizer, device, seed=run.seed)
    warmed = 0.0
    if resume is None:
        begin(run, journal, step, resumes=False)
        if run.warmup is not None:
            assert model is not None
            warmed = warm_up(run, model, prompts, journal, interruption)
    roles = stack.enter_context(closing(ROLES[run.placement.kind](run, model, prompts, scorer, reference)))
    if resume is not None:
        snapshot.restore(resume, roles, prompts.fingerprint, scorer)
        begin(run, journal, step, resumes=True)
        console.print(
            f"going on from {resume}, {step} of {run.steps} steps done", highlight=False, markup=False
        )
    timer = Timer(lambda: synchronize(device))
    return Session(run, roles, prompts, scorer, held_out, journal, timer, interruption, step, warmed)


def begin(run: Run, journal: Journal, step: int, resumes: bool) -> None:
    """From here on the run's folder is that of this configuration, and what was recorded after the step is gone."""
    folder = Path(run.run_dir)
    (folder / "config.yaml").write_text(dump(run), encoding="utf-8")
    journal.rewind(step - 1, keep_warmup=resumes)
    (folder / "metrics.jsonl").touch()


def held_out_questions(run: Run, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    if run.eval.every is None or run.data.eval is None:
        return []
    return list(held_out_prompts(run, tokenizer).prompts)


def max_positions(run: Run) -> int:
    """Of the policy, from its description."""
    if run.model.new is not None:
        return run.model.new.max_positions
    assert run.model.path is not None
    return longest_row(describe_model(run.model.path, run.model.trust_remote_code))


def check_same(run: Run, checkpoint: Path, launch: Launch) -> None:
    """A run goes on with the configuration it began with, but for keys that change nothing learned."""
    changed = difference(load(checkpoint / "config.yaml"), run)
    if changed and not launch.allow_config_change:
        raise ConfigError(
            f"{checkpoint} was made with another configuration:\n  "
            + "\n  ".join(changed)
            + "\nrestore these, start anew with --fresh, or go on all the same with --allow-config-change"
        )


def warm_up(
    run: Run, model: LanguageModel, prompts: PromptSet, journal: Journal, interruption: Interruption
) -> float:
    """Supervised training on the task's own demonstrations; returns its seconds."""
    assert run.warmup is not None
    began = time.monotonic()
    warmup = run.warmup
    name = run.data.train.removeprefix("tandem:").partition(":")[0]
    batches = demonstrations(
        tasks.find(name),
        prompts.prompts,
        model.tokenizer,
        batch=warmup.batch,
        wrong_share=warmup.wrong_share,
        seed=run.seed,
    )

    def on_step(step: int, metrics: dict[str, float]) -> None:
        interruption.check()
        if (step + 1) % 20 == 0 or step + 1 == warmup.steps:
            journal.log(0, metrics | {"warmup/update": step + 1})

    supervise(
        model,
        batches,
        warmup_optimizer(warmup),
        warmup.steps,
        learner=run.learner,
        on_step=on_step,
    )
    return time.monotonic() - began


def finish(run: Run, launch: Launch, session: Session, seconds: float) -> Summary:
    """Export the model, draw the curve, write the summary, and say where everything is."""
    folder, console = Path(run.run_dir), launch.console
    session.journal.close()
    roles = session.roles
    export(lambda place: roles.on_learners(save_merged, place), folder / EXPORTED)
    metrics = read_metrics(folder / "metrics.jsonl")
    evaluated = [row for row in metrics if row.get("eval/accuracy") is not None]
    summary = Summary(
        recipe=launch.recipe,
        steps=run.steps,
        began=session.start,
        seconds=seconds,
        warmup_seconds=session.warmup_seconds,
        start=eval_figures(evaluated[0]) if evaluated else {},
        end=eval_figures(evaluated[-1]) if evaluated else {},
    )
    if evaluated or any(row.get("reward/mean") is not None for row in metrics):
        draw(folder / "metrics.jsonl", folder / "curve.png")
    summary.write(folder / "summary.json", run, roles.on_learners(device_name))
    if session.last and run.journal.samples:
        before = session.first.greedy if session.first else ()
        console.print(sample_answers(session.last.greedy, before, count=run.journal.samples))
    console.print(summary.closing(run, folder), highlight=False, markup=False)
    return summary


def save_merged(actor: Actor, reference: Reference | None, folder: Path) -> None:
    actor.model.save_merged(folder)


def device_name(actor: Actor, reference: Reference | None) -> str:
    return describe(actor.model.device)


def eval_figures(row: dict[str, float | None]) -> dict[str, float]:
    """Those that there are: one is missing where the scoring of every answer failed."""
    return {name: value for name, value in row.items() if name.startswith("eval/") and value is not None}
