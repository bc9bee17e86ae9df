"""Engines: tokens in, tokens out."""

from tandem.engine.answers import Completion, Request
from tandem.engine.embedded import EmbeddedEngine, decode
from tandem.engine.sampling import SamplingParams

__all__ = ["Completion", "EmbeddedEngine", "Request", "SamplingParams", "decode"]
