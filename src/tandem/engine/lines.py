"""Which lines of `Kept` belong to which answers of a call of `generate`."""

from collections.abc import Sequence

from torch import Tensor

from tandem.engine.answers import Completion, Request
from tandem.engine.sampling import SamplingParams
from tandem.model.kept import Kept

Prompt = tuple[int, ...]


class Lines:
    """Told what is computed next, it says where that is kept; with `kept` None it does nothing."""

    def __init__(self, kept: Kept | None, requests: Sequence[Request]) -> None:
        self.kept, self._requests = kept, requests
        self._of_prompt: dict[Prompt, list[int]] = {}
        self._of_answer: list[list[int]] = [[] for _ in requests]

    def prompts(self, prompts: Sequence[Prompt]) -> None:
        """These prompts are computed, one behind the other."""
        lines = None if self.kept is None else self.kept.begin([True] * sum(map(len, prompts)))
        if lines is None:
            return
        end = 0
        for prompt in prompts:
            self._of_prompt[prompt] = lines[end : (end := end + len(prompt))]

    def narrow(self, index_M: Tensor) -> None:
        """Of what is computed, the output head sees these alone."""
        if self.kept is not None:
            self.kept.narrow(index_M)

    def step(self, indices: Sequence[int], done: Sequence[bool]) -> None:
        """One more token is computed of the answers to the requests of these numbers, but for those that are done."""
        lines = None if self.kept is None else self.kept.begin([not each for each in done])
        if lines is None:
            return
        for index, line, is_done in zip(indices, lines, done, strict=True):
            if not is_done:
                self._of_answer[index].append(line)

    def finish(self, done: Sequence[Completion | None]) -> None:
        """These are the answers. Those that found no room to the end are left out."""
        if self.kept is None:
            return
        self.kept.end()
        for request, completion, mine in zip(self._requests, done, self._of_answer, strict=True):
            prompt = self._of_prompt.get(request.tokens)
            if completion is None or prompt is None or len(mine) < len(completion.tokens) - 1:
                continue
            lines = [*prompt, *mine[: len(completion.tokens) - 1]]
            self.kept.note(request.tokens + completion.tokens, lines)


def lines_for(requests: Sequence[Request], params: SamplingParams, kept: Kept | None) -> Lines:
    """Lines of these requests, if all of them are to be kept from their beginning and there is room for them."""
    if kept is None or not all(r.keep and not r.begun.tokens for r in requests):
        return Lines(None, requests)
    limits = sum(min(r.max_tokens or params.max_tokens, params.max_tokens) for r in requests)
    prompts = sum(map(len, {r.tokens for r in requests}))
    return Lines(kept if kept.open(limits + prompts) else None, requests)
