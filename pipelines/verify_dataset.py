"""Whether a data set is whole and what its record says: every object, and where asked for every sample."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipelines.dataset import DataError, Dataset, Shard
from pipelines.duplicates import same_content
from pipelines.errors import UserError, printable
from pipelines.shards import parse_index, sha256
from pipelines.source_tar import LABEL_EXTENSION
from pipelines.storage import ObjectMissing, Storage, StorageError
from pipelines.verified import Problem, Progress, Verified
from pipelines.verify_shards import Contents, check_index, check_samples, condensed

# shards that are fetched and looked at side by side
_SHARDS_AT_ONCE = 4

_MISSING = "is missing"


def verify_dataset(dataset: Dataset, *, deep: bool = False, progress: Progress | None = None) -> Verified:
    """Check every shard of every split against the record: both objects' SHA-256, the tar's size, the index
    against the tar's members, each image's CRC32C and each label. With `deep` every image is decoded as well.

    The record itself and the list of shards were checked when the data set was loaded. `progress(done, total)`
    counts samples. What is wrong is returned, not raised; raises `StorageError` where the storage can't be read.
    """
    shards = [shard for split in dataset.splits.values() for shard in split]
    total, done = sum(shard.count for shard in shards), 0
    listed = list(_duplicates(shards))
    problems: list[Problem] = []
    owners = _Owners(
        {shard.sha256: dataset.uri_of(shard) for shard in reversed(shards)},
        {shard.index_sha256: dataset.uri_of_index(shard) for shard in reversed(shards)},
    )
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        for shard, found in zip(
            shards,
            pool.map(lambda shard: list(_check_shard(dataset, shard, owners, deep)), shards),
            strict=True,
        ):
            problems += found
            done += shard.count
            if progress is not None:
                progress(done, total)
    num_bytes = sum(shard.num_bytes for shard in shards)
    looked = {"shards": len(shards), "samples": total, "num_bytes": num_bytes}
    return Verified(
        "data set",
        dataset.uri,
        dataset.identity,
        looked,
        (*listed, *problems),
        advice=_advice(dataset, bool(listed), problems),
    )


def _advice(dataset: Dataset, listed_wrong: bool, problems: list[Problem]) -> str:
    """What to do about the problems that shards have, in one line."""
    shards = [shard for split in dataset.splits.values() for shard in split]
    stay = dataset.record.get("preparation", {}).get("source") == "index-only"
    theirs = {dataset.uri_of(shard) for shard in shards if stay or "://" in shard.key}
    damaged = {problem.object for problem in problems if problem.sample is None}
    # of a damaged index the samples of a whole tar seem wrong
    explained = damaged | {
        dataset.uri_of(shard) for shard in shards if dataset.uri_of_index(shard) in damaged
    }
    advice = []
    if damaged - theirs:
        which = "indexes" if theirs else "objects"
        gone = {problem.object for problem in problems if problem.reason == _MISSING}
        advice.append(
            f"the same `ddpm prepare` makes the missing {which} again"
            if damaged - theirs <= gone
            else f"delete the {which} named, then the same `ddpm prepare` makes them again"
        )
    if damaged & theirs:
        advice.append(
            "restore each tar that is named from where it came (`ddpm prepare` can't make it again)"
        )
    if {problem.object for problem in problems} - explained:
        advice.append(
            "where only samples are bad, train with data.on_bad_sample=skip if they can't be read, else "
            "prepare at another prefix from a source that is mended"
        )
    if listed_wrong:
        advice.append("where the list of shards is wrong, prepare at another prefix")
    return "; ".join(advice)


@dataclass(frozen=True)
class _Owners:
    """Whose content has a SHA-256, by the record."""

    tars: dict[str, str]
    indexes: dict[str, str]


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


def _check_shard(dataset: Dataset, shard: Shard, owners: _Owners, deep: bool) -> Iterator[Problem]:
    """What is wrong with one shard."""
    tar: bytes | None = None
    wrong: str | None
    try:
        tar, wrong = _fetch(*dataset.tar_of(shard), owners.tars, shard.sha256, shard.num_bytes)
    except DataError as error:
        wrong = str(error)
    where = dataset.uri_of(shard)
    if wrong:
        yield Problem(where, None, wrong)
    raw, reason = _fetch(dataset.storage, shard.index_key, owners.indexes, shard.index_sha256)
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
        found = check_samples(where, tar, index, Contents(dataset.shape, dataset.classes, member), deep)
        yield from condensed(found) if wrong or reason else found


def _fetch(
    storage: Storage, key: str, owners: dict[str, str], expected: str, num_bytes: int | None = None
) -> tuple[bytes | None, str | None]:
    """An object, unless it is missing or that of another shard; and what is wrong with it.

    owners: the addresses of all of its kind by their SHA-256.
    """
    try:
        data = storage.get(key)
    except ObjectMissing:
        return None, _MISSING
    except StorageError:
        raise
    except UserError as error:
        # a name that could lead out of the prefix
        return None, str(error)
    found = sha256(data)
    if found != expected and (owner := owners.get(found)):
        # its samples would say no more than this
        return None, f"has the bytes of {owner}: the two were exchanged, or that one was copied over this one"
    if num_bytes is not None and len(data) != num_bytes:
        return data, f"has {len(data)} bytes, and the data set says {num_bytes}"
    if found != expected:
        return data, f"has SHA-256 {found[:16]}…, and the data set says {expected[:16]}…"
    return data, None
