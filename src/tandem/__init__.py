"""Tandem post-trains language models with reinforcement learning, in one readable loop."""

__version__ = "0.1.0"
