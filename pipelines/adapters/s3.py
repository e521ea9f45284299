"""S3 by boto3; the only file that imports it.

Endpoint and credentials come from the environment alone (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, a profile,
an instance's role), as boto3 reads it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from pipelines.errors import UserError, one_line
from pipelines.storage import ObjectInfo, ObjectMissing, StorageError, checked_key

Result = TypeVar("Result")

# botocore retries a request, but not the reading of a body that breaks off
_BODY_ATTEMPTS = 4
_BROKEN_BODY = (ResponseStreamingError, IncompleteReadError, ReadTimeoutError, HTTPClientError)
_MISSING = {"NoSuchKey", "404", "NotFound"}
_LOST_RACE = {"PreconditionFailed", "412"}
_RACING = {"ConditionalRequestConflict", "409"}


@functools.cache
def _client(pid: int, endpoint: str | None) -> Any:
    """One client a process (a new one costs 0.1 s), never carried over a fork."""
    if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
        raise UserError(f"AWS_ENDPOINT_URL: {endpoint!r} is no http:// or https:// address")
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=32,
        retries={"mode": "standard", "total_max_attempts": 5},
        # other servers than AWS's know neither the newer checksums nor every bucket as a host name
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError as error:
        raise UserError(f"AWS_ENDPOINT_URL: {one_line(error)}") from None


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
        """`call` with the client; every failure as a `StorageError` that names the object or the server."""
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        where = f"the S3 server at {endpoint}" if endpoint else "AWS S3"
        try:
            return call(_client(os.getpid(), endpoint))
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in _MISSING:
                raise ObjectMissing(what) from None
            if code == "NoSuchBucket":
                raise StorageError(f"{what}: {where} has no bucket {self._bucket!r}; make it first") from None
            raise StorageError(f"{what}: {where} refused: {one_line(error)}") from None
        except NoCredentialsError:
            raise StorageError(
                f"{what}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            ) from None
        except EndpointConnectionError:
            raise StorageError(f"{what}: {where} does not answer; check AWS_ENDPOINT_URL") from None
        except (BotoCoreError, OSError) as error:
            raise StorageError(f"{what}: {where}: {one_line(error)}") from None

    def _read(self, key: str, length: int | None = None, **request: str) -> bytes:
        uri = f"{self.uri}/{key}"
        for attempt in range(1, _BODY_ATTEMPTS + 1):
            response = self._call(
                uri, lambda s3: s3.get_object(Bucket=self._bucket, Key=self._key(key), **request)
            )
            try:
                data: bytes = response["Body"].read()
            except _BROKEN_BODY as error:
                problem = one_line(error)
            else:
                expected = response["ContentLength"] if length is None else length
                if len(data) == expected:
                    return data
                problem = f"{len(data)} of {expected} bytes came"
            if attempt < _BODY_ATTEMPTS:
                time.sleep(0.1 * 2**attempt)
        raise StorageError(f"{uri}: could not be read whole in {_BODY_ATTEMPTS} attempts: {problem}")

    def get(self, key: str) -> bytes:
        return self._read(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        return self._read(key, length, Range=f"bytes={start}-{start + length - 1}")

    def put(self, key: str, data: bytes) -> None:
        self._call(
            f"{self.uri}/{key}",
            lambda s3: s3.put_object(Bucket=self._bucket, Key=self._key(key), Body=data),
        )

    def put_if_absent(self, key: str, data: bytes) -> bool:
        def attempt(s3: Any) -> bool | None:
            try:
                s3.put_object(Bucket=self._bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code", "")
                if code in _LOST_RACE:
                    # a retried request may have lost against its own first try, whose answer got lost
                    retried = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
                    return retried > 0 and self.get(key) == data
                if code in _RACING:
                    return None
                raise
            return True

        uri = f"{self.uri}/{key}"
        for pause in (0.05, 0.2, 0.5, 1.0, 2.0):
            outcome = self._call(uri, attempt)
            if outcome is not None:
                return outcome
            time.sleep(pause)
        raise StorageError(f"{uri}: other writers kept racing for it; try again")

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

        def pages(s3: Any) -> list[ObjectInfo]:
            found = []
            for page in s3.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=base + prefix
            ):
                for entry in page.get("Contents", []):
                    found.append(ObjectInfo(entry["Key"][len(base) :], entry["Size"]))
            return found

        return sorted(self._call(f"{self.uri}/{prefix}", pages), key=lambda info: info.key)

    def delete(self, keys: Iterable[str]) -> None:
        doomed = [{"Key": self._key(key)} for key in keys]
        for start in range(0, len(doomed), 1000):
            batch = {"Objects": doomed[start : start + 1000], "Quiet": True}

            def remove(s3: Any, batch: dict[str, Any] = batch) -> None:
                answer = s3.delete_objects(Bucket=self._bucket, Delete=batch)
                for failure in answer.get("Errors", []):
                    raise StorageError(
                        f"s3://{self._bucket}/{failure['Key']}: not deleted: {failure['Code']}"
                    )

            self._call(self.uri, remove)
