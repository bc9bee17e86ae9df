"""From a prompt to a scored group, and the stream of groups that training takes from."""

from tandem.rollout.sampler import EVAL, TRAIN, Judging, Sampler, Units
from tandem.rollout.stream import (
    Drawn,
    Stream,
    ahead_of,
    due,
    group_from,
    group_record,
    lag_figures,
    mixed,
    permuted,
)

__all__ = [
    "EVAL",
    "TRAIN",
    "Drawn",
    "Judging",
    "Sampler",
    "Stream",
    "Units",
    "ahead_of",
    "due",
    "group_from",
    "group_record",
    "lag_figures",
    "mixed",
    "permuted",
]
