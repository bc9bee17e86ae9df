"""Engines: tokens in, tokens out."""

from tandem.engine.answers import PAUSED, Completion, Pause, Request
from tandem.engine.embedded import EmbeddedEngine
from tandem.engine.sampling import SamplingParams
from tandem.engine.text import decode

__all__ = ["PAUSED", "Completion", "EmbeddedEngine", "Pause", "Request", "SamplingParams", "decode"]
