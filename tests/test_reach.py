"""A run that is to join a cluster which is not there says so at once."""

import socket
import time

import pytest

from small_recipe import recipe, tandem
from tandem.errors import ConfigError
from tandem.placement.cluster.reach import check_reachable


def test_a_cluster_that_is_not_there_is_an_error_before_anything_slow(tmp_path):
    """Ray would try to connect for a quarter of an hour."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        done = tandem("train", recipe(tmp_path), "placement.kind=apart", f"placement.address={address}")
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and time.monotonic() - began < 60
    assert f"placement.address={address}: nothing answers there" in said and "ray start --head" in said


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "ray://head:10001x", "1.2.3.4"])
def test_an_address_has_a_host_and_a_port(address):
    with pytest.raises(ConfigError, match="write auto, or the head's HOST:PORT"):
        check_reachable(address)


def test_what_listens_is_left_to_ray():
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        check_reachable(f"127.0.0.1:{head.getsockname()[1]}")
    check_reachable("auto")
