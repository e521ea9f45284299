"""The S3 server: moto's, an emulator that holds its buckets in memory."""

from __future__ import annotations

import sys

from infra.local.component import Component
from infra.local.layout import Stack
from infra.local.loopback import RequestFailed
from infra.local.snapshot import list_buckets

PROBE_TIMEOUT_S = 5.0


def _command(stack: Stack) -> list[str]:
    return [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(stack.ports["s3"])]


def _probe(stack: Stack) -> str | None:
    try:
        list_buckets(stack.s3_endpoint, timeout_s=PROBE_TIMEOUT_S)
    except (RequestFailed, SyntaxError) as error:  # ElementTree's ParseError is a SyntaxError
        return str(error)
    return None


S3 = Component("s3", "S3 server", ("s3",), (), _command, _probe, stop_grace_s=3)
