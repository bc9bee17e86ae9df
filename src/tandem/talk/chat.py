"""A conversation in the terminal: answers appear token by token, the last turns are remembered."""

import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import Any

from tandem.data.question import Message
from tandem.engine import EmbeddedEngine, Request, SamplingParams
from tandem.engine.random import key
from tandem.errors import DataError
from tandem.talk.speaker import Speaker
from tandem.talk.text import TextStream, escaped

LEAVE = ("exit", "quit")
CLEAR = "clear"
RESERVED = 4
"""A quarter of the positions at most is kept free for an answer by forgetting old turns."""


class Stopped(Exception):
    """The user wants no more of this answer."""


class Stop:
    """While inside, the first Ctrl-C makes `check` raise Stopped; the second one is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> "Stop":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        if self._asked:
            raise Stopped


class Chat:
    """The dialog so far; `say` puts text on the terminal, `notice` a remark of the program."""

    def __init__(
        self,
        speaker: Speaker,
        params: SamplingParams,
        *,
        system: str | None,
        history_turns: int,
        seed: int,
        say: Callable[[str], None],
        notice: Callable[[str], None],
    ) -> None:
        self.speaker, self.params, self.seed = speaker, params, seed
        self.say, self.notice = say, notice
        self.history_turns = history_turns
        self.system = system if system is not None else speaker.system
        self.turns: list[tuple[Message, Message]] = []
        """Question and answer, oldest first."""
        self.asked = 0
        self._engine = EmbeddedEngine(speaker.model, slots=1)

    def clear(self) -> None:
        self.turns.clear()

    def ask(self, question: str) -> str:
        """Stream the answer and remember it, as far as it came; DataError for a question that does not fit."""
        message = {"role": "user", "content": question}
        tokens = self._fitting(message)
        room = self.speaker.model.max_positions - len(tokens)
        params = replace(self.params, max_tokens=min(self.params.max_tokens, room))
        self.asked += 1
        request = Request(tokens=tokens, key=key(self.seed, self.asked))
        assert self.speaker.template is not None
        prefill = self.speaker.template.prefill
        self.say(escaped(prefill))
        answer = prefill + self._stream(request, params)
        if answer:
            self.turns.append((message, {"role": "assistant", "content": answer}))
        del self.turns[: max(0, len(self.turns) - self.history_turns)]
        return answer

    def _fitting(self, message: Message) -> tuple[int, ...]:
        """Tokens of the dialog with the question; the oldest turns are dropped where they leave no room."""
        positions = self.speaker.model.max_positions
        reserve = min(self.params.max_tokens, positions // RESERVED)
        dropped = 0
        tokens = self._tokens(message)
        while len(tokens) + reserve > positions and dropped < len(self.turns):
            dropped += 1
            tokens = self._tokens(message, dropped)
        if len(tokens) >= positions:
            raise DataError(
                f"the question takes {len(tokens):,} tokens and the model has {positions:,} positions; shorten it"
            )
        if dropped:
            del self.turns[:dropped]
            turns = "oldest turn is" if dropped == 1 else f"{dropped} oldest turns are"
            self.notice(f"the {turns} forgotten: the model has {positions:,} positions")
        return tokens

    def _tokens(self, message: Message, dropped: int = 0) -> tuple[int, ...]:
        """Of the dialog without its oldest turns."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return self.speaker.prompt([*system, *(m for turn in self.turns[dropped:] for m in turn), message])

    def _stream(self, request: Request, params: SamplingParams) -> str:
        stream = TextStream(self.speaker.model.tokenizer)
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            self.say(escaped(piece))

        def on_token(index: int, token: int) -> None:
            if token not in self.speaker.ends:
                show(stream.feed(token))

        with Stop() as stop, suppress(Stopped):
            self._engine.generate(
                [request], params, poll=lambda answers, tokens: stop.check(), on_token=on_token
            )
        show(stream.rest())
        self.say("\n")
        return "".join(pieces)


def converse(chat: Chat, read: Callable[[], str]) -> None:
    """Until the user leaves: by a word, by Ctrl-D, or by Ctrl-C at the prompt."""
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            chat.say("\n")
            return
        except UnicodeDecodeError as error:
            chat.notice(f"what was typed is not UTF-8 text (byte {error.start + 1}); write it in UTF-8")
            continue
        if line.lower() in LEAVE:
            return
        if line.lower() == CLEAR:
            chat.clear()
            chat.notice("the history is empty")
        elif line:
            try:
                chat.ask(line)
            except DataError as error:
                chat.notice(str(error))
