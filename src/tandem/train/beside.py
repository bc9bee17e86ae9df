"""The models that a run loads beside its policy, looked at before anything slow begins: no weight is read."""

from transformers import PreTrainedTokenizerBase

from tandem.config.run import Run
from tandem.errors import ConfigError
from tandem.model.load import REFERENCE_KEY, check_reference, vocab_size_of
from tandem.model.value import KEY, REWARD_KEY, check_value
from tandem.train.finding import Line


def paths(run: Run) -> dict[str, str]:
    """Their folders (or names on the hub), by key."""
    given = {
        REFERENCE_KEY: run.reference.path if run.needs_reference else None,
        KEY: run.critic.path if run.needs_critic else None,
        REWARD_KEY: run.reward.model.path if run.reward.model is not None else None,
    }
    return {key: path for key, path in given.items() if path is not None}


def check_models(run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """ConfigError for the first that cannot be what it is to be, beside the policy with this tokenizer."""
    for key, path in paths(run).items():
        check_model(run, tokenizer, key, path)


def check_model(run: Run, tokenizer: PreTrainedTokenizerBase, key: str, path: str) -> None:
    trust = run.model.trust_remote_code
    if key == REFERENCE_KEY:
        check_reference(path, tokenizer, vocab_size_of(run.model, tokenizer), trust)
    else:
        check_value(path, tokenizer, trust, key)


def look_at_others(run: Run, tokenizer: PreTrainedTokenizerBase) -> list[Line]:
    """A line for the reference and the critic, where they are given; the reward model is looked at with the reward."""
    lines: list[Line] = []
    for key, path in paths(run).items():
        if key == REWARD_KEY:
            continue
        try:
            check_model(run, tokenizer, key, path)
        except ConfigError as cause:
            lines.append(("problem", str(cause)))
        else:
            lines.append(
                ("ok", f"{key}={path}: fits the policy by its config and tokenizer; no weight was loaded")
            )
    return lines
