"""Whether a shard's tar, its index and what both should hold agree, sample by sample."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pipelines.duplicates import twice
from pipelines.errors import printable
from pipelines.images import decode_image
from pipelines.shards import ShardIndex, crc32c
from pipelines.source_tar import LABEL_EXTENSION
from pipelines.tars import TarError, TarSample, samples, walk
from pipelines.verified import Problem


@dataclass(frozen=True)
class Contents:
    """What every sample of a shard must be: an image of `shape`, with a label of `classes`.

    classes: their names, in the order of the labels; None where labels are numbers without names.
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...] | None
    label_member: str = LABEL_EXTENSION


def check_index(
    where: str, index: ShardIndex, count: int, num_bytes: int, tar_sha256: str, said_by: str
) -> Iterator[Problem]:
    """What an index says of its tar against what `said_by` says of it."""
    for name, there, named in (
        ("samples", index.count, count),
        ("bytes of its tar", index.tar_num_bytes, num_bytes),
        ("as its tar's SHA-256", index.tar_sha256, tar_sha256),
    ):
        if there != named:
            yield Problem(where, None, f"says {there} {name}, and {said_by} says {named}")


# what differs between reasons of one kind: numbers, and what is quoted
_PARTICULARS = re.compile(r"""(['"]).*\1|\d+""")


def condensed(problems: Iterable[Problem]) -> list[Problem]:
    """Of the samples of an object that are wrong in one way the first, which says which others there are."""
    alike: dict[object, list[Problem]] = {}
    for number, problem in enumerate(problems):
        kind = number if problem.sample is None else (problem.object, _PARTICULARS.sub("", problem.reason))
        alike.setdefault(kind, []).append(problem)
    return [
        replace(first, likewise=tuple(other.sample or "" for other in others))
        for first, *others in alike.values()
    ]


def check_samples(
    where: str, tar: bytes, index: ShardIndex | None, contents: Contents, deep: bool
) -> Iterator[Problem]:
    """A tar against its index: the members, each image's CRC32C and label, and with `deep` each image decoded.

    Without an index only that the tar can be walked through.
    """
    view = memoryview(tar)
    try:
        found = list(samples(walk(lambda start, length: tar[start : start + length], len(tar)), []))
    except TarError as error:
        yield Problem(where, None, str(error))
        found = []
    if index is None:
        return
    by_key = {sample.key: sample for sample in found}
    keys = index.key.to_pylist()
    for key in twice(keys):
        yield Problem(where, printable(key), "is in the index more than once")
    listed = set(keys)
    for sample in found:
        if sample.key not in listed:
            yield Problem(where, printable(sample.key), "is in the tar and not in its index")
    rows = zip(
        keys,
        *(getattr(index, name).tolist() for name in ("offset", "length", "label", "crc32c")),
        strict=True,
    )
    for key, offset, length, label, crc in rows:
        data = bytes(view[offset : offset + length])
        reason = _sample_reason(
            by_key.get(key), bool(found), tar, data, (offset, length, label, crc), contents, deep
        )
        if reason:
            yield Problem(where, printable(key), reason)


def _sample_reason(
    sample: TarSample | None,
    readable: bool,
    tar: bytes,
    data: bytes,
    row: tuple[int, int, int, int],
    contents: Contents,
    deep: bool,
) -> str | None:
    offset, length, label, crc = row
    if len(data) != length:
        return f"its {length} bytes at {offset} lie beyond the end of the tar"
    if readable and sample is None:
        return "is in the index and not in its tar"
    if sample is not None and (offset, length) not in {(at, size) for _, at, size in sample.members}:
        return f"the index points at {length} bytes at {offset}, where the tar has no member of it"
    if sample is not None and (wrong := _label_reason(sample, tar, label, contents)):
        return wrong
    if contents.classes is not None and (label >= max(len(contents.classes), 1) or label < -1):
        return f"has the label {label}, and the data set has {len(contents.classes)} classes"
    if crc32c(data) != crc:
        return "its bytes do not have the CRC32C that the index gives"
    if deep:
        try:
            decode_image(data, contents.shape)
        except ValueError as error:
            return str(error)
    return None


def _label_reason(sample: TarSample, tar: bytes, label: int, contents: Contents) -> str | None:
    for extension, offset, size in sample.members:
        if extension == contents.label_member:
            written = tar[offset : offset + size].decode("utf-8", "replace").strip()
            classes = contents.classes or ()
            name = classes[label] if 0 <= label < len(classes) else None
            if written == name or written == str(label) or (written.isdecimal() and int(written) == label):
                return None
            return f"the tar gives it the label {printable(written[:20])!r}, the index {label}"
    return None if label == -1 else f"the index gives it the label {label}, and the tar none"
