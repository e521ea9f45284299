"""S3 by boto3; the only file that imports it.

Endpoint and credentials come from the environment alone (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, a profile,
an instance's role), as boto3 reads it.
"""

from __future__ import annotations

import functools
import os
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from pipelines.adapters.s3_bodies import body, check_stored, contradicts_etag, stated_length, too_short
from pipelines.errors import UserError, one_line, printable, without_password
from pipelines.retries import Data, Read1, TryAgain, insist, read_steadily, read_steadily_hashed
from pipelines.storage import (
    Hashed,
    Memory,
    NoRanges,
    ObjectInfo,
    ObjectMissing,
    StorageError,
    checked_key,
    new_memory,
)

Result = TypeVar("Result")

CONNECT_TIMEOUT_S = 5
# without a byte; how slowly a body may come is `retries.Pace`
READ_TIMEOUT_S = 30
# Up to this size an object that `get` reads is compared with its ETag. Larger ones are shards and weights, which
# their reader compares with a SHA-256; hashing them twice would cost a good part of the reading.
ETAG_CHECK_MAX_BYTES = 2**20

_MISSING = {"NoSuchKey", "404", "NotFound"}
_BAD_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "ExpiredToken",
    "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
}
# what passes by itself: overload, a server's fault, a request that was altered or starved on its way
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_PASSING = {"RequestTimeout", "SlowDown", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}
_WRITER = "ddpm-writer"


class _Server(NamedTuple):
    client: Any
    name: str


@functools.cache
def _server(pid: int, endpoint: str | None) -> _Server:
    """One client a process (a new one costs 0.1 s), never carried over a fork. `endpoint`: the environment's."""
    named = "AWS_ENDPOINT_URL"
    client = _made(path_style=False) if endpoint is None else None
    if client is not None and not _is_amazons(client.meta.endpoint_url):
        named, endpoint = "endpoint_url of the profile", client.meta.endpoint_url
    if endpoint is not None:
        if _split(endpoint)[0] not in ("http", "https"):
            raise UserError(f"{named}: {without_password(endpoint)!r} is no http:// or https:// address")
        client = _made(path_style=True)
    assert client is not None
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if bundle and client.meta.endpoint_url.startswith("https:") and not Path(bundle).exists():
        raise UserError(f"AWS_CA_BUNDLE: {bundle}: no such file")
    if endpoint is not None:
        # before boto3's own, which is made for AWS's regions and asks without end where none is named
        client.meta.events.register_first("needs-retry.s3", _refuse_redirect)
    return _Server(client, _name(endpoint))


def _is_amazons(endpoint: str) -> bool:
    """Whether it is what boto3 takes where none is named."""
    plain = _made(path_style=False, ignore_configured_endpoint_urls=True)
    return bool(plain.meta.endpoint_url == endpoint)


def _name(endpoint: str | None) -> str:
    return f"the S3 server at {without_password(endpoint)}" if endpoint else "AWS S3"


def _made(*, path_style: bool, **options: bool) -> Any:
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=32,
        # botocore retries a request, but not the reading of a body that breaks off: `insist` does both
        retries={"mode": "standard", "total_max_attempts": 1},
        # other servers than AWS's know neither the newer checksums nor every bucket as a host name
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if path_style else "auto"},
        **options,
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError as error:
        raise UserError(f"AWS_ENDPOINT_URL: {one_line(error)}") from None


class _Redirected(Exception):
    """The server leads to the host that the message names."""


