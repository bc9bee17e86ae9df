"""The check before a long start: everything that can be wrong is looked at in seconds, and all of it is told."""

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tandem.checkpoint import newest, read_json, read_tensors, save, write_tensors
from tandem.checkpoint.disk import free_bytes as free_on_disk
from tandem.config.run import Run
from tandem.data.prompts import PromptSet, load_prompts
from tandem.data.round_trip import check_round_trip
from tandem.device import captures, describe, free_bytes, free_host_bytes, pick, set_threads
from tandem.errors import ConfigError, DataError, RunError
from tandem.journal import visible
from tandem.journal.sinks import check_sinks
from tandem.model import tokenizer_of
from tandem.model.load import existing
from tandem.model.value import REWARD_KEY
from tandem.placement.inline import sampling_params
from tandem.rewards.scorer import Scorer
from tandem.train import footprint, trial
from tandem.train.beside import look_at_others
from tandem.train.critic_bytes import critic_shape, saved_bytes, with_critic
from tandem.train.evaluation import held_out_prompts
from tandem.train.finding import Finding, Line
from tandem.train.folder_bytes import folder_bytes
from tandem.train.footprint import Shape
from tandem.train.kept_bytes import with_kept
from tandem.train.layouts import check_layouts, critic_axes, holds_reference, layouts_of
from tandem.train.lengths import check_engine, look_at_rows, look_at_truths, spread, too_short
from tandem.train.memory import Memory, readable, several
from tandem.train.reward_model import (
    look_at_column,
    look_at_reward_model,
    reward_model_axes,
    with_reward_model,
)
from tandem.train.run_folder import look_at_folder

SHOWN = 3
"""Problems of one kind that are written out."""
TIGHT = 0.8
"""Share of the free memory or disk above which a warning is due: estimates are not exact."""


class NotChecked(Exception):
    """A look that needs what another one failed to find."""


@dataclass(slots=True, kw_only=True)
class Bench:
    """The run, and what the looks so far have found in it."""

    run: Run
    device: torch.device | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    shape: Shape | None = None
    train: PromptSet | None = None
    held_out: PromptSet | None = None
    others: bool = False
    """Reference and critic, where they are given, can be loaded."""

    def longest_prompt(self) -> int:
        """Of the questions that were read, else what data.max_prompt_tokens allows."""
        sets = [prompts for prompts in (self.train, self.held_out) if prompts is not None]
        return max((p.lengths.longest for p in sets), default=self.run.data.max_prompt_tokens)


def check(run: Run) -> Iterator[Finding]:
    """Every finding, as soon as it is there; none of them ends the check."""
    bench = Bench(run=run)
    for name, look in LOOKS.items():
        began = time.monotonic()
        try:
            lines = look(bench)
        except NotChecked as cause:
            lines = [("warning", f"not checked: {cause} has a problem")]
        except (ConfigError, DataError, RunError) as cause:
            lines = [("problem", str(cause))]
        except OSError as cause:
            lines = [("problem", f"{cause.filename or ''}: {cause.strerror or cause}".lstrip(": "))]
        seconds = time.monotonic() - began
        for status, text in lines:
            yield Finding(status=status, name=name, text=text, seconds=seconds)


def look_at_device(bench: Bench) -> list[Line]:
    bench.device = pick(bench.run.device)
    set_threads(bench.run.threads)
    return [("ok", describe(bench.device))]


def look_at_model(bench: Bench) -> list[Line]:
    """Sizes from the config, tokenizer from its files; of the weights only that they are there."""
    model = bench.run.model
    bench.tokenizer = tokenizer_of(model)
    bench.shape = shape = footprint.shape_of(model, bench.tokenizer)
    lines: list[Line] = []
    if model.path is not None and (folder := Path(existing(model.path))).is_dir():
        lines = missing_weights(folder)
    trained = "" if shape.trainable == shape.parameters else f", {shape.trainable:,} of them trained"
    sizes = f"{shape.parameters:,} parameters{trained}, {shape.positions:,} positions"
    others = look_at_others(bench.run, bench.tokenizer)
    bench.others = all(status == "ok" for status, _ in others)
    return [("ok", f"{model.path or 'model.new'}: {sizes}"), *lines, *others]


