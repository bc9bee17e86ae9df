"""Processes meet on the address that they are told, and are open to no other."""

import os
import socket
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from parallel_ranks import launch
from tandem.config.layout import Layout
from tandem.engine.roads import BroadcastRoad
from tandem.errors import RunError
from tandem.model.parallel.grid import Grid, connect
from tandem.model.parallel.meeting import INTERFACE, meet

HERE = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def heard() -> set[str]:
    """Addresses on which this process listens or speaks."""
    return {connection.laddr.ip for connection in psutil.Process().net_connections("tcp")}


def summing(rank: int, world: int, address: str, place: str) -> None:
    connect(rank, world, address, torch.device("cpu"), timeout_s=60)
    every_N = torch.ones(2)
    for group in (None, dist.new_group(list(range(world)))):
        dist.all_reduce(every_N, group=group)
    assert every_N.tolist() == [world**2] * 2
    port = torch.zeros(1, dtype=torch.long)
    road = BroadcastRoad("127.0.0.1", 0, 0, world, torch.device("cpu"), 60.0) if rank == 0 else None
    if road is not None:
        port[0] = road.port
    dist.broadcast(port, 0)
    road = road or BroadcastRoad("127.0.0.1", int(port), rank, world, torch.device("cpu"), 60.0)
    road.connect()
    assert heard() and heard() <= HERE, heard()
    dist.barrier()


def test_learners_and_engines_that_meet_on_loopback_are_reached_by_nobody_else(tmp_path):
    launch(summing, 2, tmp_path)


def waits(group: dist.ProcessGroup | None) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


def patient(rank: int, world: int, address: str, place: str) -> None:
    connect(rank, world, address, torch.device("cpu"), timeout_s=77)
    grid = Grid(Layout(tensor=2), torch.device("cpu"), "learner.layout")
    axes = [axis.group for axis in (grid.pipeline, grid._data, grid.context, grid.tensor)]
    groups = [dist.group.WORLD, *axes, *grid.weights.get_all_groups(), *grid.host.get_all_groups()]
    assert {waits(group).total_seconds() for group in groups} == {77}
    dist.barrier()


def test_all_groups_of_a_grid_wait_as_long_as_they_are_told(tmp_path):
    """Also those that are not of all processes."""
    launch(patient, 2, tmp_path)


def test_an_interface_that_the_user_names_stays(monkeypatch):
    monkeypatch.setenv(INTERFACE, "mine0")
    store = meet("127.0.0.1", 0, True, timedelta(seconds=5))
    meet("127.0.0.1", store.port, False, timedelta(seconds=5)).set("word", "yes")
    assert store.get("word") == b"yes" and os.environ[INTERFACE] == "mine0"


def test_a_port_that_another_has_is_told():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(RunError, match=rf"process 0 of 2 cannot join the others at {address}: .*in use"):
            connect(0, 2, address, torch.device("cpu"), timeout_s=5)
