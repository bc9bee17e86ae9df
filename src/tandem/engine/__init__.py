"""Engines: tokens in, tokens out."""

from tandem.engine.answers import Completion, Request
from tandem.engine.embedded import EmbeddedEngine
from tandem.engine.sampling import SamplingParams
from tandem.engine.text import decode

__all__ = ["Completion", "EmbeddedEngine", "Request", "SamplingParams", "decode"]
