"""Whether a data set is whole and what its record says: every object, and where asked for every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipelines.dataset import Dataset, Shard
from pipelines.errors import printable
from pipelines.images import decode_image
from pipelines.shards import ShardIndex, crc32c, parse_index, sha256
from pipelines.source_tar import LABEL_EXTENSION
from pipelines.storage import ObjectMissing, Storage
from pipelines.tars import TarError, TarSample, samples, walk

Progress = Callable[[int, int], None]
# shards that are fetched and looked at side by side
_SHARDS_AT_ONCE = 4


@dataclass(frozen=True)
class Problem:
    """What is wrong with an object of a data set; `sample` is the key of the one it concerns, or None."""

    object: str
    sample: str | None
    reason: str

    def __str__(self) -> str:
        which = "" if self.sample is None else f"sample {self.sample!r}: "
        return f"{self.object}: {which}{self.reason}"


@dataclass(frozen=True)
class Verified:
    """`shards`, `samples`, `num_bytes`: how much was looked at. `problems`: in the order of the shards."""

    shards: int
    samples: int
    num_bytes: int
    problems: tuple[Problem, ...]


def verify(dataset: Dataset, *, deep: bool = False, progress: Progress | None = None) -> Verified:
    """Check every shard of every split against the record: both objects' SHA-256, the tar's size, the index
    against the tar's members, each image's CRC32C and each label. With `deep` every image is decoded as well.

    The record itself and the list of shards were checked when the data set was loaded. `progress(done, total)`
    counts samples. What is wrong is returned, not raised; raises `StorageError` where the storage can't be read.
    """
    shards = [shard for split in dataset.splits.values() for shard in split]
    total, done = sum(shard.count for shard in shards), 0
    problems: list[Problem] = list(_duplicates(shards))
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        for shard, found in zip(
            shards, pool.map(lambda shard: list(check_shard(dataset, shard, deep)), shards), strict=True
        ):
            problems += found
            done += shard.count
            if progress is not None:
                progress(done, total)
    return Verified(len(shards), total, sum(shard.num_bytes for shard in shards), tuple(problems))


def _duplicates(shards: list[Shard]) -> Iterator[Problem]:
    seen: set[str] = set()
    for shard in shards:
        for key in (shard.key, shard.index_key):
            if key in seen:
                yield Problem(key, None, "is listed twice in the data set's list of shards")
            seen.add(key)


def check_shard(dataset: Dataset, shard: Shard, deep: bool) -> Iterator[Problem]:
    """What is wrong with one shard."""
    tar, reason = _fetch(*dataset.tar_of(shard), shard.sha256, shard.num_bytes)
    where = dataset.uri_of(shard)
    if reason:
        yield Problem(where, None, reason)
    raw, reason = _fetch(dataset.storage, shard.index_key, shard.index_sha256)
    where_index = f"{dataset.uri}/{shard.index_key}"
    index = None
    if reason:
        yield Problem(where_index, None, reason)
    if raw is not None:
        try:
            index = parse_index(raw)
        except ValueError as error:
            yield Problem(where_index, None, str(error))
    if index is not None:
        for name, there, named in (
            ("samples", index.count, shard.count),
            ("bytes of its tar", index.tar_num_bytes, shard.num_bytes),
            ("as its tar's SHA-256", index.tar_sha256, shard.sha256),
        ):
            if there != named:
                yield Problem(where_index, None, f"says {there} {name}, and the data set says {named}")
    if tar is not None:
        yield from _check_samples(where, tar, index, dataset, deep)


def _fetch(
    storage: Storage, key: str, expected: str, num_bytes: int | None = None
) -> tuple[bytes | None, str | None]:
    try:
        data = storage.get(key)
    except ObjectMissing:
        return None, "is missing"
    if num_bytes is not None and len(data) != num_bytes:
        return data, f"has {len(data)} bytes, and the data set says {num_bytes}"
    found = sha256(data)
    if found != expected:
        return data, f"has SHA-256 {found[:16]}…, and the data set says {expected[:16]}…"
    return data, None


def _check_samples(
    where: str, tar: bytes, index: ShardIndex | None, dataset: Dataset, deep: bool
) -> Iterator[Problem]:
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
            by_key.get(key), bool(found), tar, data, (offset, length, label, crc), dataset, deep
        )
        if reason:
            yield Problem(where, printable(key), reason)


def _sample_reason(
    sample: TarSample | None,
    readable: bool,
    tar: bytes,
    data: bytes,
    row: tuple[int, int, int, int],
    dataset: Dataset,
    deep: bool,
) -> str | None:
    offset, length, label, crc = row
    if len(data) != length:
        return f"its {length} bytes at {offset} lie beyond the end of the tar"
    if readable and sample is None:
        return "is in the index and not in its tar"
    if sample is not None and (offset, length) not in {(at, size) for _, at, size in sample.members}:
        return f"the index points at {length} bytes at {offset}, where the tar has no member of it"
    if sample is not None and (wrong := _label_reason(sample, tar, label, dataset)):
        return wrong
    if label >= max(len(dataset.classes), 1) or label < -1:
        return f"has the label {label}, and the data set has {len(dataset.classes)} classes"
    if crc32c(data) != crc:
        return "its bytes do not have the CRC32C that the index gives"
    if deep:
        try:
            decode_image(data, dataset.shape)
        except ValueError as error:
            return str(error)
    return None


def _label_reason(sample: TarSample, tar: bytes, label: int, dataset: Dataset) -> str | None:
    member = dataset.record.get("preparation", {}).get("label_member", LABEL_EXTENSION)
    for extension, offset, size in sample.members:
        if extension == member:
            written = tar[offset : offset + size].decode("utf-8", "replace").strip()
            name = dataset.classes[label] if 0 <= label < len(dataset.classes) else None
            if written == name or written == str(label) or (written.isdecimal() and int(written) == label):
                return None
            return f"the tar gives it the label {printable(written[:20])!r}, the index {label}"
    return None if label == -1 else f"the index gives it the label {label}, and the tar none"


def summary(dataset: Dataset, verified: Verified, deep: bool) -> dict[str, Any]:
    """The result as plain values, to be written as JSON."""
    return {
        "uri": dataset.uri,
        "identity": dataset.identity,
        "deep": deep,
        "shards": verified.shards,
        "samples": verified.samples,
        "num_bytes": verified.num_bytes,
        "whole": not verified.problems,
        "problems": [vars(problem) for problem in verified.problems],
    }
