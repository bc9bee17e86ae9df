"""What can be told of a run's reward model before it is loaded: whether it can be one, and its bytes."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tandem.config.run import Run
from tandem.model import describe
from tandem.model.language_model import longest_row
from tandem.model.value import REWARD_KEY, check_value
from tandem.train.critic_bytes import with_one_output
from tandem.train.finding import Line
from tandem.train.footprint import Shape, frozen, shape_of
from tandem.train.memory import Memory
from tandem.train.plan.axes import ALONE, Axes
from tandem.types import Prompt


def look_at_reward_model(run: Run, tokenizer: PreTrainedTokenizerBase, longest_prompt: int) -> list[Line]:
    """ConfigError where it cannot be loaded; its weights are not read."""
    config = run.reward.model
    if config is None:
        return []
    trust = run.model.trust_remote_code
    source = check_value(config.path, tokenizer, trust, REWARD_KEY)
    longest = longest_prompt + run.sampling.max_answer_tokens
    positions = longest_row(describe(source, trust, REWARD_KEY).get_text_config())
    said = f"{config.name}: {source}, {positions:,} positions"
    if longest > positions:
        return [("problem", f"{said}, fewer than the {longest:,} tokens of the longest prompt and answer")]
    head = "its head is there" if Path(source).is_dir() else "whether it has a head shows when it is loaded"
    return [("ok", f"{said}, {head}; no answer was scored with it")]


def look_at_column(run: Run, prompts: Sequence[Prompt]) -> list[Line]:
    """How many questions the functions and the model score, where the data says which of them."""
    column = run.reward.column
    if column is None:
        return []
    rule = sum(prompt.scored_by == "rule" for prompt in prompts)
    said = (
        f"reward.column={column}: {rule:,} questions for the functions, {len(prompts) - rule:,} for the model"
    )
    if 0 < rule < len(prompts):
        return [("ok", said)]
    return [("warning", f"{said}; one of the two has nothing to score and may be left out")]


def reward_model_axes(run: Run) -> Axes:
    """How it lies on the run's learners; ConfigError where it cannot."""
    learners = run.placement.learners
    if run.reward.model is None or learners == 1:
        return ALONE
    return Axes.of(run.reward.model.layout, learners)


def reward_model_shape(run: Run, path: str) -> Shape:
    """The sizes of the run's reward model."""
    describe(path, run.model.trust_remote_code, REWARD_KEY)
    return with_one_output(shape_of(run.model.model_copy(update={"lora": None}), None, path))


def with_reward_model(need: Memory, run: Run, axes: Axes) -> Memory:
    """What the fullest process takes when the run's reward model, if it has one, lies on it too."""
    config = run.reward.model
    if config is None:
        return need
    return need.beside("reward model", frozen(run, reward_model_shape(run, config.path), config.layout, axes))
