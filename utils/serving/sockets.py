"""Where the server listens, and what addresses mean."""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextlib import ExitStack, closing
from urllib.parse import SplitResult, urlsplit

from utils.errors import UserError

LOCAL = {"localhost", "127.0.0.1", "::1"}
# localhost is ::1 too, also where a machine or container has no IPv6
_NO_SUCH_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOCAL or host.lower().endswith(".localhost")


def split(address: str) -> SplitResult:
    """The parts of an address; of what is none, no parts."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at all addresses of a host. Clients who come before anything serves them wait.

    Raises:
        UserError: the port is in use, or is no longer free.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with ExitStack() as made:
        sockets, fault = [], ""
        for family, kind, protocol, _, address in found:
            try:
                one = made.enter_context(closing(socket.socket(family, kind, protocol)))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an ended server's port may be taken at once
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # beside the same port of IPv4
                one.bind(address)
                one.listen(socket.SOMAXCONN)
            except OSError as error:
                said = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
                fault = f"--flask_port: {port} of {address[0]} {said}"
                if error.errno not in _NO_SUCH_ADDRESS:
                    raise UserError(fault) from None
            else:
                sockets.append(one)
        if not sockets:
            raise UserError(fault)
        made.pop_all()  # they stay open
    return sockets


def url(host: str, port: int) -> str:
    """The address at which this machine reaches a server that listens on a host."""
    if host in ("", "0.0.0.0", "::"):  # all addresses of this machine
        host = "127.0.0.1" if host != "::" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
