"""Templates: how a question's messages become the one text that the model reads.

Built-in templates are data (templates.yaml) and one's own is a file with the same keys. Placeholders are
replaced, never formatted: questions and instructions are full of braces.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError, field_validator

from tandem.config import yaml_text
from tandem.config.section import Section
from tandem.data.question import Message
from tandem.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = Path(__file__).with_name("templates.yaml")


class Template(Section):
    system: str | None = None
    """System message of dialogs that bring none; null for no system message."""
    format_system: str = "{content}\n"
    """A system message; {content} is its text."""
    format_user: str = "{content}"
    """A user message."""
    format_assistant: str = "{content}"
    """An earlier answer within the dialog."""
    assistant_start: str = ""
    """Begins the turn that the model answers in."""
    prefill: str = ""
    """First words of the answer, given to the model; verifiers see only what it adds to them."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin with the tokenizer's BOS token: `auto` where the tokenizer itself puts one in front of a text."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    drop_thoughts: bool = False
    """Leave everything up to </think> out of earlier answers."""

    @field_validator("format_system", "format_user", "format_assistant")
    @classmethod
    def _one_place(cls, value: str) -> str:
        if value.count("{content}") != 1:
            raise ValueError("must hold {content} exactly once")
        return value

    def render(self, messages: list[Message]) -> str:
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return "".join(map(self._turn, messages)) + self.assistant_start + self.prefill

    def _turn(self, message: Message) -> str:
        forms = {"system": self.format_system, "user": self.format_user, "assistant": self.format_assistant}
        content = message["content"]
        if message["role"] == "assistant" and self.drop_thoughts:
            content = content.rpartition("</think>")[2].lstrip("\n")
        return forms[message["role"]].replace("{content}", content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renderer:
    """A template bound to a tokenizer."""

    name: str
    render: Callable[[list[Message]], str]
    """The text the model reads, special tokens included. A dialog it has no form for is a DataError."""
    prefill: str = ""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are no special token."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end an answer."""


def open_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """The template that `data.template` names."""
    if name == "chat":
        return chat_renderer(tokenizer)
    template = own_template(name) if name.endswith((".yaml", ".yml")) else built_in(name)
    bos = bos_text(name, template, tokenizer)

    def render(messages: list[Message]) -> str:
        text = template.render(messages)
        return text if text.startswith(bos) else bos + text

    texts, tokens = split_stops(template.stop, tokenizer, f"data.template={name}")
    return Renderer(name=name, render=render, prefill=template.prefill, stop=texts, stop_tokens=tokens)


def chat_renderer(tokenizer: "PreTrainedTokenizerBase") -> Renderer:
    """The tokenizer's own chat template; it writes its BOS token itself where it wants one."""
    import jinja2

    if not tokenizer.chat_template:
        raise ConfigError(
            f"data.template=chat: the tokenizer in {tokenizer.name_or_path or 'this model'} has no chat "
            f"template; name a template ({', '.join(templates())}) or give a YAML file with one of your own"
        )

    def render(messages: list[Message]) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as cause:
            raise DataError(f"the model's chat template refuses this dialog: {cause}") from cause

    return Renderer(name="chat", render=render)


def built_in(name: str) -> Template:
    if name in templates():
        return templates()[name]
    near = difflib.get_close_matches(name, ["chat", *templates()], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"data.template={name}: no such template; {hint}there are chat, {', '.join(templates())}, "
        "or the path of a YAML file"
    )


@cache
def templates() -> dict[str, Template]:
    """The built-in templates by name."""
    made: dict[str, Template] = {}
    for name, keys in yaml_text.parse(BUILT_IN.read_text(encoding="utf-8"), BUILT_IN.name).data.items():
        made[name] = make_template(keys, made, f"{BUILT_IN.name}: {name}")
    return made


def own_template(name: str) -> Template:
    path = Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"data.template={name}: cannot read {path.absolute()}: {cause}") from cause
    where = f"data.template={name}"
    return make_template(yaml_text.parse(text, where).data, templates(), where)


def make_template(keys: dict[str, Any], known: dict[str, Template], where: str) -> Template:
    """`extends` names the template whose keys hold where `keys` says nothing."""
    own = dict(keys)
    base = own.pop("extends", None)
    if base is not None and base not in known:
        raise ConfigError(f"{where}: extends={base!r} is no built-in template; there are {', '.join(known)}")
    try:
        return Template(**{**(known[base].model_dump() if base is not None else {}), **own})
    except ValidationError as cause:
        raise ConfigError(f"{where}: " + "; ".join(map(fault, cause.errors()))) from cause
    except TypeError as cause:
        raise ConfigError(f"{where}: keys must be text ({cause})") from cause


def fault(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{key}={error['input']!r}: {error['msg'].removeprefix('Value error, ')}"
    keys = ["extends", *Template.model_fields]
    near = difflib.get_close_matches(key, keys, n=1)
    return f"unknown key {key!r}" + (
        f", did you mean {near[0]!r}?" if near else f"; the keys are {', '.join(keys)}"
    )


def bos_text(name: str, template: Template, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What every text begins with: the BOS token or nothing."""
    if template.bos == "always" and tokenizer.bos_token is None:
        raise ConfigError(
            f"data.template={name} begins with a BOS token and the tokenizer in "
            f"{tokenizer.name_or_path or 'this model'} has none; the template is for another kind of model"
        )
    adds_bos = template.bos == "auto" and tokenizer.bos_token is not None
    if adds_bos:
        adds_bos = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if template.bos == "always" or adds_bos else ""


def check_stop_tokens(stop_tokens: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> None:
    """ConfigError for one that the model never says."""
    last = max(tokenizer.get_vocab().values()) if stop_tokens else 0
    for token in stop_tokens:
        if token > last:
            raise ConfigError(
                f"sampling.stop_tokens={token}: the tokenizer has the tokens 0 to {last}; give one of these, or "
                "the text as sampling.stop"
            )


def split_stops(
    stops: Sequence[str], tokenizer: "PreTrainedTokenizerBase", key: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop texts, and the ids of those that are special tokens, which never show in a decoded answer; ConfigError, with
    the `key` that sets it, for a text that no answer can hold, or that all do."""
    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    ids |= {added.content: i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    texts = tuple(stop for stop in stops if stop not in ids)
    for text in texts:
        if not text:
            raise ConfigError(f"{key} holds an empty text, which every answer has; remove it")
        if hidden := next((token for token in ids if token in text), None):
            raise ConfigError(
                f"{key}: no answer's text holds {text!r}, for {hidden!r} is a special token, which is left out of it; "
                "name that token alone"
            )
    return texts, tuple(ids[stop] for stop in stops if stop in ids)
