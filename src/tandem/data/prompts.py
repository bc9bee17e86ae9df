"""Prompts: every question of a source inside its template, tokenized, counted and within the length limit."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from tandem.config.sections import Data
from tandem.data.question import Question, read_question
from tandem.data.reader import BadRow, Record
from tandem.data.source import read_rows
from tandem.data.template import Renderer, open_template
from tandem.errors import DataError
from tandem.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CHARACTERS_PER_TOKEN = 256
"""More than any known vocabulary's longest token: beyond this rate a text is overlong without being tokenized
whole, which takes a second or more for every megabyte."""


class Lengths(NamedTuple):
    shortest: int
    mean: float
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    source: str
    prompts: tuple[Prompt, ...]
    template: Renderer
    read: int
    """Rows of the source that were looked at."""
    bad_rows: tuple[str, ...]
    """Place and problem of each row that was left out under data.on_bad_row=skip."""
    overlong: int
    """Prompts above data.max_prompt_tokens, which were left out or cut."""
    truncated: bool
    """Overlong prompts were cut and kept."""
    fingerprint: str
    """SHA-256 over the questions and truths in order: equal exactly when a cursor's place means the same."""

    @property
    def bad(self) -> int:
        return len(self.bad_rows)

    @property
    def lengths(self) -> Lengths:
        counts = [len(prompt.tokens) for prompt in self.prompts]
        return Lengths(min(counts), fmean(counts), max(counts))

    def sentence(self) -> str:
        shortest, mean, longest = self.lengths
        parts = [
            f"{len(self.prompts):,} prompts from {self.source} ({self.read:,} rows read), "
            f"{shortest:,} to {longest:,} tokens, mean {mean:,.1f}"
        ]
        if self.overlong:
            parts.append(f"{self.overlong:,} overlong {'cut to their end' if self.truncated else 'left out'}")
        if self.bad:
            parts.append(f"{self.bad:,} bad left out, the first: {self.bad_rows[0]}")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A row that became a text, before its length is known."""

    id: int
    place: str
    row: Mapping[str, Any]
    question: Question
    text: str


def load_prompts(
    data: Data,
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    limit: int | None = None,
    reward_column: str | None = None,
) -> PromptSet:
    """All prompts of `source` (data.train or data.eval), or of its first `limit` rows. `reward_column` says who scores
    the answers to a row (`reward.column`)."""
    template = open_template(data.template, tokenizer)
    drafts: list[Draft] = []
    bad: list[str] = []
    for index, record in enumerate(islice(read_rows(source), limit)):
        try:
            drafts.append(draft(index, record, data, template, reward_column))
        except DataError as cause:
            bad.append(f"{record.place}: {cause}")
            if data.on_bad_row == "error":
                remedy = "mend the row, or set data.on_bad_row=skip to leave such rows out"
                raise DataError(f"{bad[-1]}; {remedy}") from cause
    reach = data.max_prompt_tokens * CHARACTERS_PER_TOKEN
    tokens = encode([d.text[-reach:] for d in drafts], tokenizer)
    prompts, overlong = within_limit(drafts, tokens, data, tokenizer)
    if not prompts:
        raise DataError(nothing_left(source, len(drafts) + len(bad), bad, overlong, data))
    return PromptSet(
        source=source,
        prompts=tuple(prompts),
        template=template,
        read=len(drafts) + len(bad),
        bad_rows=tuple(bad),
        overlong=len(overlong),
        truncated=data.on_overlong == "truncate",
        fingerprint=fingerprint(drafts, {prompt.id for prompt in prompts}),
    )


def draft(index: int, record: Record, data: Data, template: Renderer, reward_column: str | None) -> Draft:
    if isinstance(record, BadRow):
        raise DataError(record.problem)
    question = read_question(record.values, data, reward_column)
    text = template.render(question.messages)
    return Draft(id=index, place=record.place, row=record.values, question=question, text=text)


def encode(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Templates write their special tokens as text, so the tokenizer must add none."""
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(list(texts), add_special_tokens=False, **options)["input_ids"]


def within_limit(
    drafts: Sequence[Draft], rows: Sequence[list[int]], data: Data, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[Prompt], list[str]]:
    """The prompts that stay and the places of overlong ones; `rows` has the tokens of each draft's end."""
    limit = data.max_prompt_tokens
    prompts, overlong = [], []
    for d, tokens in zip(drafts, rows):
        text = d.text
        is_cut = len(text) > limit * CHARACTERS_PER_TOKEN
        if is_cut or len(tokens) > limit:
            overlong.append(f"{d.place} ({'over ' * is_cut}{len(tokens):,} tokens)")
            if data.on_overlong != "truncate":
                continue
            tokens = end_of(d, tokens, limit, tokenizer)
            text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        asked = d.question
        prompts.append(
            Prompt(
                id=d.id,
                tokens=tuple(tokens),
                text=text,
                question=asked.text,
                truth=asked.truth,
                row=d.row,
                scored_by=asked.scored_by,
            )
        )
    if overlong and data.on_overlong == "error":
        more = f" and {len(overlong) - 3:,} more" if len(overlong) > 3 else ""
        raise DataError(
            f"{len(overlong):,} of {len(drafts):,} prompts are longer than data.max_prompt_tokens={limit}: "
            f"{', '.join(overlong[:3])}{more}; raise the limit, or set data.on_overlong to skip or truncate"
        )
    return prompts, overlong


def end_of(d: Draft, tokens: list[int], limit: int, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The last `limit` tokens, where a BOS token keeps its place in front."""
    if tokenizer.bos_token is not None and d.text.startswith(tokenizer.bos_token) and limit > 1:
        return [tokenizer.bos_token_id, *tokens[1 - limit :]]
    return tokens[-limit:]


def nothing_left(source: str, read: int, bad: Sequence[str], overlong: Sequence[str], data: Data) -> str:
    if not read:
        return f"{source}: no rows in it; give a source with questions"
    reasons = []
    if bad:
        reasons.append(f"{len(bad):,} are bad (the first: {bad[0]})")
    if overlong:
        limit = f"data.max_prompt_tokens={data.max_prompt_tokens}"
        reasons.append(f"{len(overlong):,} are longer than {limit} (the first: {overlong[0]})")
    return f"{source}: none of its {read:,} rows gives a prompt: {', '.join(reasons)}"


def fingerprint(drafts: Sequence[Draft], kept: set[int]) -> str:
    digest = hashlib.sha256()
    for d in drafts:
        if d.id in kept:
            digest.update(json.dumps([d.question.messages, d.question.truth]).encode() + b"\n")
    return digest.hexdigest()
