"""Where processes find each other: PyTorch's store, and Gloo's connections, on one address of a machine alone."""

import os
import socket
from datetime import timedelta

import psutil
import torch.distributed as dist

INTERFACE = "GLOO_SOCKET_IFNAME"


def meet(host: str, port: int, opens: bool, timeout: timedelta) -> dist.TCPStore:
    """The store at an address. One process `opens` it: at port 0, at any that is free. OSError or RuntimeError where
    that is taken or, within the timeout, not there.

    PyTorch would listen on all addresses, and Gloo on that of the machine's name, which other nodes may not reach.
    """
    if opens:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listening:
            port = listening.getsockname()[1]
            store = dist.TCPStore(
                host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach()
            )
    else:
        store = dist.TCPStore(host, port, None, False, timeout, wait_for_workers=False)
    if INTERFACE not in os.environ and (name := interface_towards(host, port)):
        os.environ[INTERFACE] = name
    return store


def interface_towards(host: str, port: int) -> str | None:
    """The name of the network interface from which this process speaks to an address."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, kind, _, _, address = found[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # Of a datagram socket, which sends nothing.
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            return name
    return None
