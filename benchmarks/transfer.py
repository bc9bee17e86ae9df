"""Weights to an engine with a copy of them: seconds by road, and what the proof that they arrived whole costs.

    python benchmarks/transfer.py

Sender and receiver are on this machine; of a broadcast they are two threads that meet on loopback. Writes
benchmarks/results/transfer-SIZE.json and ends with one line of JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import machine
import results
import torch
from shape import Shape, small

from tandem.config.sections import Model
from tandem.device import set_threads
from tandem.engine.weights import ModelWeights
from tandem.model import LanguageModel, load, tokenizer_of
from tandem.train.plan.way import Way

CPU = torch.device("cpu")
ROADS = ("memory", "ipc", "files", "broadcast")
PROOFS = ("none", "checksums", "checksums and probe")


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def transfer(way: Way, proof: str) -> None:
    """As a run does it: the weights, and what trainer and engine say of the probe."""
    way.send(proof != PROOFS[0])
    if proof == PROOFS[2]:
        way.probe()


def measure(sender: LanguageModel, receiver: LanguageModel, rounds: int) -> list[dict[str, Any]]:
    ways = {road: Way(road, sender, receiver) for road in ROADS}
    seconds: dict[tuple[str, str], list[float]] = {(road, proof): [] for road in ways for proof in PROOFS}
    load: dict[tuple[str, str], list[float]] = {key: [] for key in seconds}
    # The first round warms up.
    for turn in range(rounds + 1):
        for key in seconds:
            before = machine.load()
            took = timed(partial(transfer, ways[key[0]], key[1]))
            if turn:
                seconds[key].append(took)
                load[key].append(before)
    for way in ways.values():
        way.close()
    return [
        {
            "contender": road,
            "setting": proof,
            "median_seconds": round(median(seconds[road, proof]), 4),
            "seconds": [round(s, 4) for s in seconds[road, proof]],
            "load": load[road, proof],
        }
        for road, proof in seconds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a transfer of weights, by road and proof")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5, help="transfers of each kind, alternating")
    parser.add_argument("--out", help="folder of the results; benchmarks/results unless given")
    args = parser.parse_args()
    args.device, args.threads = "cpu", set_threads(None)
    shape: Shape = small(args.hidden, args.layers, args.vocab)
    with tempfile.TemporaryDirectory() as folder:
        shape.write(Path(folder))
        config = Model(path=folder, dtype="fp32")
        sender, receiver = (load(config, tokenizer_of(config), CPU) for _ in range(2))
    rows = measure(sender, receiver, args.rounds)
    args.rounds, args.repeats = 1, args.rounds  # In one process.
    case = {"bytes": sum(tensor.nbytes for _, tensor in ModelWeights(sender)), "rows": rows}
    print(results.write("transfer", args, shape, {"one engine": case}), file=sys.stderr)
    medians = {f"{row['contender']}, {row['setting']}": row["median_seconds"] for row in rows}
    print(json.dumps({"benchmark": "transfer", "seconds": medians}))


if __name__ == "__main__":
    main()
