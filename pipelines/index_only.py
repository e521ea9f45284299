"""A data set of WebDataset tars that stay where they are: their indexes and the record, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any
from urllib.parse import quote, unquote

from pipelines.dataset import RECORD_KEY, Dataset, Shard
from pipelines.errors import UserError, printable
from pipelines.images import check_levels, stored_shape
from pipelines.prepare import Progress
from pipelines.prepare_commit import claim, commit, discard, finished
from pipelines.prepare_plan import keyed_hash
from pipelines.prepare_shards import MAX_NAMED, BadImages, Workers
from pipelines.preprocess import check_plain
from pipelines.shards import crc32c, index_of, sha256
from pipelines.source_find import Found, find, read_object
from pipelines.source_tar import LABEL_EXTENSION, list_tar
from pipelines.sources import fingerprint, number_labels, warn_passed_over
from pipelines.storage import Storage, StorageError, open_storage


@dataclass(frozen=True)
class Scanned:
    """What is known of one tar once it has been read. `labels`: as they are written, None for none. `bad`: a line
    for each image that can't be taken, `MAX_NAMED` at most.
    """

    key: str
    num_bytes: int
    sha256: str
    columns: Mapping[str, list[str | int]]
    labels: tuple[str | None, ...]
    shape: tuple[int, int, int] | None
    passed_over: tuple[str, ...]
    bad: tuple[str, ...] = ()


def index_tars(
    source: str,
    out: str,
    *,
    image_size: int | None = None,
    levels: int | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    image: str | None = None,
    label: str | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> Dataset:
    """Make the data set `out` of the tars of `source`, which are read once and not copied.

    Every image must be an 8-bit grey or RGB PNG or a JPEG, and all of one shape (squares of `image_size` where it
    is given). Whole tars are held out: those where a hash of (seed, name) falls below `test_fraction`, and at
    least one. A tar below `out` is named by its key, so that both can be moved together, others by their URI.
    Other arguments are those of `pipelines.prepare.prepare`; `progress` counts tars.

    Raises `UserError` naming the tar and the member that is not taken.
    """
    levels = 256 if levels is None else levels
    try:
        check_levels(levels)
    except ValueError as error:
        raise UserError(str(error)) from None
    found = find(source)
    if found.kind != "tar":
        raise UserError(f"source: {found.where}: --index-only is for .tar files, and this is a {found.kind}")
    if len(found.keys) < 2:
        raise UserError(f"source: {found.where}: --index-only holds out whole tars, so it needs two at least")
    storage = open_storage(out)
    options: dict[str, Any] = {
        "source": "index-only",
        "source_fingerprint": fingerprint(f"{key!r} {size}" for key, size in sorted(found.keys.items())),
        "image_size": image_size,
        "levels": levels,
        "test_fraction": test_fraction,
        "seed": seed,
        "image_member": image,
        "label_member": label or LABEL_EXTENSION,
    }
    if (existing := finished(storage, options)) is not None:
        return existing
    claim(storage, options)
    try:
        return _index(found, storage, options, image, label, progress, workers)
    except StorageError:
        raise  # what is written is right, and the next call goes on from it
    except UserError:
        if not storage.exists(RECORD_KEY):
            discard(storage, [])
        raise


def _index(
    found: Found,
    storage: Storage,
    options: dict[str, Any],
    image: str | None,
    label: str | None,
    progress: Progress | None,
    workers: Workers | None,
) -> Dataset:
    scan = partial(scan_tar, found.storage, image=image, label=label)
    scanned = _scan_all(found.keys, scan, progress, workers)
    passed_over = [name for tar in scanned for name in tar.passed_over]
    warn_passed_over(found.where, passed_over, "members that are no sample's")
    scanned = [tar for tar in scanned if tar.labels]
    shape = _one_shape(found.storage, scanned, options["image_size"])
    classes, numbers = number_labels(
        found.where,
        [label for tar in scanned for label in tar.labels],
        name_of=lambda place: _name_of(found.storage, scanned, place),
    )
    stops = list(accumulate(len(tar.labels) for tar in scanned))
    held_out = _held_out([tar.key for tar in scanned], options["seed"], options["test_fraction"])
    shards, counts = [], {"train": 0, "test": 0}
    for tar, stop in zip(scanned, stops, strict=True):
        split = "test" if tar.key in held_out else "train"
        index_key = f"{split}/shard-{counts[split]:06d}.index.parquet"
        counts[split] += 1
        columns: dict[str, Sequence[str | int]] = {
            **tar.columns,
            "label": numbers[stop - len(tar.labels) : stop],
        }
        index = index_of(columns, tar.sha256, tar.num_bytes)
        storage.put(index_key, index)
        key = _key_of(storage, found.storage, tar.key)
        shards.append(Shard(split, key, index_key, len(tar.labels), tar.num_bytes, tar.sha256, sha256(index)))
    shards.sort(key=lambda shard: (shard.split != "train", shard.index_key))
    commit(storage, printable(found.name), shape, options["levels"], classes, options, shards)
    dataset = finished(storage, options)
    assert dataset is not None
    return dataset


def _scan_all(
    sizes: Mapping[str, int],
    scan: Callable[[tuple[str, int]], Scanned],
    progress: Progress | None,
    workers: Workers | None,
) -> list[Scanned]:
    result: dict[str, Scanned] = {}
    bad: list[str] = []

    def left() -> Iterator[tuple[str, int]]:
        for task in sizes.items():
            if len(bad) >= MAX_NAMED:
                return
            yield task

    def here() -> Iterator[tuple[tuple[str, int], Scanned]]:
        for task in left():
            yield task, scan(task)

    for (key, _), scanned in here() if workers is None else workers(scan, left()):
        result[key] = scanned
        bad += scanned.bad
        if progress is not None:
            progress(len(result), len(sizes))
    if bad:
        raise BadImages.of(bad, sum(len(tar.labels) for tar in result.values()))
    return [result[key] for key in sorted(result)]


def scan_tar(storage: Storage, task: tuple[str, int], *, image: str | None, label: str | None) -> Scanned:
    """Read one tar, whole: where its images lie, their checksums and labels, and their shape, which is one."""
    key, num_bytes = task
    where = printable(f"{storage.uri}/{key}")
    data = read_object(storage, key, where)
    if len(data) != num_bytes:
        raise UserError(f"source: {where}: had {num_bytes} bytes when it was listed, and now has {len(data)}")
    listed = list_tar(_InMemory(storage.uri, data), key, num_bytes, image, label)
    columns: dict[str, list[str | int]] = {name: [] for name in ("key", "offset", "length", "crc32c")}
    first: tuple[int, int, int] | None = None
    bad: list[str] = []
    for sample, extension in zip(listed.samples, listed.images, strict=True):
        offset, size = next((at, size) for name, at, size in sample.members if name == extension)
        body = data[offset : offset + size]
        name = f"{where}/{printable(sample.key)}"
        try:
            check_plain(body)
            shape = stored_shape(body)
            if first is not None and shape != first:
                raise ValueError(f"is of shape {list(shape)}, and the first image {list(first)}")
            sample.key.encode()
        except ValueError as error:
            reason = "its key is no UTF-8 text" if isinstance(error, UnicodeEncodeError) else error
            bad.append(f"source: {name}: {reason}: prepare without --index-only")
            if len(bad) == MAX_NAMED:
                break
            continue
        first = shape
        row: tuple[str | int, ...] = (sample.key, offset, size, crc32c(body))
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return Scanned(
        key, num_bytes, sha256(data), columns, listed.labels, first, listed.passed_over, tuple(bad)
    )


@dataclass(frozen=True)
class _InMemory:
    """As much of a storage as listing one tar takes, over bytes that are here already."""

    uri: str
    data: bytes

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.data[start : start + length]


def _name_of(storage: Storage, scanned: list[Scanned], place: int) -> str:
    for tar in scanned:
        if place < len(tar.labels):
            return printable(f"{storage.uri}/{tar.key}/{tar.columns['key'][place]}")
        place -= len(tar.labels)
    raise AssertionError(place)


def _one_shape(storage: Storage, scanned: list[Scanned], image_size: int | None) -> tuple[int, int, int]:
    if len(scanned) < 2:
        raise UserError(f"source: {storage.uri}: fewer than two of its tars hold samples")
    first = scanned[0].shape
    assert first is not None
    for tar in scanned:
        expected = first if image_size is None else (first[0], image_size, image_size)
        if tar.shape != expected:
            raise UserError(
                f"source: {printable(f'{storage.uri}/{tar.key}')}: its images are of shape "
                f"{list(tar.shape or ())}, not {list(expected)}: prepare without --index-only, which makes them one"
            )
    return first


def _held_out(keys: list[str], seed: int, test_fraction: float) -> set[str]:
    """Whole tars by the hash of their names; of both splits at least one."""
    ranked = sorted(keys, key=lambda key: (keyed_hash(seed, "split", key), key))
    below = sum(keyed_hash(seed, "split", key) < test_fraction * 2**64 for key in keys)
    return set(ranked[: min(max(below, 1), len(keys) - 1)])


def _key_of(out: Storage, tars: Storage, key: str) -> str:
    """How the record names a tar. A folder's URI is percent-encoded, an address on S3 is not."""
    on_disk = tars.uri.startswith("file:")
    uri = f"{tars.uri}/{quote(key) if on_disk else key}"
    if not uri.startswith(f"{out.uri}/"):
        return uri
    inside = uri.removeprefix(f"{out.uri}/")
    return unquote(inside) if on_disk else inside
