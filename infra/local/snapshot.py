"""All buckets of the S3 server as one tar file, and back.

Member `BUCKET/KEY` (the key percent-encoded, so that any key is a plain file name) holds an object's bytes; its
content type and user metadata are pax headers.  Member `BUCKET` alone, a folder, says that the bucket exists.
The last member, `.objects`, holds the number of objects: a file without it was cut.
"""

from __future__ import annotations

import io
import os
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from email.message import Message
from pathlib import Path
from typing import IO, cast
from urllib.parse import quote, unquote

from infra.local.errors import StackError
from infra.local.loopback import RequestFailed, request

_NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"
# The emulator verifies no signature but hands objects only to requests that carry one.
_SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=ddpm-local/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}
_PAX_PREFIX = "DDPM."
_LAST_MEMBER = ".objects"
_TIMEOUT_S = 60.0


def list_buckets(endpoint: str, *, timeout_s: float = 5.0) -> list[str]:
    """Names of the buckets."""
    tree = _xml(endpoint + "/", timeout_s)
    return [name.text or "" for name in tree.iterfind(f".//{_NAMESPACE}Bucket/{_NAMESPACE}Name")]


def make_buckets(endpoint: str, buckets: Iterable[str]) -> None:
    """Make buckets; one that exists is left as it is.  Raises `StackError` if the server refuses."""
    try:
        for bucket in buckets:
            _make_bucket(endpoint, bucket)
    except RequestFailed as error:
        raise StackError(f"bucket {bucket}: cannot be made ({error})") from None


def _make_bucket(endpoint: str, bucket: str) -> None:
    with request("PUT", f"{endpoint}/{bucket}", headers=_SIGNED, timeout_s=_TIMEOUT_S):
        pass


def list_keys(endpoint: str, bucket: str, *, page_size: int = 1000) -> Iterator[str]:
    """Every key of the bucket, in order."""
    query = f"list-type=2&encoding-type=url&max-keys={page_size}"
    token = ""
    while True:
        tree = _xml(f"{endpoint}/{bucket}?{query}{token}", _TIMEOUT_S)
        for key in tree.iterfind(f"{_NAMESPACE}Contents/{_NAMESPACE}Key"):
            yield unquote(key.text or "")
        following = tree.findtext(f"{_NAMESPACE}NextContinuationToken")
        if tree.findtext(f"{_NAMESPACE}IsTruncated") != "true" or not following:
            return
        token = f"&continuation-token={quote(following, safe='')}"


def save(endpoint: str, path: Path) -> int:
    """Write all buckets to `path`, which is replaced only when the new file is whole; the number of objects.

    Raises `StackError` if an object can't be read or the file can't be written.
    """
    unfinished = path.with_suffix(".tmp")
    count = 0
    try:
        with unfinished.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for bucket in list_buckets(endpoint):
                    folder = tarfile.TarInfo(bucket)
                    folder.type = tarfile.DIRTYPE
                    folder.mode = 0o755
                    tar.addfile(folder)
                    for key in list_keys(endpoint, bucket):
                        _save_object(endpoint, bucket, key, tar)
                        count += 1
                tar.addfile(*_last_member(count))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RequestFailed, ET.ParseError) as error:
        raise StackError(f"the buckets could not be saved to {path}: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def restore(endpoint: str, path: Path) -> int:
    """Put every bucket and object of a saved file onto the server; the number of objects.

    Raises `StackError` if the file is damaged or the server refuses an object.
    """
    count = 0
    promised = b""
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                bucket, _, name = member.name.partition("/")
                if member.isdir():
                    _make_bucket(endpoint, bucket)
                    continue
                data = cast(IO[bytes], tar.extractfile(member))
                if member.name == _LAST_MEMBER:
                    promised = data.read()
                    continue
                _restore_object(endpoint, bucket, name, member, data)
                count += 1
        if promised != str(count).encode():
            raise tarfile.ReadError(f"the file was cut after {count} objects")
    except (OSError, RequestFailed, tarfile.TarError) as error:
        raise StackError(
            f"the buckets could not be restored: {error}; move {path} away to start with empty ones"
        ) from None
    return count


def _last_member(count: int) -> tuple[tarfile.TarInfo, IO[bytes]]:
    content = str(count).encode()
    member = tarfile.TarInfo(_LAST_MEMBER)
    member.size = len(content)
    return member, io.BytesIO(content)


def _save_object(endpoint: str, bucket: str, key: str, tar: tarfile.TarFile) -> None:
    name = quote(key, safe="")
    with request("GET", f"{endpoint}/{bucket}/{name}", headers=_SIGNED, timeout_s=_TIMEOUT_S) as response:
        member = tarfile.TarInfo(f"{bucket}/{name}")
        member.size = int(response.headers["Content-Length"])
        member.pax_headers = {_PAX_PREFIX + k: v for k, v in _object_headers(response.headers).items()}
        tar.addfile(member, response)


def _object_headers(headers: Message) -> dict[str, str]:
    """What belongs to the object among the headers of its answer."""
    kept = ("content-type", "content-encoding", "content-disposition", "cache-control")
    return {
        name.lower(): value
        for name, value in headers.items()
        if name.lower() in kept or name.lower().startswith("x-amz-meta-")
    }


def _restore_object(endpoint: str, bucket: str, name: str, member: tarfile.TarInfo, data: IO[bytes]) -> None:
    headers = {
        key.removeprefix(_PAX_PREFIX): value
        for key, value in member.pax_headers.items()
        if key.startswith(_PAX_PREFIX)
    }
    # without one, urllib declares a form and the server swallows the body
    headers.setdefault("content-type", "binary/octet-stream")
    headers.update(_SIGNED, **{"Content-Length": str(member.size)})
    with request("PUT", f"{endpoint}/{bucket}/{name}", body=data, headers=headers, timeout_s=_TIMEOUT_S):
        pass


def _xml(url: str, timeout_s: float) -> ET.Element:
    with request("GET", url, headers=_SIGNED, timeout_s=timeout_s) as response:
        return ET.fromstring(response.read())
