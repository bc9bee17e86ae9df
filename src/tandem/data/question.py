"""One row as a question: the chat messages it consists of and the answer it is checked against."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.config.sections import Data
from tandem.data.reader import is_unicode
from tandem.errors import DataError
from tandem.types import ScoredBy

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
SCORED_BY: dict[str | float, ScoredBy] = {
    1: "rule",
    "1": "rule",
    "rule": "rule",
    0: "model",
    "0": "model",
    "model": "model",
}
"""Values of `reward.column`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    messages: list[Message]
    """The last one is the user's."""
    truth: str | None
    scored_by: ScoredBy | None

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]


def read_question(values: Mapping[str, Any], data: Data, reward_column: str | None = None) -> Question:
    """Raises a DataError that names column and value; the caller knows file and row."""
    name = data.columns.question
    messages = read_messages(column(values, "data.columns.question", name), name)
    system = data.system
    if data.columns.system is not None:
        own = column(values, "data.columns.system", data.columns.system)
        system = system if own is None else text(own, f"column {data.columns.system!r}")
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    scored_by = None if reward_column is None else read_scored_by(values, reward_column)
    truth = read_truth(values, data, needed=scored_by != "model")
    return Question(messages=messages, truth=truth, scored_by=scored_by)


def read_messages(value: Any, name: str) -> list[Message]:
    """A text is the user's one message; a list holds messages of its own."""
    where = f"column {name!r}"
    if not isinstance(value, list):
        return [{"role": "user", "content": text(value, where)}]
    messages = [read_message(item, f"{where}, message {number}") for number, item in enumerate(value, 1)]
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{where}: the last message must be the user's question")
    if any(message["role"] == "system" for message in messages[1:]):
        raise DataError(f"{where}: a system message can only come first")
    return messages


def read_message(item: Any, where: str) -> Message:
    if not isinstance(item, dict) or "role" not in item or "content" not in item:
        raise DataError(f"{where}: expected an object with role and content, got {shown(item)}")
    if item["role"] not in ROLES:
        raise DataError(f"{where}: role {shown(item['role'])} is none of {', '.join(ROLES)}")
    return {"role": item["role"], "content": text(item["content"], where)}


def read_truth(values: Mapping[str, Any], data: Data, *, needed: bool) -> str | None:
    """None where it is not needed and not there, or empty."""
    name = data.columns.truth
    if name is None or (not needed and is_empty(values.get(name))):
        return None
    where = f"column {name!r}"
    value = column(values, "data.columns.truth", name)
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: {value} is no answer")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    truth = str(value) if is_number else text(value, where)
    if data.truth_after is not None:
        _, marker, truth = truth.rpartition(data.truth_after)
        if not marker:
            raise DataError(f"{where}: {shown(value)} does not hold {data.truth_after!r} (data.truth_after)")
        if not truth.strip():
            raise DataError(f"{where}: nothing follows the last {data.truth_after!r} (data.truth_after)")
    return truth.strip()


def read_scored_by(values: Mapping[str, Any], name: str) -> ScoredBy:
    value = column(values, "reward.column", name)
    word = value.strip() if isinstance(value, str) else value
    if isinstance(word, bool) or not isinstance(word, str | int | float) or word not in SCORED_BY:
        raise DataError(
            f"column {name!r} (reward.column): expected 1 or rule, 0 or model, got {shown(value)}"
        )
    return SCORED_BY[word]


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def column(values: Mapping[str, Any], key: str, name: str) -> Any:
    """`key` is that of the configuration, which names the column; `a.b` is the field b of column a, where no column has
    that name."""
    if name in values:
        return values[name]
    outer, _, inner = name.partition(".")
    if inner and isinstance(values.get(outer), Mapping):
        return column(values[outer], key, inner)
    there = ", ".join(list(values)[:20]) or "none"
    raise DataError(f"no column {name!r} ({key}); the columns are: {there}{WITHOUT.get(key, '')}")


WITHOUT = {
    "data.columns.truth": "; set data.columns.truth=null where the reward needs no answer",
    "reward.column": "; set reward.column=null where functions and model both score every answer",
}
"""How a run does without a column."""


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {shown(value)}")
    if not value.strip():
        raise DataError(f"{where}: is empty")
    if not is_unicode(value):
        raise DataError(f"{where}: holds half a surrogate pair, which is not valid Unicode")
    return value


def shown(value: Any) -> str:
    """A value short enough for a message, with control characters escaped."""
    written = ascii(value)
    return written if len(written) <= 60 else f"{written[:57]}..."
