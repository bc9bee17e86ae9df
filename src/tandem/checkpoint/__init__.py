"""Checkpoints that are whole or absent: save, verify, restore, export, and the lock of a run's folder."""

from tandem.checkpoint.export import export
from tandem.checkpoint.jsonfile import read_json, write_json
from tandem.checkpoint.lock import lock
from tandem.checkpoint.manifest import Manifest, read_manifest, verify
from tandem.checkpoint.optimizer import optimizer_tensors, restore_optimizer
from tandem.checkpoint.rng import restore_rng, rng_state
from tandem.checkpoint.store import clean, newest, save
from tandem.checkpoint.tensors import read_tensors, write_tensors

__all__ = [
    "Manifest",
    "clean",
    "export",
    "lock",
    "newest",
    "optimizer_tensors",
    "read_json",
    "read_manifest",
    "read_tensors",
    "restore_optimizer",
    "restore_rng",
    "rng_state",
    "save",
    "verify",
    "write_json",
    "write_tensors",
]
