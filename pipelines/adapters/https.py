"""Objects below an https:// or http:// address, to be read and no more; by urllib3.

For public data sets: their objects are named by their record, so nothing need be listed. No credentials are sent,
and no redirect to another server is followed.
"""

from __future__ import annotations

import functools
import os
import re
import urllib.request
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError

from pipelines.errors import UserError, one_line, printable, without_password
from pipelines.retries import Data, Read1, TryAgain, insist, read_steadily, read_steadily_hashed
from pipelines.storage import (
    Hashed,
    Memory,
    NoRanges,
    ObjectInfo,
    ObjectMissing,
    ObjectTooShort,
    StorageError,
    checked_key,
    new_memory,
)

Result = TypeVar("Result")

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
_MAX_REDIRECTS = 3
_MAX_DIGITS = 20
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}


@functools.cache
def _pool(pid: int, proxy: str | None) -> urllib3.PoolManager:
    """One a process and proxy, never carried over a fork."""
    timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
    if proxy is None:
        return urllib3.PoolManager(maxsize=32, timeout=timeout)
    user = unquote(urlsplit(proxy).netloc.rpartition("@")[0])
    headers = urllib3.make_headers(proxy_basic_auth=user) if user else None
    return urllib3.ProxyManager(without_password(proxy), proxy_headers=headers, maxsize=32, timeout=timeout)


def _proxy(scheme: str, host: str) -> str | None:
    if urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(scheme)


