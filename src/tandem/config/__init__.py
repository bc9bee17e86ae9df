"""The configuration of a run: sections, loading, documentation."""

from tandem.config.explain import document, explain
from tandem.config.layers import preset_names, recipes
from tandem.config.load import FREE_ON_RESUME, difference, dump, load
from tandem.config.run import Run
from tandem.config.secret import redact

__all__ = [
    "FREE_ON_RESUME",
    "Run",
    "difference",
    "document",
    "dump",
    "explain",
    "load",
    "preset_names",
    "recipes",
    "redact",
]
