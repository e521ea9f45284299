"""Tars read strictly: what tarfile and webdataset pass over without a word is an error here.

Both end quietly at a header that is damaged or missing, and all samples behind it are lost. Here each header's
checksum must be right, each body must fit, nothing but regular files may be in, and the archive must end with
its marker of two empty blocks, behind which there is nothing.
"""

from __future__ import annotations

import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipelines.errors import one_line, printable

BLOCK_BYTES = 512
_EMPTY = bytes(BLOCK_BYTES)
_CHUNK_BYTES = 4 * 2**20
_MAX_NAME_BYTES = 64 * 2**10
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WHAT = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
# as webdataset splits names: the key ends at the first dot of the last part
_SAMPLE_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
# with a part that is empty, or one or two dots
_ODD_NAME = re.compile(r"(^|/)\.{0,2}(/|$)|\0")
_META_NAME = re.compile(r"__[^/]*__(/|$)")

# (offset, length) -> just these bytes
Read = Callable[[int, int], bytes]


class TarError(ValueError):
    """Why a tar can't be taken; the message names the member or the byte, not the tar."""


class DamagedTar(TarError):
    """It is not as it was written."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, without `./` in front, and where its `size` bytes begin."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarSample:
    """Members that lie together and share a key: (extension in lower case, offset, size) of each."""

    key: str
    members: tuple[tuple[str, int, int], ...]


def buffered(read: Read, num_bytes: int) -> Read:
    """Reads of a few bytes, one after the other, served from larger ones."""
    start, chunk = 0, b""

    def from_chunk(offset: int, length: int) -> bytes:
        nonlocal start, chunk
        if not start <= offset <= offset + length <= start + len(chunk):
            start, chunk = offset, read(offset, min(max(length, _CHUNK_BYTES), num_bytes - offset))
        return chunk[offset - start : offset - start + length]

    return from_chunk


def walk(read: Read, num_bytes: int) -> Iterator[Member]:
    """The members of the tar of this size that `read` gives, in order. Raises `TarError`."""
    at, name, pax = 0, None, dict[str, str]()
    while True:
        if at + BLOCK_BYTES > num_bytes:
            raise DamagedTar(
                f"it is cut short: after {num_bytes} bytes the end-of-archive marker has not come"
            )
        block = read(at, BLOCK_BYTES)
        if block == _EMPTY:
            _check_end(read, at, num_bytes)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise DamagedTar(f"its header at byte {at} is damaged ({one_line(error, 60)})") from None
        body = at + BLOCK_BYTES
        own = name or pax.get("path") or info.name
        size = _size(pax["size"], own) if "size" in pax else info.size
        at = body + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if size < 0 or body + size > num_bytes:
            raise DamagedTar(
                f"it is cut short or damaged: member {printable(own)!r} of {size} bytes at byte {body} does not "
                f"fit into its {num_bytes} bytes"
            )
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE):
            if size > _MAX_NAME_BYTES:
                raise TarError(f"its header at byte {body - BLOCK_BYTES} gives a name of {size} bytes")
            text = read(body, size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                pax = _pax(text, body)
            continue
        if info.type == tarfile.XGLTYPE:
            continue
        if info.type not in _REGULAR or any(field.startswith("GNU.sparse") for field in pax):
            if info.type == tarfile.DIRTYPE:
                checked_name(own)
            else:
                what = _WHAT.get(info.type, "of an unknown type" if info.type not in _REGULAR else "sparse")
                raise TarError(f"its member {printable(own)!r} is {what}, not a regular file")
        else:
            yield Member(checked_name(own), body, size)
        name, pax = None, {}


def _check_end(read: Read, at: int, num_bytes: int) -> None:
    if num_bytes - at < 2 * BLOCK_BYTES:
        raise DamagedTar(f"it is cut short: its end-of-archive marker at byte {at} is not whole")
    while at < num_bytes:
        rest = read(at, min(_CHUNK_BYTES, num_bytes - at))
        if rest.count(0) != len(rest):
            raise TarError(f"there are data behind its end-of-archive marker, after byte {at}")
        at += len(rest)


def _pax(text: bytes, at: int) -> dict[str, str]:
    fields = {}
    while text.strip(b"\0"):
        number, _, _ = text.partition(b" ")
        length = int(number) if number.isdigit() and len(number) < 8 else 0
        record, text = text[:length], text[length:]
        name, equals, value = record[len(number) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise DamagedTar(f"its extended header at byte {at} is damaged")
        fields[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return fields


def _size(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise TarError(f"its member {printable(name)!r} has the size {text[:20]!r}")
    return int(text)


def checked_name(name: str) -> str:
    """A member's name without `./` in front; `TarError` if it points out of where it is unpacked."""
    if not _ODD_NAME.search(name):
        return name  # as pathlib would, which takes its time
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise TarError(f"its member {printable(name)!r} points outside of it")
    return str(path)


def samples(members: Iterable[Member], passed_over: list[str]) -> Iterator[TarSample]:
    """The members by sample, as webdataset groups them.

    Names that are no KEY.EXTENSION (hidden files, webdataset's own `__…__`) go to `passed_over`. Raises
    `TarError` where a key comes back after another, or one has two members of one extension.
    """
    seen: set[str] = set()
    for sample in grouped(members, passed_over.append):
        if sample.key in seen:
            raise comes_back(sample.key)
        seen.add(sample.key)
        yield sample


def comes_back(key: str) -> TarError:
    """What is wrong with a tar in which a sample's files do not follow each other."""
    return TarError(
        f"the files of its sample {printable(key)!r} do not stand together: to WebDataset those behind files of "
        "other samples are a second sample of this name; write the tar again with all files of a sample one after "
        "the other (as GNU tar's --sort=name does), under another name if they are two samples"
    )


def grouped(members: Iterable[Member], pass_over: Callable[[str], None]) -> Iterator[TarSample]:
    """As `samples`, but that no key is held to see whether it comes back."""
    key, found = "", list[tuple[str, int, int]]()
    for member in members:
        match = _SAMPLE_NAME.fullmatch(member.name)
        if match is None or _META_NAME.match(member.name):
            pass_over(member.name)
            continue
        if match[1] != key:
            if found:
                yield TarSample(key, tuple(found))
            key, found = match[1], []
        # a sample has few of them, and a source many samples
        extension = sys.intern(match[2].lower())
        if any(extension == other for other, _, _ in found):
            raise TarError(f"it holds two members named {printable(f'{key}.{extension}')!r}")
        found.append((extension, member.offset, member.size))
    if found:
        yield TarSample(key, tuple(found))