def missing_weights(folder: Path) -> list[Line]:
    """Weight files that the folder or its index promises and that are not there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(read_json(index).get("weight_map", {}).values())
        absent = sorted(name for name in named if not (folder / name).is_file())
    else:
        absent = [] if any(folder.glob("*.safetensors")) else ["model.safetensors"]
    if not absent:
        return []
    more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
    return [("problem", f"{folder} lacks {', '.join(absent[:SHOWN])}{more}; download the folder again")]


def look_at_layout(bench: Bench) -> list[Line]:
    """Whether the layouts fit the models, by their sizes: no learner is started and no weight is read for it."""
    run, learners = bench.run, bench.run.placement.learners
    check_layouts(run, tokenizer_of_all(bench))
    if learners == 1:
        return [("ok", "one learner, which holds the model whole")]
    ours, other = layouts_of(run)
    said = f"learner.layout on {learners} learners: {ours}"
    if holds_reference(run):
        said += f"; reference.layout: {other}"
    if run.needs_critic:
        said += f"; critic.layout: {critic_axes(run)}"
    if run.reward.model is not None:
        said += f"; reward.model.layout: {reward_model_axes(run)}"
    return [("ok", f"{said}; they fit the model by its config, no learner was started and no weight loaded")]


def look_at_train_data(bench: Bench) -> list[Line]:
    data, column = bench.run.data, bench.run.reward.column
    bench.train = load_prompts(data, data.train, tokenizer(bench), limit=data.limit, reward_column=column)
    wanted, there = bench.run.sampling.prompts_per_step, len(bench.train.prompts)
    lines: list[Line] = [("ok", bench.train.sentence())]
    if there < wanted:
        lines.append(
            ("warning", f"one step takes {wanted} prompts, more than there are: each epoch repeats them")
        )
    return lines


def look_at_eval_data(bench: Bench) -> list[Line]:
    run = bench.run
    if run.data.eval is None or run.eval.every is None:
        key = "data.eval" if run.data.eval is None else "eval.every"
        return [("warning", f"{key} is null: nothing is held out, so nothing shows what was really learned")]
    bench.held_out = held_out_prompts(run, tokenizer(bench))
    lines: list[Line] = [("ok", bench.held_out.sentence())]
    if bench.train is not None:
        known = {prompt.text for prompt in bench.train.prompts}
        shared = sum(prompt.text in known for prompt in bench.held_out.prompts)
        if shared:
            lines.append(("warning", f"{shared:,} of these questions are also in data.train"))
    return lines


def look_at_template(bench: Bench) -> list[Line]:
    """Do a few hundred prompts say in tokens what they say as text?"""
    sets = [p for p in (train_data(bench), bench.held_out) if p is not None]
    prompts = [prompt for p in sets for prompt in spread(p.prompts)]
    problems = check_round_trip(prompts, tokenizer(bench))
    lines: list[Line] = [("problem", visible(text)) for text in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(("problem", f"and {len(problems) - SHOWN:,} more prompts with such a problem"))
    first = ascii(prompts[0].text)
    shown = first if len(first) <= 160 else f"{first[:100]} ... {first[-55:]}"
    return lines or [("ok", f"{len(prompts)} prompts decode to their text; the first is {shown}")]


def look_at_reward(bench: Bench) -> list[Line]:
    """The functions are tried. Failures are masked here whatever the run does with them, so that they can be
    counted."""
    run, prompts = bench.run, train_data(bench).prompts
    lines = look_at_reward_model(run, tokenizer(bench), bench.longest_prompt())
    lines += look_at_column(run, prompts)
    prompts = [prompt for prompt in prompts if prompt.scored_by != "model"]
    if not run.reward.functions or not prompts:
        return lines
    counted = run.reward.model_copy(update={"on_failure": "mask", "model": None})
    with Scorer(counted, run.sampling.max_answer_tokens) as scorer:
        scorer.ready()
        return lines + trial.verdict(run, trial.try_rewards(run, scorer, prompts, tokenizer(bench)))


def look_at_lengths(bench: Bench) -> list[Line]:
    """Prompt and answer must fit the models, and the truth should fit the answer."""
    run, trained = bench.run, train_data(bench).lengths.longest
    held_out = bench.held_out.lengths.longest if bench.held_out is not None else 0
    lines = look_at_rows(run, shape(bench).positions, trained, held_out)
    if bench.others:
        # That of the reward model is told with the reward.
        short = too_short(run, trained, held_out)
        lines += [("problem", said) for key, said in short if key != REWARD_KEY]
    return lines + look_at_truths(run, spread(train_data(bench).prompts), tokenizer(bench))


def look_at_engine(bench: Bench) -> list[Line]:
    """Whether it can sample as it is asked to; it is not started."""
    run = bench.run
    params = sampling_params(run, train_data(bench).template, tokenizer(bench))
    longest = bench.longest_prompt() + run.sampling.max_answer_tokens
    check_engine(run, params, longest, shape(bench).positions)
    return [("ok", f"{run.engine.kind}, which was not started; it can sample as asked")]


def look_at_memory(bench: Bench) -> list[Line]:
    run, device = bench.run, bench.device
    if device is None:
        raise NotChecked("device")
    reference = reference_shape(bench)
    try:
        axes, critics, judges = layouts_of(run), critic_axes(run), reward_model_axes(run)
    except ConfigError:
        raise NotChecked("layout") from None
    need = footprint.memory(run, shape(bench), bench.longest_prompt(), reference, *axes)
    on_device, on_host = free_bytes(device), free_host_bytes()
    if run.needs_critic:
        critic = critic_shape(run, shape(bench), tokenizer_of_all(bench))
        need = with_critic(need, run, critic, bench.longest_prompt(), critics)
    need = with_kept(with_reward_model(need, run, judges), run, shape(bench), bench.longest_prompt())
    if captures(device) and run.placement.kind == "inline" and run.engine.kind == "embedded":
        need = need.keeping("KV cache")  # Its captured steps write into it.
    free = on_host if on_device is None else on_device
    offloaded = sum(need.host.values())
    if on_device is None:
        peak, whose = on_one_host(run, need)
    else:
        peak = max(need.learner, need.engine) if run.placement.kind == "apart" else need.peak
        whose = ""
    said = f"about {readable(peak)} of {readable(free)} free ({whose}{need.sentence()})"
    lines = [fits(said, peak, free, SMALLER)]
    if offloaded and on_device is not None:
        said = f"about {readable(offloaded)} of {readable(on_host)} free on the host"
        lines.append(fits(said, offloaded, on_host, "unset learner.optimizer.offload"))
    return lines


def on_one_host(run: Run, need: Memory) -> tuple[int, str]:
    """Bytes of all processes, where they compute in the memory of one machine, and whose they are."""
    away, place = sum(need.host.values()), run.placement
    if place.kind == "inline":
        return need.peak + away, ""
    if place.kind == "colocated":
        pairs = place.learners * (need.peak + away)
        beside = "an engine" if run.engine.tensor_parallel == 1 else "its share of an engine"
        whose = (
            f"{several(place.learners, 'pair')} of a learner and {beside}, as if on one machine; of each: "
        )
        return pairs, whose
    apart = place.learners * (need.learner + away) + place.engines * need.engine
    learners = f"{several(place.learners, 'learner')} of {readable(need.learner + away)}"
    engines = f"{several(place.engines, 'engine')} of {readable(need.engine)}"
    return apart, f"{learners}, {engines}, as if on one machine; largest parts of each: "


SMALLER = (
    "lower sampling.slots, learner.tokens_per_forward, learner.logits_mb or learner.keep_mb, set "
    "learner.checkpointing or learner.optimizer.offload, or train an adapter (model.lora)"
)


def look_at_disk(bench: Bench) -> list[Line]:
    folder = Path(bench.run.run_dir)
    run, critic = bench.run, 0
    if run.needs_critic:
        critic = saved_bytes(run, critic_shape(run, shape(bench), tokenizer_of_all(bench)))
    parts = folder_bytes(run, shape(bench), bench.longest_prompt(), critic)
    total = sum(parts.values())
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    free = free_on_disk(folder.absolute()) + there
    said = ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)
    remedy = "free some space, lower checkpoint.keep, or set run_dir to a folder on another disk"
    return [
        fits(f"at most {readable(total)} of {readable(free)} free at {folder} ({said})", total, free, remedy)
    ]


def fits(said: str, need: int, free: int, remedy: str) -> Line:
    if need > free:
        return "problem", f"{said}: too much; {remedy}"
    return ("warning", f"{said}: tight") if need > TIGHT * free else ("ok", said)


def look_at_saving(bench: Bench) -> list[Line]:
    """A real checkpoint of one small tensor, where the run's own will be, read back and removed."""
    folder = Path(bench.run.run_dir).absolute()
    place = folder
    while not place.exists():
        place = place.parent
    tensors = {"probe": torch.arange(1024, dtype=torch.float32)}
    scratch = Path(tempfile.mkdtemp(prefix=".tandem-check-", dir=place))
    try:
        save(
            scratch, 0, lambda tmp: write_tensors(tmp / "probe.safetensors", tensors), config_hash="", keep=1
        )
        saved = newest(scratch, strict=True)
        again = read_tensors(saved / "probe.safetensors") if saved is not None else {}
    finally:
        shutil.rmtree(scratch)
    if not again or not torch.equal(again["probe"], tensors["probe"]):
        return [("problem", f"a tensor written to {place} read back different: check the disk")]
    return [("ok", f"a checkpoint was written to {place}, read back equal, and removed")]