class HttpStorage:
    """The objects whose addresses begin with `uri`; keys are percent-encoded behind it."""

    def __init__(self, uri: str) -> None:
        """Raises `UserError` if the address names no host, or has a password, a query or a fragment."""
        shown = without_password(uri)
        try:
            parts = urlsplit(uri)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"{shown}: {one_line(error)}") from None
        if not host:
            raise UserError(
                f"{shown}: an address to read from is https://HOST/PREFIX, and this one names no host"
            )
        if "@" in parts.netloc:
            raise UserError(
                f"{shown}: an address may hold no user name or password, which would show in logs"
            )
        if parts.query or parts.fragment or uri.endswith(("?", "#")):
            raise UserError(f"{shown}: an address to read from can have no part behind '?' or '#'")
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~").rstrip("/")
        self._uri = f"{parts.scheme.lower()}://{parts.netloc.lower()}{path}"
        self._host = host

    def __reduce__(self) -> tuple[type[HttpStorage], tuple[str]]:
        return HttpStorage, (self._uri,)

    @property
    def uri(self) -> str:
        return self._uri

    def child(self, *parts: str) -> HttpStorage:
        return HttpStorage("/".join([self._uri, *(quote(checked_key(part)) for part in parts)]))

    def get(self, key: str) -> bytes:
        return self._get(key, read_steadily)

    def get_hashed(self, key: str, memory: Memory = new_memory) -> Hashed:
        return self._get(key, functools.partial(read_steadily_hashed, memory))

    def _get(self, key: str, read: Callable[[Read1, int], Data]) -> Data:
        def accept(response: urllib3.BaseHTTPResponse) -> Data:
            if response.status != 200:
                raise TryAgain(f"the server answered {response.status} to a request for the whole")
            return _body(response, _stated_length(response, f"{self._uri}/{key}"), read)

        return self._ask("GET", key, {}, accept)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            checked_key(key)
            return b""
        what, span = f"{self._uri}/{key}", (start, start + length - 1)

        def accept(response: urllib3.BaseHTTPResponse) -> bytes:
            given = re.fullmatch(
                r"bytes (\d+|\*)(?:-(\d+))?/(\d+|\*)", response.headers.get("Content-Range", "")
            )
            whole = None if given is None or given[3] == "*" else _size(given[3])
            if response.status == 416 or (whole is not None and whole < start + length):
                there = max(0, (whole or 0) - start)
                raise ObjectTooShort(f"{what}: {there} of {length} bytes at {start}: the object is too short")
            if response.status != 206:
                raise NoRanges(f"{what}: this server gives no parts of objects (it ignores Range)")
            if not given or (given[1], given[2]) != (str(span[0]), str(span[1])):
                raise TryAgain(
                    f"could not be read whole: asked for bytes {span[0]}-{span[1]}, got another part"
                )
            return _body(response, length, read_steadily)

        return self._ask("GET", key, {"Range": f"bytes={span[0]}-{span[1]}"}, accept)

    def exists(self, key: str) -> bool:
        try:
            return self._ask("HEAD", key, {}, lambda response: True)
        except ObjectMissing:
            return False

    def put(self, key: str, data: bytes) -> None:
        self._refuse(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._refuse(key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._refuse(key)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        raise StorageError(f"{self._uri}/{prefix}: what lies at an http address can't be listed")

    def _refuse(self, key: str) -> NoReturn:
        raise StorageError(
            f"{self._uri}/{checked_key(key)}: an http address can only be read; write to s3://BUCKET/PREFIX or "
            "a folder"
        )

    def _ask(
        self,
        method: str,
        key: str,
        headers: dict[str, str],
        accept: Callable[[urllib3.BaseHTTPResponse], Result],
    ) -> Result:
        address = f"{self._uri}/{quote(checked_key(key))}"
        what = f"{self._uri}/{key}"

        def attempt() -> Result:
            try:
                response = self._follow(method, address, headers, what)
                try:
                    _check_status(response, what)
                    return accept(response)
                finally:
                    # a connection whose answer was not read to its end is of no more use
                    if not response.closed:
                        response.close()
                    response.release_conn()
            except LocationParseError as error:
                raise StorageError(f"{what}: {one_line(error)}") from None
            except (HTTPError, OSError) as error:
                problem = f"{self._host} does not answer as it should: {one_line(error, 160)}"
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise StorageError(f"{what}: {problem}") from None
                raise TryAgain(problem) from None

        return insist(what, attempt, StorageError)

    def _follow(
        self, method: str, address: str, headers: dict[str, str], what: str
    ) -> urllib3.BaseHTTPResponse:
        try:
            pool = _pool(os.getpid(), _proxy(urlsplit(address).scheme, self._host))
        except ValueError as error:
            raise StorageError(f"{what}: the proxy of the environment: {one_line(error)}") from None
        for _ in range(_MAX_REDIRECTS + 1):
            response = pool.request(
                method,
                address,
                headers={"Accept-Encoding": "identity", "User-Agent": "ddpm", **headers},
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
            aim = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or not aim:
                return response
            response.close()
            try:
                there, here = urlsplit(urljoin(address, aim)), urlsplit(address)
            except ValueError:
                shown = one_line(ValueError(printable(without_password(aim))), 160)
                raise StorageError(f"{what}: is redirected to {shown}, which is no address") from None
            if (there.scheme, there.netloc.lower()) != (here.scheme, here.netloc):
                host = printable(f"{there.scheme}://{there.netloc.rpartition('@')[2]}")
                raise StorageError(
                    f"{what}: is redirected to {host}, and no other server is followed: give its own address"
                )
            address = there._replace(fragment="").geturl()
        raise StorageError(f"{what}: is redirected more than {_MAX_REDIRECTS} times")


def _check_status(response: urllib3.BaseHTTPResponse, what: str) -> None:
    status = f"{response.status} {response.reason or ''}".strip()
    if response.status in (404, 410):
        raise ObjectMissing(what)
    if response.status in _PASSING_STATUS:
        raise TryAgain(f"the server answered {status}")
    if response.status in (401, 403):
        raise StorageError(f"{what}: the server answered {status}: it is not public, or not there")
    if response.status not in (200, 206, 416):
        raise StorageError(f"{what}: the server answered {status}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise StorageError(f"{what}: the server sends it as {encoding!r}, which was not asked for")


def _stated_length(response: urllib3.BaseHTTPResponse, what: str) -> int | None:
    """None where the body tells its own end, chunk by chunk."""
    length = response.headers.get("Content-Length", "")
    if length.isdecimal():
        return _size(length)
    if "chunked" in response.headers.get("Transfer-Encoding", "").lower():
        return None
    raise StorageError(
        f"{what}: the server does not say how long it is, so a cut could not be told from its end"
    )


def _size(digits: str) -> int:
    # no object is so large, and Python refuses numbers of thousands of digits
    if len(digits) > _MAX_DIGITS:
        raise TryAgain(f"the server says that it has {digits[:_MAX_DIGITS]}… bytes")
    return int(digits)


def _body(
    response: urllib3.BaseHTTPResponse, expected: int | None, read: Callable[[Read1, int], Data]
) -> Data:
    data = read(lambda most: response.read1(most, decode_content=False), expected or 0)
    if expected is not None and len(data) != expected:
        raise TryAgain(f"could not be read whole: {len(data)} of {expected} bytes came")
    return data
