"""Whether the longest prompt and answer fit the models and the engine, told before anything slow begins."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from tandem.config.run import Run
from tandem.engine import SamplingParams
from tandem.engine.vllm import check_params, check_room
from tandem.engine.vllm_adapter import check_adapter
from tandem.errors import ConfigError
from tandem.model.language_model import longest_row
from tandem.model.value import REWARD_KEY
from tandem.train.beside import paths
from tandem.train.evaluation import eval_params
from tandem.train.finding import Line
from tandem.train.footprint import config_of, has_experts
from tandem.types import Prompt

SHORTER = "lower sampling.max_answer_tokens, or data.max_prompt_tokens with data.on_overlong=skip"

SAMPLE = 256
"""Prompts that are looked at one by one."""


def check_lengths(run: Run, params: SamplingParams, positions: int, trained: int, held_out: int) -> None:
    """ConfigError where the longest prompt of the data, or of the held-out questions, with the longest answer is more
    than a model or the engine can take; `positions` are the policy's."""
    answer, longest = run.sampling.max_answer_tokens, max(trained, held_out)
    if longest + answer > positions:
        raise ConfigError(
            f"the longest prompt ({longest} tokens) and sampling.max_answer_tokens={answer} make {longest + answer}, "
            f"above the model's {positions} positions; {SHORTER}"
        )
    for _, said in too_short(run, trained, held_out):
        raise ConfigError(said)
    check_engine(run, params, longest + answer, positions)


def too_short(run: Run, trained: int, held_out: int) -> Iterator[tuple[str, str]]:
    """What is to be said of each model beside the policy that has too few positions, with the key of its path. Only the
    reward model reads answers to held-out questions."""
    answer = run.sampling.max_answer_tokens
    for key, path in paths(run).items():
        prompt = max(trained, held_out) if key == REWARD_KEY else trained
        positions = longest_row(config_of(run.model, None, path, key))
        if prompt + answer > positions:
            yield (
                key,
                f"{key}={path} has {positions} positions, and the longest prompt ({prompt} tokens) and "
                f"sampling.max_answer_tokens={answer} make {prompt + answer}; {SHORTER}",
            )


def check_engine(run: Run, params: SamplingParams, longest: int, positions: int) -> None:
    """ConfigError where vLLM cannot sample as it is asked to; `longest` are the tokens of prompt and answer."""
    if run.engine.kind != "vllm":
        return
    check_params(params)
    if run.eval.every is not None and run.data.eval is not None:
        check_params(eval_params(run, params), "eval")
    check_room(longest, params, min(positions, run.engine.max_model_len or positions))
    # On a cluster that is joined an engine looks itself: its devices are not those of this machine.
    if run.model.lora is not None and run.placement.address is None:
        check_adapter(run.model.lora, str(run.model.path), has_experts(run.model))


def look_at_rows(run: Run, positions: int, trained: int, held_out: int) -> list[Line]:
    """Of the policy."""
    longest, answer = max(trained, held_out), run.sampling.max_answer_tokens
    total = longest + answer
    said = f"prompt {longest} + answer {answer} = {total} tokens of the model's {positions:,} positions"
    return [("problem", f"{said}; {SHORTER}") if total > positions else ("ok", said)]


def look_at_truths(run: Run, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[Line]:
    """The truth should fit the answer."""
    truths = [p.truth for p in prompts if p.truth]
    lengths = [len(tokenizer.encode(truth, add_special_tokens=False)) for truth in truths]
    over = sum(length > run.sampling.max_answer_tokens for length in lengths)
    if not over:
        return []
    return [("warning", f"{over} of {len(truths)} truths alone are longer than sampling.max_answer_tokens")]


def spread(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Some of them, from all over the data."""
    return prompts[:: max(1, len(prompts) // SAMPLE)][:SAMPLE]
