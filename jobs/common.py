"""What several commands share: the configuration's arguments, the local stack's environment, the cluster."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from infra.local import StackError, find
from jobs.cluster_address import host_and_port
from pipelines.errors import UserError, one_line

if TYPE_CHECKING:
    from pipelines.config import Config


def state_dir() -> Path:
    """The folder of the local stack."""
    return Path(os.environ.get("DDPM_STATE", ".ddpm")).expanduser().absolute()


def use_local_stack(address: str | None = None) -> None:
    """Take from a running local stack what the environment does not say; no Ray where an address is given.

    Before the first import of ray, which reads the environment only then.
    """
    try:
        stack = find(state_dir())
    except StackError as error:
        raise UserError(str(error)) from None
    if stack is not None:
        own = {host_and_port(stack.ray_address), host_and_port(stack.dashboard_url)}
        elsewhere = address is not None and host_and_port(address) not in own
        stack.complement(skip=("ray",) if elsewhere else ())


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.yaml",
        help="the configuration; digits.yaml, cifar10.yaml and cifar10-improved.yaml come with the program",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override a setting; may be repeated",
    )


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--local", action="store_true", help="in this process, without Ray: for a debugger")
    place.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the Ray cluster (default: RAY_ADDRESS, or the local stack)",
    )


def add_dashboard_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="http://HOST:PORT",
        help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, or the local stack)",
    )


def config_of(arguments: argparse.Namespace) -> Config:
    from pipelines.config import load_config
    from pipelines.storage import absolute

    config = load_config(arguments.config, arguments.overrides)
    # a folder means one of this process; workers and submitted jobs have other working directories
    data = config.data.model_copy(update={"uri": absolute(config.data.uri)})
    return config.model_copy(update={"data": data, "storage": absolute(config.storage)})


def output_folder(path: str) -> Path:
    """The folder that `--out` names, made if need be; asked for before the work whose results it gets."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {path}: can't be written to")
    return folder


@contextmanager
def ray_cluster(address: str | None, *, has_local: bool = True) -> Iterator[None]:
    """Connected to the Ray cluster at an address, or at RAY_ADDRESS; raises `UserError` if none answers.

    has_local: whether the command has --local, which the message then names.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise UserError(
            "no Ray cluster: start the local stack with `ddpm up`, "
            + ("" if has_local else "or ")
            + "name one with --address HOST:PORT"
            + (", or use --local" if has_local else "")
        )
    if address != "auto":
        check_listening(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=True, logging_level="warning")
    # RayError: a token that is missing or wrong
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(f"Ray cluster {address}: {one_line(error)}") from None
    finally:
        # Ray's own would end the program before anybody hears that it was stopped
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def check_listening(address: str, timeout_s: float = 5) -> None:
    """Raise a `UserError` unless something listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--address {address}: must be HOST:PORT of a Ray cluster's head")
    try:
        socket.create_connection((host, int(port)), timeout_s).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"Ray cluster {address}: does not answer ({one_line(error)})") from None
