"""Answers sampled ahead in a checkpoint: what there is for every token as flat tensors, the rest as text beside them.

There may be any number of them, and written as JSON numbers they would soon outgrow what state may take.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from tandem.checkpoint import read_tensors, write_tensors
from tandem.checkpoint.jsonfile import json_text, parse_json
from tandem.errors import RunError

COLUMNS = {
    "tokens": numpy.int32,
    "sampled": numpy.bool_,
    "logp": numpy.float64,
    "policy_logp": numpy.float64,
    "versions": numpy.int32,
}
"""What an answer has one of for every token, and as what it is kept: Python's floats have 64 bits."""
LENGTHS, REST = "lengths", "rest"


def write_ahead(path: Path, steps: Sequence[Mapping[str, Any]]) -> None:
    """The records of steps, as `Drawn.record` makes them."""
    rollouts = list(rollouts_of(steps))
    text = json_text([bare(step) for step in steps], path.name).encode("ascii")
    tensors = {name: column(rollouts, name) for name in COLUMNS}
    tensors[LENGTHS] = torch.tensor([len(rollout["tokens"]) for rollout in rollouts])
    tensors[REST] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    write_tensors(path, tensors)


def read_ahead(path: Path) -> list[dict[str, Any]]:
    """What `write_ahead` was given, equal to the last bit, with lists for tuples."""
    tensors = read_tensors(path)
    if tensors.keys() != {*COLUMNS, LENGTHS, REST}:
        raise RunError(f"{path} holds {sorted(tensors)}, which are no answers; take another checkpoint")
    steps = parse_json(tensors[REST].numpy().tobytes(), path)
    rollouts, lengths = list(rollouts_of(steps)), tensors[LENGTHS].tolist()
    if len(lengths) != len(rollouts) or {len(tensors[name]) for name in COLUMNS} != {sum(lengths)}:
        raise RunError(f"{path} has not what its {len(rollouts)} answers need; take another checkpoint")
    for name in COLUMNS:
        for rollout, values in zip(rollouts, tensors[name].split(lengths)):
            rollout[name] = values.tolist()
    return steps


def rollouts_of(steps: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records of all answers, in order."""
    return (rollout for step in steps for group in step["groups"] for rollout in group["rollouts"])


def bare(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step's record without what there is for every token."""

    def rest(rollout: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in rollout.items() if name not in COLUMNS}

    groups = [{**group, "rollouts": [rest(r) for r in group["rollouts"]]} for group in step["groups"]]
    return {**step, "groups": groups}


def column(rollouts: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """The values of all answers, one after another."""
    values = (value for rollout in rollouts for value in rollout[name])
    return torch.from_numpy(numpy.fromiter(values, COLUMNS[name], sum(len(r[name]) for r in rollouts)))
