"""The layouts that a recipe names, held against its models before anything is loaded or started."""

from transformers import PreTrainedTokenizerFast

from tandem.config.run import Run
from tandem.model import describe
from tandem.model.load import REFERENCE_KEY
from tandem.model.parallel.fit import check_adapter, check_fit
from tandem.model.value import KEY, REWARD_KEY
from tandem.train.footprint import config_of
from tandem.train.plan.axes import ALONE, Axes


def check_layouts(run: Run, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """ConfigError where `learner.layout`, or that of a reference with weights of its own, of a critic or of a reward
    model, cannot be on the run's learners. On one process there is nothing to lay out. Only `model.new` needs the
    tokenizer."""
    learners = run.placement.learners
    if learners == 1:
        return
    check_fit(run.learner.layout, config_of(run.model, tokenizer), learners, "learner.layout")
    check_adapter(run.learner.layout, run.model.lora, "learner.layout")
    if holds_reference(run):
        config = config_of(run.model, tokenizer, run.reference.path, REFERENCE_KEY)
        check_fit(run.reference.layout, config, learners, "reference.layout")
    if run.needs_critic:
        config = config_of(run.model, tokenizer, run.critic.path, KEY)
        check_fit(run.critic.layout, config, learners, "critic.layout")
    if (judge := run.reward.model) is not None:
        config = describe(judge.path, run.model.trust_remote_code, REWARD_KEY).get_text_config()
        check_fit(judge.layout, config, learners, "reward.model.layout")


def layouts_of(run: Run) -> tuple[Axes, Axes]:
    """Of the learner and of the reference; ConfigError where one of them cannot be."""
    learners = run.placement.learners
    if learners == 1:
        return ALONE, ALONE
    return Axes.of(run.learner.layout, learners), Axes.of(run.reference.layout, learners)


def critic_axes(run: Run) -> Axes:
    """As `layouts_of`, of the critic."""
    learners = run.placement.learners
    return ALONE if learners == 1 else Axes.of(run.critic.layout, learners)


def holds_reference(run: Run) -> bool:
    """Whether the run has a reference with weights of its own, beside the policy's."""
    return run.needs_reference and (run.model.lora is None or run.reference.path is not None)
