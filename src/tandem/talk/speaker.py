"""A model that is ready to answer: its weights, its template, and what ends an answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tandem.checkpoint.extract import while_there
from tandem.checkpoint.sharded import read_weights
from tandem.data.question import Message
from tandem.data.template import Renderer, open_template, split_stops
from tandem.device import pick, set_threads
from tandem.engine import SamplingParams
from tandem.errors import ConfigError, DataError
from tandem.model import LanguageModel, describe, load, load_frozen, tokenizer_of
from tandem.talk.place import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    model: LanguageModel
    template: Renderer | None
    """None for a model that continues plain text."""
    system: str | None
    """System message of the run that the model comes from."""
    stop: tuple[str, ...] = ()
    """Texts that ended an answer in that run."""
    stop_tokens: frozenset[int] = frozenset()

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of a dialog whose last message is the user's; without a template, of that message alone. DataError for
        one that is no text."""
        for message in messages:
            check_text(message["content"])
        tokenizer = self.model.tokenizer
        if self.template is None:
            return tuple(tokenizer.encode(messages[-1]["content"]))
        text = self.template.render(list(messages))
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer and are not part of it."""
        return self.model.stop_tokens | self.stop_tokens

    def params(
        self, max_tokens: int, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
    ) -> SamplingParams:
        return SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            max_tokens=max_tokens,
            stop=self.stop,
            stop_tokens=self.stop_tokens,
        )


def check_text(text: str) -> None:
    """Bytes that are not UTF-8 come from the command line or the terminal as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text {text[:40]!a} is not UTF-8 (at character {error.start + 1}, {text[error.start]!a}); write it in "
            "UTF-8"
        ) from None


def open_speaker(place: Place, device: str, *, raw: bool = False, trust: bool = False) -> Speaker:
    """Load the model, with code of its folder's own where that is `trust`ed; it speaks in the template of its run, else
    in its tokenizer's own."""
    model = open_model(place, pick(device), trust)
    if raw:
        return Speaker(model=model, template=None, system=None)
    if place.run is None:
        if not model.tokenizer.chat_template:
            raise ConfigError(
                f"{place.given}: its tokenizer has no chat template; with `tandem generate --raw` the model "
                "continues plain text"
            )
        return Speaker(model=model, template=open_template("chat", model.tokenizer), system=None)
    data, sampling = place.run.data, place.run.sampling
    template = open_template(data.template, model.tokenizer)
    stop, stop_tokens = split_stops(sampling.stop, model.tokenizer, "sampling.stop")
    return Speaker(
        model=model,
        template=template,
        system=data.system,
        stop=(*stop, *template.stop),
        stop_tokens=frozenset((*sampling.stop_tokens, *stop_tokens, *template.stop_tokens)),
    )


def open_model(place: Place, device: torch.device, trust: bool = False) -> LanguageModel:
    """The model in evaluation mode: in the type of its run, else in the one that it is stored in."""
    if place.run is not None and place.run.model.trust_remote_code and not trust:
        raise ConfigError(
            f"{place.given}: its config.yaml asks to run Python code that the model's folder brings along "
            "(model.trust_remote_code); say --trust-remote-code if you know what that code does"
        )
    set_threads(place.run.threads if place.run is not None else None)
    if place.folder is not None:
        dtype = place.run.model.dtype if place.run is not None else stored_dtype(place.folder, trust)
        return load_frozen(place.folder, dtype, device, trust)
    assert place.checkpoint is not None and place.run is not None
    config, seed = place.run.model, place.run.seed
    sharded = place.checkpoint / "sharded"
    weights = None if sharded.is_dir() else place.checkpoint / "model"
    with while_there(place.checkpoint):
        model = load(config, tokenizer_of(config), device, seed=seed, resume=weights)
        if weights is None:
            read_weights(sharded, model)
    model.module.eval()
    return model


def stored_dtype(folder: str, trust: bool = False) -> str:
    """16-bit weights are read as bfloat16, all others as float32."""
    return "bf16" if describe(folder, trust).dtype in (torch.bfloat16, torch.float16) else "fp32"