def _split(address: str) -> tuple[str, str]:
    """Its scheme and server; both empty where it is no address."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return "", ""
    return parts.scheme, parts.netloc


def _refuse_redirect(response: Any = None, **_: Any) -> None:
    if response is not None and 300 <= response[0].status_code < 400:
        aim = response[0].headers.get("location") or "elsewhere"
        raise _Redirected(printable(_split(aim)[1].rpartition("@")[2]) or "elsewhere")


class S3Storage:
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = prefix

    def __reduce__(self) -> tuple[type[S3Storage], tuple[str, str]]:
        return S3Storage, (self._bucket, self._prefix)

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def child(self, *parts: str) -> S3Storage:
        return S3Storage(self._bucket, "/".join([*filter(None, [self._prefix]), *map(checked_key, parts)]))

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{checked_key(key)}".lstrip("/")

    def _call(self, what: str, call: Callable[[Any], Result]) -> Result:
        """`call` with the client, again while the budget lasts; every failure as a `StorageError` that names
        the object or the server.
        """
        return insist(what, lambda: self._once(what, call), StorageError)

    def _once(self, what: str, call: Callable[[Any], Result]) -> Result:
        ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
        names = () if ignored else ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        endpoint = next(filter(None, map(os.environ.get, names)), None)
        where = _name(endpoint)
        try:
            client, where = _server(os.getpid(), endpoint)
            return call(client)
        except ClientError as error:
            raise self._refusal(what, where, error) from None
        except _Redirected as aim:
            raise StorageError(
                f"{what}: {where} redirects to {aim}, which gets no credentials; set AWS_ENDPOINT_URL or "
                "AWS_DEFAULT_REGION to where the bucket is"
            ) from None
        except NoCredentialsError:
            raise StorageError(
                f"{what}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            ) from None
        except SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise StorageError(f"{what}: {where}: {one_line(error)}") from None
            raise TryAgain(f"{where}: {one_line(error)}") from None
        except ConnectionError:
            raise TryAgain(f"{where} does not answer; check AWS_ENDPOINT_URL") from None
        except (
            HTTPClientError,
            ReadTimeoutError,
            IncompleteReadError,
            ResponseParserError,
            OSError,
            ValueError,  # botocore's, where it reads a length, a time or a number that is none
        ) as error:
            raise TryAgain(f"{where}: {one_line(error)}") from None
        except ProfileNotFound as error:
            raise StorageError(f"{what}: AWS_PROFILE: {one_line(error)}") from None
        except BotoCoreError as error:
            raise StorageError(f"{what}: {where}: {one_line(error)}") from None

    def _refusal(self, what: str, where: str, error: ClientError) -> Exception:
        """What a server's answer means: `TryAgain` if it may pass, else the error to end with."""
        problem = error.response.get("Error", {})
        answer = error.response.get("ResponseMetadata", {})
        code, status = problem.get("Code", ""), answer.get("HTTPStatusCode", 0)
        said = one_line(UserError(": ".join(filter(None, [code, problem.get("Message")]))))
        if code in _MISSING:
            return ObjectMissing(what)
        if code == "NoSuchBucket":
            return StorageError(
                f"{what}: {where} has no bucket {self._bucket!r}; check its name, or make it first"
            )
        if code in _BAD_CREDENTIALS:
            return StorageError(
                f"{what}: {where} refused the credentials ({code}); check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE"
            )
        if code in _PASSING or status in _PASSING_STATUS:
            return TryAgain(f"{where} refused: {said}")
        if status == 403:
            return StorageError(
                f"{what}: {where} denied access ({code}); check the credentials, and what they may do in "
                f"bucket {self._bucket!r}"
            )
        return StorageError(f"{what}: {where} refused: {said}")

    def get(self, key: str) -> bytes:
        doubted: list[bytes] = []

        def checked(response: Any, data: bytes) -> bytes:
            # the same bytes a second time: then this server's ETag is no MD5
            small = len(data) <= ETAG_CHECK_MAX_BYTES
            if small and contradicts_etag(response, data) and data not in doubted:
                doubted.append(data)
                raise TryAgain("was altered on its way: its bytes are not those of its ETag")
            return data

        return self._get(key, read_steadily, checked)

    def get_hashed(self, key: str, memory: Memory = new_memory) -> Hashed:
        return self._get(key, functools.partial(read_steadily_hashed, memory), lambda _, data: data)

    def _get(
        self, key: str, read: Callable[[Read1, int], Data], checked: Callable[[Any, Data], Data]
    ) -> Data:
        uri = f"{self.uri}/{key}"

        def attempt(s3: Any) -> Data:
            response = s3.get_object(Bucket=self._bucket, Key=self._key(key))
            return checked(response, body(response, stated_length(response, uri), read))

        return self._call(uri, attempt)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        uri = f"{self.uri}/{key}"
        span = f"bytes={start}-{start + length - 1}"

        def attempt(s3: Any) -> bytes:
            try:
                response = s3.get_object(Bucket=self._bucket, Key=self._key(key), Range=span)
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
                    raise too_short(uri, start, length, 0) from None
                raise
            if response["ResponseMetadata"]["HTTPStatusCode"] == 200:
                # the whole of it is on its way, and is not waited for
                response["Body"].close()
                raise NoRanges(f"{uri}: this server gives no parts of objects (it ignores Range)")
            given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.get("ContentRange", ""))
            if given and given[3].isdecimal() and int(given[3]) < start + length:
                response["Body"].close()
                raise too_short(uri, start, length, max(0, int(given[3]) - start))
            if not given or (int(given[1]), int(given[2])) != (start, start + length - 1):
                response["Body"].close()
                raise TryAgain(f"could not be read whole: asked for {span}, the server gave another part")
            return body(response, length, read_steadily)

        return self._call(uri, attempt)

    def put(self, key: str, data: bytes) -> None:
        place = {"Bucket": self._bucket, "Key": self._key(key)}
        self._call(
            f"{self.uri}/{key}",
            lambda s3: check_stored(s3, place, data, s3.put_object(**place, Body=data)),
        )

    def put_if_absent(self, key: str, data: bytes) -> bool:
        place = {"Bucket": self._bucket, "Key": self._key(key)}
        # the answer to a request that succeeded may get lost: its mark tells our object from another's
        mark = uuid.uuid4().hex
        tries = 0
        condition = {"IfNoneMatch": "*"}

        def attempt(s3: Any) -> bool:
            nonlocal tries
            tries += 1
            try:
                answer = s3.put_object(**place, **condition, Body=data, Metadata={_WRITER: mark})
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if status == 409:
                    raise TryAgain("other writers kept racing for it; try again") from None
                if status != 412:
                    raise
                answer = s3.head_object(**place) if tries > 1 else {}
                if answer.get("Metadata", {}).get(_WRITER) != mark:
                    return False
            try:
                check_stored(s3, place, data, answer)
            except TryAgain:
                # ours stands, but not as it is: no other writer may win any more, so it can be replaced
                condition.clear()
                raise
            return True

        return self._call(f"{self.uri}/{key}", attempt)

    def exists(self, key: str) -> bool:
        uri = f"{self.uri}/{key}"
        try:
            self._call(uri, lambda s3: s3.head_object(Bucket=self._bucket, Key=self._key(key)))
        except ObjectMissing:
            # HEAD has no body, so a missing bucket looks like a missing object; a listing tells them apart
            self._call(
                uri, lambda s3: s3.list_objects_v2(Bucket=self._bucket, Prefix=self._key(key), MaxKeys=1)
            )
            return False
        return True

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        base = f"{self._prefix}/" if self._prefix else ""
        what = f"{self.uri}/{prefix}"
        found = []
        seen: set[str] = set()
        more: dict[str, str] = {}
        while True:

            def page(s3: Any, more: dict[str, str] = more) -> Any:
                return s3.list_objects_v2(Bucket=self._bucket, Prefix=base + prefix, **more)

            # a budget for each page, so that a long listing fares as well as a short one
            answer = self._call(what, page)
            for entry in answer.get("Contents", []):
                name, num_bytes = entry.get("Key", ""), entry.get("Size", -1)
                if not name.startswith(base + prefix) or num_bytes < 0:
                    raise StorageError(
                        f"{what}: the server lists what was not asked for: {printable(name)!r}"
                    )
                etag = entry.get("ETag", "").strip('"')
                found.append(ObjectInfo(name[len(base) :], num_bytes, etag))
            if not answer.get("IsTruncated"):
                return sorted(found, key=lambda info: info.key)
            token = answer.get("NextContinuationToken", "")
            if not token or token in seen:
                raise StorageError(
                    f"{what}: the server cut the list off and does not say how to go on ({len(found)} objects came)"
                )
            seen.add(token)
            more = {"ContinuationToken": token}

    def delete(self, keys: Iterable[str]) -> None:
        doomed = [{"Key": self._key(key)} for key in keys]
        for start in range(0, len(doomed), 1000):
            batch = {"Objects": doomed[start : start + 1000], "Quiet": True}

            def remove(s3: Any, batch: dict[str, Any] = batch) -> None:
                answer = s3.delete_objects(Bucket=self._bucket, Delete=batch)
                for failure in answer.get("Errors", []):
                    name, code = failure.get("Key", "?"), failure.get("Code", "for no reason given")
                    raise StorageError(
                        f"s3://{self._bucket}/{printable(name)}: not deleted: {printable(code)}"
                    )

            self._call(self.uri, remove)
