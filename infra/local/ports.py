"""Which TCP ports of this machine are free."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Collection

USUAL_PORTS = {"s3": 9000, "mlflow": 5000, "gcs": 6379, "dashboard": 8265, "client": 10001}

_NEIGHBOURS = 50


def is_free(port: int) -> bool:
    """True if nothing listens on the port, on loopback or on all interfaces."""
    # macOS lets 127.0.0.1 be bound beside somebody's wildcard listener, so ask whether one answers first
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            return False
    return _can_bind("127.0.0.1", port) and _can_bind("", port)


def _can_bind(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # as the servers do: a port in TIME_WAIT after its server was killed is free for the next one
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def wait_until_free(port: int, *, timeout_s: float) -> None:
    """Return when the port is free, or after the time."""
    deadline = time.monotonic() + timeout_s
    while not is_free(port) and time.monotonic() < deadline:
        time.sleep(0.05)


def choose(preferred: int, taken: Collection[int]) -> int:
    """The preferred port, else one of its next neighbours, else any: free now and not in `taken`."""
    for port in range(preferred, min(preferred + _NEIGHBOURS, 65536)):
        if port not in taken and is_free(port):
            return port
    return choose_any(taken)


def choose_any(taken: Collection[int]) -> int:
    """A free port of the system's choice that is not in `taken`."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("", 0))
            port = int(listener.getsockname()[1])
        if port not in taken and is_free(port):
            return port
