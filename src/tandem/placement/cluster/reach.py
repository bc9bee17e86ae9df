"""Whether there is a Ray where a run is to join one. Ray itself tries for a quarter of an hour, deaf to signals."""

import socket

from tandem.errors import ConfigError

CONNECT_S = 5.0


def check_reachable(address: str) -> None:
    """ConfigError where nothing listens at `host:port`. What `auto` is, Ray knows."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"placement.address={address}: write auto, or the head's HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as cause:
        raise ConfigError(
            f"placement.address={address}: nothing answers there ({cause}). Start a head by `ray start --head` on that "
            "machine, or name the address that it printed"
        ) from cause
