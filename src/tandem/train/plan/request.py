"""What the command is asked for, and its answer."""

from tandem.config.run import Run
from tandem.errors import ConfigError
from tandem.train import footprint
from tandem.train.plan.device import assumed, find
from tandem.train.plan.measure import measured
from tandem.train.plan.plan import plan
from tandem.train.plan.report import text
from tandem.train.plan.together import measured_together, processes_here
from tandem.train.plan.work import Lengths


def planned(
    run: Run, *, device: str, count: int, per_node: int, prompt: int | None, answer: int | None, top: int
) -> str:
    """The plan of a run as text. `prompt` and `answer` are mean tokens; without them, the recipe's limits."""
    lengths = lengths_of(run, prompt, answer)
    here = device == "cpu"
    per_node = min(per_node, count)
    if not here:
        rates = assumed(find(device), run.model.dtype)
    elif count == 1:
        rates = measured(run, lengths, run.threads)
    elif (per_node := min(per_node, processes_here(run, count))) == 1:
        rates = measured(run, lengths, run.placement.cpus)
    else:
        rates = measured_together(run, lengths, per_node)
    made = plan(
        run,
        rates,
        count=count,
        per_node=per_node,
        lengths=lengths,
        top=top,
        offload=not here,
    )
    return text(made)


def lengths_of(run: Run, prompt: int | None, answer: int | None) -> Lengths:
    """ConfigError where a mean is above the recipe's limit, or both limits together above the model's."""
    longest_prompt, longest_answer = run.data.max_prompt_tokens, run.sampling.max_answer_tokens
    longest, positions = longest_prompt + longest_answer, footprint.shape_of(run.model, None).positions
    if longest > positions:
        raise ConfigError(
            f"prompt {longest_prompt} + answer {longest_answer} = {longest} tokens are more than the model's "
            f"{positions:,} positions; lower data.max_prompt_tokens or sampling.max_answer_tokens"
        )
    for option, mean, key, longest in (
        ("--prompt", prompt, "data.max_prompt_tokens", longest_prompt),
        ("--answer", answer, "sampling.max_answer_tokens", longest_answer),
    ):
        if mean is not None and mean > longest:
            raise ConfigError(f"{option} {mean} is above {key}={longest}; raise the key or lower the mean")
    return Lengths(
        prompt=float(prompt or longest_prompt),
        answer=float(answer or longest_answer),
        longest_prompt=longest_prompt,
        longest_answer=longest_answer,
    )