def look_at_sinks(bench: Bench) -> list[Line]:
    sinks = bench.run.journal.sinks
    check_sinks(bench.run)
    if "tensorboard" in sinks and importlib.util.find_spec("tensorboard") is None:
        return [("problem", "journal.sinks: tensorboard is not installed; `pip install tensorboard`")]
    return [("ok", ", ".join(dict.fromkeys([*sinks, "jsonl"])))]


def look_at_run_folder(bench: Bench) -> list[Line]:
    return look_at_folder(bench.run)


def tokenizer(bench: Bench) -> PreTrainedTokenizerBase:
    if bench.tokenizer is None:
        raise NotChecked("model")
    return bench.tokenizer


def tokenizer_of_all(bench: Bench) -> PreTrainedTokenizerBase:
    """Of the policy, and of reference and critic, which can be loaded."""
    if not bench.others:
        raise NotChecked("model")
    return tokenizer(bench)


def shape(bench: Bench) -> Shape:
    if bench.shape is None:
        raise NotChecked("model")
    return bench.shape


def train_data(bench: Bench) -> PromptSet:
    if bench.train is None:
        raise NotChecked("data.train")
    return bench.train


def reference_shape(bench: Bench) -> Shape | None:
    """The reference model that the run holds beside the policy."""
    run = bench.run
    if not holds_reference(run):
        return None
    if run.reference.path is None:
        return shape(bench)
    return footprint.shape_of(run.model, tokenizer_of_all(bench), run.reference.path)


LOOKS: dict[str, Callable[[Bench], list[Line]]] = {
    "device": look_at_device,
    "model": look_at_model,
    "layout": look_at_layout,
    "data.train": look_at_train_data,
    "data.eval": look_at_eval_data,
    "template": look_at_template,
    "reward": look_at_reward,
    "lengths": look_at_lengths,
    "engine": look_at_engine,
    "memory": look_at_memory,
    "disk": look_at_disk,
    "save": look_at_saving,
    "sinks": look_at_sinks,
    "run folder": look_at_run_folder,
}
