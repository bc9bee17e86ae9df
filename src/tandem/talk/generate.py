"""Answers to a few prompts, all sampled together."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tandem.data.question import Message
from tandem.engine import EmbeddedEngine, Request, SamplingParams, decode
from tandem.engine.random import key
from tandem.errors import DataError
from tandem.talk.speaker import Speaker
from tandem.talk.text import escaped

logger = logging.getLogger("tandem.talk")

SLOTS = 64
"""Answers that decode at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer."""

    prompt: str
    sample: int
    """Its number among the answers to the prompt."""
    answer: str
    finish: str
    """stop | length"""
    tokens: int

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    def as_text(self, *, alone: bool) -> str:
        """For a terminal; with the prompt where there are other answers."""
        answer = escaped(self.answer)
        if alone:
            return answer
        cut = "" if self.finish == "stop" else ", cut"
        return f"--- {escaped(self.prompt)} ({self.sample + 1}{cut})\n{answer}"


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; empty lines are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path}: no prompts in it; write one per line")
    return prompts


def generate(
    speaker: Speaker, prompts: Sequence[str], params: SamplingParams, *, answers: int, seed: int
) -> Iterator[Reply]:
    """`answers` replies to each prompt, in order; the same seed gives the same ones."""
    rows = [speaker.prompt(dialog(speaker, prompt)) for prompt in prompts]
    wanted = params.max_tokens
    params = within_positions(speaker, prompts, rows, params)
    requests = [
        Request(tokens=tokens, key=key(seed, number, sample))
        for number, tokens in enumerate(rows)
        for sample in range(answers)
    ]
    done = EmbeddedEngine(speaker.model, SLOTS).generate(requests, params)
    if params.max_tokens < wanted and any(completion.finish == "length" for completion in done):
        positions = speaker.model.max_positions
        logger.warning(
            "cut after %d tokens: the model's %d positions hold no more", params.max_tokens, positions
        )
    for number, completion in enumerate(done):
        tokens = completion.tokens
        yield Reply(
            prompt=prompts[number // answers],
            sample=number % answers,
            answer=decode(speaker.model.tokenizer, tokens[:-1] if tokens[-1] in speaker.ends else tokens),
            finish=completion.finish,
            tokens=len(tokens),
        )


def dialog(speaker: Speaker, prompt: str) -> list[Message]:
    system = [{"role": "system", "content": speaker.system}] if speaker.system is not None else []
    return [*system, {"role": "user", "content": prompt}]


def within_positions(
    speaker: Speaker, prompts: Sequence[str], rows: Sequence[tuple[int, ...]], params: SamplingParams
) -> SamplingParams:
    """Answers as long as asked for, or as the model's positions leave room for beside the longest prompt."""
    positions = speaker.model.max_positions
    longest, prompt = max(zip(map(len, rows), prompts), key=lambda pair: pair[0])
    if not min(map(len, rows)):
        raise DataError("an empty prompt has no token to go on from; write something")
    if longest >= positions:
        raise DataError(
            f"the prompt {prompt[:40]!a}... has {longest:,} tokens, and the model has {positions:,} positions for "
            "prompt and answer; shorten it"
        )
    return replace(params, max_tokens=min(params.max_tokens, positions - longest))
