"""HTTP to servers on this machine: never through a proxy, every failure one exception type."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import IO

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class RequestFailed(Exception):
    """A request that got no answer, or an answer other than 2xx; `status` is None or the HTTP status."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def request(
    method: str,
    url: str,
    *,
    body: bytes | IO[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
) -> Iterator[HTTPResponse]:
    """The open response of a 2xx answer; raises `RequestFailed` otherwise, also while it is being read."""
    try:
        wanted = urllib.request.Request(url, data=body, method=method, headers=dict(headers or {}))
        with _OPENER.open(wanted, timeout=timeout_s) as response:
            yield response
    except urllib.error.HTTPError as error:
        with error:
            detail = " ".join(error.read(300).decode(errors="replace").split())
        raise RequestFailed(f"{method} {url}: HTTP {error.code} {detail}", error.code) from None
    except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise RequestFailed(f"{method} {url}: {reason or type(error).__name__}") from None
