"""The evaluation of a run, on any model: the same questions, draws and reward as during training."""

import json
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

import tandem
from tandem.checkpoint.extract import while_there
from tandem.config import Run, load, redact
from tandem.config.sections import Model
from tandem.engine import EmbeddedEngine
from tandem.errors import ConfigError, RunError
from tandem.journal import sample_answers
from tandem.model import LanguageModel
from tandem.placement.inline import reward_model_of, sampling_params
from tandem.rewards.scorer import Scorer
from tandem.rollout import Sampler
from tandem.talk.place import Place
from tandem.train.evaluation import Evaluation, evaluate, held_out_prompts, marked

USED = (
    "data",
    "device",
    "eval.answers",
    "eval.correct",
    "eval.questions",
    "eval.temperature",
    "journal.samples",
    "learner.attention",
    "learner.tokens_per_forward",
    "model",
    "reward",
    "sampling.max_answer_tokens",
    "sampling.min_answer_tokens",
    "sampling.slots",
    "sampling.stop",
    "sampling.stop_tokens",
    "seed",
    "threads",
)
"""Keys and sections of a run that an evaluation depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of an evaluation, and what it was made with."""

    evaluation: Evaluation
    settings: dict[str, Any]
    seconds: float

    def sentence(self) -> str:
        """Accuracy in one line, with what it was measured on."""
        figures, s = self.evaluation.figures, self.settings
        judged = f"{s['judged']:,} questions " if s["judged"] < s["questions"] else ""
        return (
            f"accuracy: sampled {figures['eval/accuracy']:.3f}, greedy {figures['eval/greedy_accuracy']:.3f} "
            f"({s['questions']:,} questions of {s['data']}, {s['answers']} answer{'s' * (s['answers'] > 1)} each "
            f"at temperature {s['temperature']:g}, {judged}judged by {s['correct']}); "
            f"reward {figures['eval/reward']:.3f}, {figures['eval/response_length']:.0f} tokens an answer, "
            f"{figures['eval/truncated_share']:.1%} cut; {self.seconds:.1f} s"
        )

    def table(self, count: int) -> Table:
        """The first greedy answers."""
        return sample_answers(self.evaluation.greedy, count=count)

    def write(self, path: Path) -> None:
        """Figures and settings as JSON; a figure is null where the scoring of every answer failed."""
        figures = {
            name: value if math.isfinite(value) else None for name, value in self.evaluation.figures.items()
        }
        record = {"figures": figures, "settings": self.settings, "seconds": self.seconds}
        try:
            path.write_text(json.dumps(redact(record), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"--json {path}: cannot be written ({error.strerror})") from None


def settings_of(place: Place, recipe: str | None, overrides: list[str]) -> Run:
    """The run whose evaluation is made: of the recipe, else of the run folder; its model is the one in `place`."""
    check_overrides(place, recipe, overrides)
    if recipe is not None:
        run = load(recipe, overrides)
    elif place.run is None:
        raise ConfigError(
            f"{place.given} is a model without a run: say what to ask it with --recipe RECIPE, whose data.eval, "
            "reward and eval sections are then used"
        )
    elif place.checkpoint is not None:
        with while_there(place.checkpoint):
            run = load(place.checkpoint / "config.yaml", overrides)
    else:
        run = load(Path(place.given).expanduser() / "config.yaml", overrides)
    check_used(overrides)
    if run.data.eval is None:
        raise ConfigError("data.eval is null: name held-out questions, for example data.eval=FILE")
    if place.folder is None:
        if recipe is None:
            return run
        assert place.run is not None
        return run.model_copy(update={"model": place.run.model, "warmup": None})
    model = Model(path=place.folder, dtype=run.model.dtype, trust_remote_code=run.model.trust_remote_code)
    return run.model_copy(update={"model": model, "warmup": None})


def check_overrides(place: Place, recipe: str | None, overrides: list[str]) -> None:
    """ConfigError for one that would change nothing: the model is the one that was named, the engine the embedded one
    of this process. A recipe that lacks a model may be given this one."""
    for text in overrides:
        key, _, value = (part.strip() for part in text.partition("="))
        section, _, name = key.partition(".")
        if section in ("engine", "placement"):
            raise ConfigError(f"{text}: eval samples in this process with the embedded engine; leave it out")
        if section != "model" or name in ("dtype", "trust_remote_code"):
            continue
        same = place.folder is not None and Path(value).expanduser().resolve() == Path(place.folder).resolve()
        if recipe is not None and name == "path" and same:
            continue
        settings = recipe or Path(place.given) / "config.yaml"
        raise ConfigError(
            f"{text}: eval measures the model that it is given, which is {place.given}; leave it out, or measure "
            f"another one: tandem eval MODEL --recipe {shlex.quote(str(settings))}"
        )


def check_used(overrides: list[str]) -> None:
    """ConfigError for one of a key that has nothing to do with an evaluation."""
    for text in overrides:
        key = text.partition("=")[0].strip()
        if not any(f"{key}.".startswith(f"{used}.") or used.startswith(f"{key}.") for used in USED):
            hint = "; eval.temperature is that of its answers" if key == "sampling.temperature" else ""
            raise ConfigError(f"{text}: no evaluation depends on {key}; leave it out{hint}")


def measure(run: Run, model: LanguageModel, given: str) -> Result:
    """Answer and score the held-out questions."""
    assert run.data.eval is not None
    began = time.monotonic()
    with Scorer(run.reward, run.sampling.max_answer_tokens) as scorer:
        prompts = held_out_prompts(run, model.tokenizer)
        longest = prompts.lengths.longest + run.sampling.max_answer_tokens
        if longest > model.max_positions:
            raise ConfigError(
                f"the longest question ({prompts.lengths.longest} tokens) and sampling.max_answer_tokens="
                f"{run.sampling.max_answer_tokens} make {longest}, above the model's {model.max_positions} "
                "positions; lower sampling.max_answer_tokens"
            )
        scorer.ready()
        engine = EmbeddedEngine(model, run.sampling.slots, run.learner.room())
        params = sampling_params(run, prompts.template, model.tokenizer)
        ends = model.stop_tokens | params.stop_tokens
        judge = reward_model_of(run, model)
        sampler = Sampler(engine, scorer, model.tokenizer, run, params, ends, judge)
        evaluation = evaluate(run, sampler, prompts.prompts)
    settings = {
        "model": given,
        "data": run.data.eval,
        "template": run.data.template,
        "questions": len(prompts.prompts),
        "judged": sum(marked(run, prompt) for prompt in prompts.prompts),
        "answers": run.eval.answers,
        "temperature": run.eval.temperature,
        "max_answer_tokens": run.sampling.max_answer_tokens,
        "correct": run.correct,
        "seed": run.seed,
        "dtype": run.model.dtype,
        "tandem": tandem.__version__,
    }
    return Result(evaluation=evaluation, settings=settings, seconds=round(time.monotonic() - began, 3))
