"""Engines: tokens in, tokens out."""

from tandem.engine.embedded import Completion, EmbeddedEngine, Request, decode
from tandem.engine.sampling import SamplingParams

__all__ = ["Completion", "EmbeddedEngine", "Request", "SamplingParams", "decode"]
