"""Whether a data set is whole and what its record says: every object, and where asked for every sample."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pipelines.dataset import DataError, Dataset, Shard
from pipelines.duplicates import same_content
from pipelines.errors import UserError, printable
from pipelines.shards import parse_index, sha256
from pipelines.source_tar import LABEL_EXTENSION
from pipelines.storage import ObjectMissing, Storage, StorageError
from pipelines.verified import Problem, Progress, Verified
from pipelines.verify_shards import Contents, check_index, check_samples

# shards that are fetched and looked at side by side
_SHARDS_AT_ONCE = 4


def verify_dataset(dataset: Dataset, *, deep: bool = False, progress: Progress | None = None) -> Verified:
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
    num_bytes = sum(shard.num_bytes for shard in shards)
    looked = {"shards": len(shards), "samples": total, "num_bytes": num_bytes}
    return Verified("data set", dataset.uri, dataset.identity, looked, tuple(problems))


def _duplicates(shards: list[Shard]) -> Iterator[Problem]:
    seen: set[str] = set()
    for shard in shards:
        for key in (shard.key, shard.index_key):
            if key in seen:
                yield Problem(printable(key), None, "is listed twice in the data set's list of shards")
            seen.add(key)
    for first, again in same_content((shard.key, shard.sha256) for shard in shards):
        if first != again:
            yield Problem(
                printable(again), None, f"holds the same bytes as {printable(first)}: its samples count twice"
            )


def check_shard(dataset: Dataset, shard: Shard, deep: bool) -> Iterator[Problem]:
    """What is wrong with one shard."""
    tar: bytes | None = None
    reason: str | None
    try:
        tar, reason = _fetch(*dataset.tar_of(shard), shard.sha256, shard.num_bytes)
    except DataError as error:
        reason = str(error)
    where = dataset.uri_of(shard)
    if reason:
        yield Problem(where, None, reason)
    raw, reason = _fetch(dataset.storage, shard.index_key, shard.index_sha256)
    where_index = dataset.uri_of_index(shard)
    index = None
    if reason:
        yield Problem(where_index, None, reason)
    if raw is not None:
        try:
            index = parse_index(raw)
        except ValueError as error:
            yield Problem(where_index, None, str(error))
    if index is not None:
        yield from check_index(where_index, index, shard.count, shard.num_bytes, shard.sha256, "the data set")
    if tar is not None:
        member = dataset.record.get("preparation", {}).get("label_member", LABEL_EXTENSION)
        yield from check_samples(where, tar, index, Contents(dataset.shape, dataset.classes, member), deep)


def _fetch(
    storage: Storage, key: str, expected: str, num_bytes: int | None = None
) -> tuple[bytes | None, str | None]:
    try:
        data = storage.get(key)
    except ObjectMissing:
        return None, "is missing"
    except StorageError:
        raise
    except UserError as error:
        # a name that could lead out of the prefix
        return None, str(error)
    if num_bytes is not None and len(data) != num_bytes:
        return data, f"has {len(data)} bytes, and the data set says {num_bytes}"
    found = sha256(data)
    if found != expected:
        return data, f"has SHA-256 {found[:16]}…, and the data set says {expected[:16]}…"
    return data, None
