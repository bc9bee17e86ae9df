"""The embedded engine away from the trainer: it decodes with a copy of the weights, which come by any road."""

from collections.abc import Callable, Sequence

import torch

from tandem.engine.answers import Completion, Request
from tandem.engine.embedded import EmbeddedEngine
from tandem.engine.probe import policy_logp
from tandem.engine.roads import Road
from tandem.engine.sampling import SamplingParams
from tandem.engine.weights import Offer, check_specs, named_tensors, spec_of, verified
from tandem.errors import RunError
from tandem.model import LanguageModel


class ReceivingEngine:
    """Tokens in, tokens out, from the weights of `version`."""

    def __init__(self, model: LanguageModel, road: Road, slots: int, tokens_per_prefill: int = 8192) -> None:
        self.model, self.road = model, road
        self.version = 0
        self._engine = EmbeddedEngine(model, slots, tokens_per_prefill)
        self._broken: str | None = None

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        poll: Callable[[int, int], None] = lambda answers, tokens: None,
        on_done: Callable[[int, Completion], None] = lambda index, completion: None,
    ) -> list[Completion]:
        """As the embedded engine; refused with weights of a transfer that broke off."""
        if self._broken:
            raise RunError(self._broken)
        return self._engine.generate(requests, params, poll=poll, on_done=on_done)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        """Log-probability of each token of a sequence but its first, at temperature 1."""
        return [tuple(policy_logp(self.model, tokens)) for tokens in sequences]

    @torch.no_grad()
    def update(self, offer: Offer) -> None:
        """Take a version of the weights. One that cannot be taken is an error with the tensor's name; the engine then
        has its old weights, or, where a road cannot be read twice, refuses to generate until a whole version came."""
        own = named_tensors(self.model)
        check_specs(offer, {name: spec_of(name, tensor) for name, tensor in own.items()})
        if self.road.rereadable and offer.verify:
            for _ in verified(offer, self.road.read(offer)):
                pass
        self._broken = f"the engine holds part of version {offer.version} of the weights only; send one whole"
        for name, tensor in verified(offer, self.road.read(offer)):
            own[name].copy_(tensor)
        self._broken = None
        self.version = offer.version

    def sleep(self) -> None:
        """Let go of the cache."""
        self._engine.release()

    def wake(self) -> None:
        """The cache comes back with the next answer."""
