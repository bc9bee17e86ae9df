"""Bytes that a critic adds to a run, in memory and in a checkpoint."""

from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from tandem.config.run import Run
from tandem.model.load import DTYPES
from tandem.train import footprint
from tandem.train.footprint import FLOAT, Shape
from tandem.train.memory import Memory
from tandem.train.plan.axes import ALONE, Axes


def critic_shape(run: Run, policy: Shape, tokenizer: PreTrainedTokenizerFast | None) -> Shape:
    """The sizes of the run's critic: layers of a language model, all trained, with one output in place of the head."""
    plain = run.model.model_copy(update={"lora": None})
    shape = policy
    if run.critic.path is not None or run.model.lora is not None:
        shape = footprint.shape_of(plain, tokenizer, run.critic.path)
    return with_one_output(shape)


def with_one_output(shape: Shape) -> Shape:
    """The sizes of a language model with one output in place of the head; all of it is trained."""
    parameters = shape.parameters - (0 if shape.tied else shape.head) + shape.hidden
    return replace(
        shape,
        parameters=parameters,
        trainable=parameters,
        vocabulary=1,
        head=shape.hidden,
        tied=False,
    )


def with_critic(need: Memory, run: Run, critic: Shape, longest_prompt: int, axes: Axes = ALONE) -> Memory:
    """What the fullest process takes when a critic learns on it too."""
    config = run.critic
    own = footprint.learning(run, critic, config.layout, config.optimizer, longest_prompt, axes)
    return need.beside("critic", own)


def saved_bytes(run: Run, critic: Shape) -> int:
    """Of a critic in one checkpoint."""
    word = DTYPES[run.model.dtype].itemsize
    masters = FLOAT if word != FLOAT or run.critic.optimizer.offload else 0
    return critic.parameters * (word + 2 * FLOAT + masters)
