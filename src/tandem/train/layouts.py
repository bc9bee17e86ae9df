"""The layouts that a recipe names, held against its models before anything is loaded or started."""

from transformers import PreTrainedTokenizerFast

from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.errors import ConfigError
from tandem.model import describe
from tandem.model.load import REFERENCE_KEY
from tandem.model.parallel.fit import check_adapter, check_fit
from tandem.model.value import KEY, REWARD_KEY
from tandem.train.footprint import config_of
from tandem.train.plan.axes import ALONE, Axes

AXES = {"replicate", "shard", "tensor", "context", "expert", "pipeline"}
NEEDS_MORE = (
    "needs placement.learners above 1, since one learner holds its models whole and where they compute"
)


def check_layouts(run: Run, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """ConfigError where `learner.layout`, or that of a reference with weights of its own, of a critic or of a reward
    model, cannot be on the run's learners. Only `model.new` needs the tokenizer."""
    learners = run.placement.learners
    if learners == 1:
        return check_alone(run)
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


def check_alone(run: Run) -> None:
    """ConfigError where a run with one learner is given a layout: each model is whole then, where it computes."""
    learn = {"learner": run.learner.layout} | ({"critic": run.critic.layout} if run.needs_critic else {})
    read = {"reference": run.reference.layout} if holds_reference(run) else {}
    if run.reward.model is not None:
        read["reward.model"] = run.reward.model.layout
    for name, layout in (learn | read).items():
        if refusal := not_alone(name, layout):
            raise ConfigError(refusal)
        away = {
            "offload_parameters": layout.offload_parameters,
            "offload_gradients": layout.offload_gradients,
        }
        for key in (key for key, is_so in away.items() if is_so):
            remedy = f" and use {name}.optimizer.offload=true, which works with one" if name in learn else ""
            raise ConfigError(f"{name}.layout.{key}=true {NEEDS_MORE}; leave it out{remedy}")


def not_alone(name: str, layout: Layout) -> str | None:
    """Why the model of a role cannot be on one learner, as its layout says; None where it can."""
    for axis, size in layout.model_dump(include=AXES).items():
        if size not in (None, 1):
            return f"{name}.layout.{axis}={size} {NEEDS_MORE}; leave it out, or give the run more learners"
    return None


def layouts_of(run: Run) -> tuple[Axes, Axes]:
    """Of the learner and of the reference; ConfigError where one of them cannot be."""
    learners = run.placement.learners
    if learners == 1:
        check_alone(run)
        return ALONE, ALONE
    return Axes.of(run.learner.layout, learners), Axes.of(run.reference.layout, learners)


def critic_axes(run: Run) -> Axes:
    """As `layouts_of`, of the critic."""
    learners = run.placement.learners
    return ALONE if learners == 1 else Axes.of(run.critic.layout, learners)


def holds_reference(run: Run) -> bool:
    """Whether the run has a reference with weights of its own, beside the policy's."""
    return run.needs_reference and (run.model.lora is None or run.reference.path is not None)
