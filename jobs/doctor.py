"""`ddpm doctor`."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

from infra.local import problems
from jobs import common
from pipelines.errors import UserError, one_line, without_password

DESCRIPTION = """\
Say what is wrong with the environment: Python, the local stack, the S3 server, MLflow, the Ray cluster, the
disk.  Exit code 0 if nothing is, else 1.
"""

_MIN_FREE_BYTES = 2 * 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--storage", metavar="URI", help="also check that this S3 prefix or folder can be written"
    )


def run(arguments: argparse.Namespace) -> int:
    common.use_local_stack()
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("torch", _torch),
        ("disk", _disk),
        ("local stack", _stack),
        ("s3", _s3),
        ("mlflow", _mlflow),
        ("ray", _ray),
    ]
    if arguments.storage:
        checks.append(("storage", lambda: _storage(arguments.storage)))
    wrong = 0
    for name, check in checks:
        try:
            print(f"ok     {name:<12} {check()}")
        except UserError as error:
            wrong += 1
            print(f"WRONG  {name:<12} {error}")
    return 1 if wrong else 0


def _python() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise UserError(f"Python {version}: must be 3.11 to 3.13")
    return version


def _torch() -> str:
    import torch

    try:
        gpus = Counter(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    except RuntimeError as error:
        raise UserError(f"{torch.__version__}: its GPU can't be used ({one_line(error)})") from None
    return (
        f"{torch.__version__}, {', '.join(f'{count} × {name}' for name, count in gpus.items()) or 'no GPU'}"
    )


def _disk() -> str:
    folder = common.state_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < _MIN_FREE_BYTES:
        raise UserError(
            f"{folder}: {free / 2**30:.1f} GiB free; the local stack wants {_MIN_FREE_BYTES >> 30}"
        )
    return f"{free / 2**30:.0f} GiB free at {folder}"


def _stack() -> str:
    state = common.state_dir()
    if not (state / "stack.json").exists():
        return "not running (`ddpm up` starts it)"
    if wrong := problems(state):
        raise UserError("; ".join(wrong))
    return str(state)


def _s3() -> str:
    name = next((n for n in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(n)), None)
    if name is None:
        return "AWS_ENDPOINT_URL is not set: AWS's own endpoints, unless a profile names others"
    endpoint = os.environ[name]
    try:
        parts = urlsplit(endpoint)
        where = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection(where, timeout=4).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{name}={without_password(endpoint)}: does not answer ({one_line(error)})") from None
    return without_password(endpoint)


def _mlflow() -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return "MLFLOW_TRACKING_URI is not set: runs are not tracked"
    from pipelines.adapters.mlflow import check_server

    check_server(uri)
    return without_password(uri)


def _ray() -> str:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return "RAY_ADDRESS is not set"
    if address != "auto":
        common.check_listening(address)
    return address


def _storage(uri: str) -> str:
    from pipelines.storage import open_storage

    storage = open_storage(uri)
    storage.put("doctor.tmp", b"ddpm doctor")
    storage.delete(["doctor.tmp"])
    return storage.uri
