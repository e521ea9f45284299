"""What makes an answer of S3 whole: its length, its pace, and the ETag where that is an MD5."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

from urllib3.exceptions import HTTPError

from pipelines.errors import one_line
from pipelines.retries import Data, Read1, TryAgain, read_steadily
from pipelines.storage import ObjectTooShort, StorageError

_BROKEN_BODY = (HTTPError, OSError)


def stated_length(response: Any, uri: str) -> int:
    length = response.get("ContentLength")
    if length is None:
        response["Body"].close()
        raise StorageError(
            f"{uri}: the server does not say how long it is, so a cut could not be told from its end"
        )
    return int(length)


def body(response: Any, expected: int, read: Callable[[Read1, int], Data]) -> Data:
    """All bytes of an answer; `TryAgain` where there are not as many as `expected`, or the line breaks."""
    try:
        # botocore's own stream can only wait for all that is asked for, a byte a second included
        data = read(response["Body"]._raw_stream.read1, expected)
    except TryAgain:
        response["Body"].close()
        raise
    except _BROKEN_BODY as error:
        raise TryAgain(f"could not be read whole: {one_line(error)}") from None
    if len(data) != expected:
        raise TryAgain(f"could not be read whole: {len(data)} of {expected} bytes came")
    return data


def check_stored(s3: Any, place: dict[str, str], data: bytes, answer: Any) -> None:
    """`TryAgain` unless the object there is `data`: by the ETag in `answer`, or if that differs by reading it."""
    if contradicts_etag(answer, data):
        response = s3.get_object(**place)
        uri = f"s3://{place['Bucket']}/{place['Key']}"
        if body(response, stated_length(response, uri), read_steadily) != data:
            raise TryAgain("was altered on its way to the server")


def contradicts_etag(response: Any, data: bytes) -> bool:
    """Whether the ETag has the form of the MD5 that it is for an object written by one plain PUT, and is not it."""
    etag = response.get("ETag", "").strip('"').lower()
    keyed = "SSECustomerAlgorithm" in response or response.get("ServerSideEncryption", "AES256") != "AES256"
    if keyed or not re.fullmatch("[0-9a-f]{32}", etag):
        return False
    return hashlib.md5(data, usedforsecurity=False).hexdigest() != etag


def too_short(uri: str, start: int, length: int, there: int) -> ObjectTooShort:
    return ObjectTooShort(f"{uri}: {there} of {length} bytes at {start}: the object is too short")
