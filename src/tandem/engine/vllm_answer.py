"""An answer that vLLM is making, as far as it has come."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.engine.answers import PAUSED, Completion, Request


@dataclass(slots=True)
class Answer:
    """The answer to a request, which may have begun with some tokens."""

    index: int
    request: Request
    limit: int
    name: str = ""
    tokens: list[int] = field(init=False)
    fresh_logp: list[float] = field(default_factory=list)
    """Of the tokens that this call sampled."""
    policy_logp: Sequence[float] | None = None
    """The same under the policy, where that is another distribution."""
    finish: str | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.begun.tokens)

    @property
    def line(self) -> tuple[int, ...]:
        return (*self.request.tokens, *self.tokens)

    def completion(self) -> Completion:
        """As far as it is."""
        begun, fresh = self.request.begun, tuple(self.fresh_logp)
        return Completion(
            tokens=tuple(self.tokens),
            logp=begun.logp + fresh,
            policy_logp=begun.policy_logp + (fresh if self.policy_logp is None else tuple(self.policy_logp)),
            versions=begun.versions + (self.request.version,) * len(fresh),
            finish=self.finish or PAUSED,
        )
